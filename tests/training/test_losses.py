from __future__ import annotations

import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from training import losses


def test_kl_divergence_is_torch_distributions() -> None:
    """The KL term equals torch.distributions' KL(q ‖ N(0, I)), sign included."""
    noise = torch.Generator().manual_seed(0)
    mu, log_var = torch.randn(9, 5, generator=noise), torch.randn(9, 5, generator=noise)
    expected = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(losses.kl_divergence_by_dimension(mu, log_var), expected)
    assert bool((losses.kl_divergence_by_dimension(mu, log_var) > 0).all())
    assert bool((losses.kl_divergence_by_dimension(torch.zeros(3, 5), torch.zeros(3, 5)) == 0).all())


def test_bernoulli_nll_is_torch_distributions() -> None:
    """The reconstruction term equals −log p of torch.distributions' Bernoulli, summed over pixels."""
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1, 4, 4, generator=noise)
    bits = torch.rand(9, 1, 4, 4, generator=noise).round()
    expected = -Bernoulli(logits=logits).log_prob(bits).flatten(1).sum(1)
    torch.testing.assert_close(losses.bernoulli_nll(logits, bits), expected)


def test_mean_squared_error_is_per_item() -> None:
    """Each item gets the mean over its own values."""
    target = torch.zeros(2, 1, 2, 2)
    found = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.5)])
    assert losses.mean_squared_error(found, target).tolist() == [0.0, 0.25]


def test_normal_log_density_is_torch_distributions() -> None:
    """The density of independent normal values, summed over an item's."""
    noise = torch.Generator().manual_seed(0)
    x, mean, log_sigma = torch.randn(9, 5, generator=noise), torch.randn(9, 5, generator=noise), torch.tensor(0.3)
    expected = Normal(mean, log_sigma.exp()).log_prob(x).sum(1)
    torch.testing.assert_close(losses.normal_log_density(x, mean, log_sigma), expected)
