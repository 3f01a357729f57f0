from __future__ import annotations

import torch

from training.noise import generator
from training.sampler import Sampling, fit_sampler, prior_sampler


def clusters(classes: int = 3, each: int = 200, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around a centre per class, far apart."""
    noise = generator(0, "clusters")
    labels = torch.arange(classes).repeat(each)
    return 10 * labels[:, None] + torch.randn(classes * each, size, generator=noise), labels


def draw(sampler: torch.nn.Module, size: int, label: float, count: int = 2000) -> torch.Tensor:
    noise = generator(1, "draw")
    u, eps = torch.rand(count, generator=noise), torch.randn(count, size, generator=noise)
    drawn: torch.Tensor = sampler(u, eps, torch.full((count,), label))
    return drawn


def test_samples_are_like_what_was_fitted() -> None:
    """Drawn latent vectors have the fitted ones' mean and spread."""
    latents, labels = clusters()
    sampler, conditional = fit_sampler(latents, labels, 3, Sampling())
    drawn = draw(sampler, 4, -1)
    assert conditional
    torch.testing.assert_close(drawn.mean(0), latents.mean(0), atol=0.5, rtol=0)
    torch.testing.assert_close(drawn.std(0), latents.std(0), atol=0.5, rtol=0)


def test_a_class_is_drawn_alone() -> None:
    """With a label all draws come from that class; out of range is clamped, -1 means any."""
    latents, labels = clusters()
    sampler, _ = fit_sampler(latents, labels, 3, Sampling())
    for label in (0, 1, 2):
        assert bool(((draw(sampler, 4, label).mean(1) - 10 * label).abs() < 5).all())
    assert torch.equal(draw(sampler, 4, 99), draw(sampler, 4, 2))


def test_temperature_zero_draws_the_components_means() -> None:
    """Without noise only the component's choice is left."""
    latents, labels = clusters()
    sampler, _ = fit_sampler(latents, labels, 3, Sampling())
    drawn = sampler(torch.rand(100), torch.zeros(100, 4), torch.full((100,), -1.0))
    assert len(drawn.unique(dim=0)) <= 3


def test_few_items_of_a_class_or_no_labels_give_one_mixture() -> None:
    """Classes need ten held-out items each; else the mixture is of all, and knows none."""
    latents, labels = clusters()
    assert not fit_sampler(latents, None, 0, Sampling())[1]
    few = torch.cat([torch.arange(600)[labels < 2], torch.arange(600)[labels == 2][:5]])
    assert not fit_sampler(latents[few], labels[few], 3, Sampling())[1]


def test_wide_latents_are_drawn_in_their_main_directions() -> None:
    """More numbers than max_dimensions: samples vary in the first principal components only."""
    noise = generator(0, "wide")
    latents = torch.randn(500, 3, generator=noise) @ torch.randn(3, 50, generator=noise)
    sampler, _ = fit_sampler(latents, None, 0, Sampling(max_dimensions=3))
    drawn = draw(sampler, 50, -1)
    assert drawn.shape == (2000, 50)
    assert int(torch.linalg.matrix_rank(drawn - drawn.mean(0), rtol=1e-3)) == 3
    torch.testing.assert_close(drawn.std(0), latents.std(0), atol=0.4, rtol=0.2)


def test_very_few_items_still_give_a_sampler() -> None:
    """Five held-out items of many numbers are enough for a finite draw."""
    sampler, _ = fit_sampler(torch.randn(5, 40), None, 0, Sampling())
    assert bool(draw(sampler, 40, -1).isfinite().all())


def test_the_prior_is_the_noise_itself() -> None:
    """N(0, I) passes the noise through."""
    eps = torch.randn(10, 6)
    drawn = prior_sampler(6)(torch.rand(10), eps, torch.full((10,), -1.0))
    torch.testing.assert_close(drawn, eps)
