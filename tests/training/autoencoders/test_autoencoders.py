from __future__ import annotations

import pytest
import torch

from training.autoencoders import AUTOENCODERS, Autoencoder
from training.autoencoders.layers import conv_stages
from training.autoencoders.variational import VariationalAutoencoder
from training.errors import TrainingError
from training.loop import generator
from training.presets import PRESETS, Preset
from training.run import build_network


def test_every_architecture_has_a_preset_that_fits() -> None:
    """Each registered architecture is used, and each preset's network settings are of its architecture's type."""
    assert {preset.architecture for preset in PRESETS.values()} == set(AUTOENCODERS)
    for preset in PRESETS.values():
        assert isinstance(preset.network, AUTOENCODERS[preset.architecture].config_type)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 37, 50), (3, 128, 128), (1, 5, 200)])
def test_any_picture_size_works(preset: Preset, shape: tuple[int, int, int]) -> None:
    """Latent vectors are (batch, latent_dim), decoded items have the item's shape and lie in [0, 1]."""
    network = build_network(preset, shape, seed=0).eval()
    z = network.encode(torch.rand(2, *shape))
    assert z.shape == (2, network.latent_dim)
    decoded = network.decode(z)
    assert decoded.shape == (2, *shape)
    assert 0 <= float(decoded.min().detach()) <= float(decoded.max().detach()) <= 1


def test_loss_reaches_every_parameter(network: Autoencoder, items: torch.Tensor) -> None:
    """No layer is left out of the training."""
    network.train()
    network.loss(items, items, generator(0, "posterior")).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_initialisation_is_decided_by_the_seed(preset: Preset) -> None:
    """The same seed gives the same weights and leaves torch's global generator alone."""
    before = torch.get_rng_state()
    first, again, other = (build_network(preset, (1, 8, 8), seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_standardising_the_code_changes_no_reconstruction(network: Autoencoder, items: torch.Tensor) -> None:
    """A linear code gets mean 0 and deviation 1, less where all but dead; nothing decodes to anything else."""
    before, latents_before = network.reconstruct(items), network.encode(items)
    network.standardise_latent(items)
    latents = network.encode(items)
    torch.testing.assert_close(network.reconstruct(items), before, atol=1e-5, rtol=0)
    if isinstance(network, VariationalAutoencoder) or not getattr(network, "code_is_linear", True):
        assert torch.equal(latents, latents_before)
    else:
        torch.testing.assert_close(latents.mean(0), torch.zeros(network.latent_dim), atol=1e-3, rtol=0)
        spread = latents_before.std(0)
        torch.testing.assert_close(latents.std(0), spread / spread.clamp_min(0.1), atol=1e-3, rtol=0)


def test_variational_encode_is_the_mean(items: torch.Tensor) -> None:
    """A variational autoencoder's latent vector is mu: the same twice."""
    network = build_network(PRESETS["vae"], (1, 8, 8), seed=0).eval()
    assert torch.equal(network.encode(items), network.encode(items))
    assert torch.equal(network.encode(items), network.posterior(items)[0])  # type: ignore[operator]


def test_variational_survives_wild_inputs() -> None:
    """log_var is clamped, so that even absurd items give a finite loss."""
    network = build_network(PRESETS["vae"], (1, 8, 8), seed=0)
    wild = torch.full((4, 1, 8, 8), 1e4)
    assert bool(network.loss(wild, torch.ones_like(wild), generator(0, "posterior")).isfinite())


def test_depth_follows_the_picture() -> None:
    """A larger picture is halved more often, odd sides rounding up."""
    assert conv_stages((1, 8, 8), (32, 64), 7) == [(1, 8, 8), (32, 4, 4)]
    assert conv_stages((1, 28, 28), (32, 64), 7) == [(1, 28, 28), (32, 14, 14), (64, 7, 7)]
    assert conv_stages((3, 37, 50), (32, 64), 7)[-1] == (64, 5, 7)


def test_convolutions_need_pictures() -> None:
    """Flat records are refused before the first epoch."""
    with pytest.raises(TrainingError, match="expected pictures"):
        build_network(PRESETS["conv"], (30,), seed=0)
