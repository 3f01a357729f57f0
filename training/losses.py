"""Losses and the likelihoods behind them: pure functions of tensors, one value per item; the caller averages."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional


def mean_squared_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean over an item's values of the squared difference.

    Args:
        reconstruction, target: (batch, *item).

    Returns:
        One value per item, (batch,).
    """
    return functional.mse_loss(reconstruction, target, reduction="none").flatten(1).mean(1)  # (batch,)


def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """−log p(x|z) of independent Bernoulli pixels, in nats.

    Grey levels in [0, 1] are taken as expectations of bits: a proper likelihood only where `target` is binary.

    Args:
        logits: (batch, *item), before the sigmoid.
        target: (batch, *item), 0 to 1.

    Returns:
        One value per item, (batch,): summed over its pixels.

    Source: Kingma & Welling 2014, arXiv:1312.6114, appendix C.1.
    """
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).sum(1)  # (batch,)


def kl_divergence_by_dimension(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) of a diagonal Gaussian, in nats: −½ (1 + log σ² − μ² − σ²), never negative.

    Args:
        mu, log_var: means and log-variances of the posterior, each (batch, latent_dim).

    Returns:
        One value per latent number, (batch, latent_dim): to be summed over latent_dim, averaged over the batch.

    Source: Kingma & Welling 2014, arXiv:1312.6114, appendix B.
    """
    return -0.5 * (1 + log_var - mu.square() - log_var.exp())  # (batch, latent_dim)


def normal_log_density(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Log N(x; mean, σ²) of independent values with one standard deviation, in nats.

    Args:
        x, mean: (batch, *item).
        log_sigma: a scalar.

    Returns:
        One value per item, (batch,): summed over its values.
    """
    scaled = (x - mean) * (-log_sigma).exp()
    return -(0.5 * scaled.square() + log_sigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)  # (batch,)
