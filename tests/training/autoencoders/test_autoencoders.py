from __future__ import annotations

import pytest
import torch

from training.autoencoders import AUTOENCODERS, Autoencoder
from training.autoencoders.bottlenecks import Gaussian, NoBottleneck
from training.autoencoders.hourglass import Hourglass, Standardise, VariationalHourglass
from training.autoencoders.layers import conv_stages
from training.data import Dataset
from training.errors import TrainingError
from training.noise import Noise, generator
from training.presets import PRESETS, Preset, build_network, override


def test_every_bottleneck_has_a_preset() -> None:
    """Each registered kind of bottleneck is used, and each preset's is registered."""
    assert {type(preset.bottleneck) for preset in PRESETS.values()} == set(AUTOENCODERS)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 37, 50), (1, 5, 200)])
def test_any_picture_size_works(preset: Preset, shape: tuple[int, int, int]) -> None:
    """Latent vectors are (batch, latent_dim), decoded items have the item's shape and lie in [0, 1]."""
    network = build_network(preset, shape, seed=0).eval()
    x = torch.rand(2, *shape)
    if network.latent_dim is None:
        decoded = network.restore(x, torch.zeros(2, 1, *shape[1:]))
    else:
        z = network.encode(x)
        assert z.shape == (2, network.latent_dim)
        decoded = network.decode(z)
    assert decoded.shape == (2, *shape)
    assert 0 <= float(decoded.min().detach()) <= float(decoded.max().detach()) <= 1


def test_records_are_standardised_inside(preset: Preset, records: Dataset) -> None:
    """Presets that take records know each feature's mean and deviation; the others refuse, naming those that fit."""
    if "records" not in preset.takes:
        with pytest.raises(TrainingError, match=r"takes pictures, found records of shape \(30,\); .*: basic-tutorial"):
            build_network(preset, (30,), seed=0)
        return
    network = build_network(preset, (30,), seed=0).eval()
    network.prepare(records.items)
    assert isinstance(network, Hourglass)
    assert isinstance(network.scaling, Standardise)
    scaled = network.scaling(records.items)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(30), atol=1e-2, rtol=0)
    torch.testing.assert_close(network.scaling.inverse(scaled), records.items, rtol=1e-4, atol=1e-3)
    assert network.standardise(records.items).shape == (569, 30)
    blanked = network.blank(records.items, torch.ones_like(records.items))
    torch.testing.assert_close(blanked[0], records.items.mean(0), rtol=1e-3, atol=1e-3)


def test_loss_reaches_every_parameter(network: Autoencoder, items: torch.Tensor) -> None:
    """No layer is left out of the training."""
    network.train()
    network.loss(items, None, items, Noise(generator(0, "posterior"))).backward()  # type: ignore[no-untyped-call]
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
    """A linear code gets mean 0 and a deviation of at most 1; nothing decodes to anything else."""
    before = network.reconstruct(items)
    if network.latent_dim is None:
        return
    latents_before = network.encode(items)
    network.standardise_latent(items)
    latents = network.encode(items)
    torch.testing.assert_close(network.reconstruct(items), before, atol=1e-5, rtol=0)
    assert isinstance(network, Hourglass)
    linear = isinstance(getattr(network.bottleneck, "activation", None), torch.nn.Identity)
    if not linear:
        assert torch.equal(latents, latents_before)
    else:
        torch.testing.assert_close(latents.mean(0), torch.zeros(network.latent_dim), atol=1e-3, rtol=0)
        spread = latents_before.std(0)
        torch.testing.assert_close(latents.std(0), spread / spread.clamp_min(1.0), atol=1e-3, rtol=0)


def variational(**settings: object) -> VariationalHourglass:
    """The vae preset's network for 1×8×8 with other settings of its bottleneck."""
    changes = [f"bottleneck.{key}={value}" for key, value in settings.items()]
    network = build_network(override(PRESETS["vae"], changes), (1, 8, 8), seed=0).eval()
    assert isinstance(network, VariationalHourglass)
    return network


def test_variational_encode_is_the_mean(items: torch.Tensor) -> None:
    """A variational autoencoder's latent vector is mu: the same twice."""
    network = variational()
    assert torch.equal(network.encode(items), network.encode(items))
    assert torch.equal(network.encode(items), network.posterior(items)[0])


def test_variational_survives_wild_inputs() -> None:
    """log_var is clamped, so that even absurd items give a finite loss."""
    wild = torch.full((4, 1, 8, 8), 1e4)
    loss = variational().loss(wild, None, torch.ones_like(wild), Noise(generator(0, "posterior")))
    assert bool(loss.isfinite())


def test_importance_samples_tighten_the_bound(items: torch.Tensor) -> None:
    """With one sample the importance-weighted bound estimates the ELBO; with 50 it is higher."""
    network = variational()
    with torch.no_grad():
        bounds = {
            draws: float((w.logsumexp(1) - torch.tensor(float(draws)).log()).mean())
            for draws in (1, 50)
            for w in [network.log_weights(items, items, draws, Noise(generator(0, "posterior")))]
        }
        elbo = -float(network.loss(items, None, items, Noise(generator(1, "posterior"))))
    assert abs(bounds[1] - elbo) < 1
    assert bounds[50] > bounds[1]


def test_beta_free_bits_and_warm_up_weigh_the_kl_term(items: torch.Tensor) -> None:
    """Beta multiplies it, free bits are a floor under it, and at the training's start it counts nothing."""

    def loss(network: VariationalHourglass) -> float:
        return float(network.loss(items, None, items, Noise(generator(0, "posterior"))).detach())

    plain = loss(variational())
    warming = variational(warmup_fraction=0.5)
    warming.advance(0.0)
    reconstruction = loss(warming)
    kl = plain - reconstruction
    assert loss(variational(beta=4)) == pytest.approx(reconstruction + 4 * kl, abs=1e-3)
    assert loss(variational(free_bits=10)) == pytest.approx(reconstruction + 160, abs=1e-3)
    warming.advance(0.25)
    assert loss(warming) == pytest.approx(reconstruction + kl / 2, abs=1e-3)


def test_sparse_topk_keeps_so_many(items: torch.Tensor) -> None:
    """Each item's code has at most 25 numbers that are not zero, the largest."""
    network = build_network(PRESETS["sparse-topk"], (1, 8, 8), seed=0).eval()
    assert int((network.encode(items) != 0).sum(1).max()) <= 25


def test_every_unit_of_a_sparse_code_learns(items: torch.Tensor) -> None:
    """Units that are never among the largest of an item are still drawn towards what they answer most to."""
    network = build_network(PRESETS["sparse-topk"], (1, 8, 8), seed=0).train()
    code = network.bottleneck.code  # type: ignore[union-attr]
    with torch.no_grad():
        code.weight[:500] *= 1e-2  # type: ignore[operator, index, union-attr]
        code.bias.fill_(0.1)  # type: ignore[operator, union-attr]
    assert not bool(network.encode(items)[:, :500].any())
    network.loss(items, None, items, Noise(generator(0, "posterior"))).backward()  # type: ignore[no-untyped-call]
    assert bool(code.weight.grad[:500].any(1).all())  # type: ignore[union-attr, operator, index]


def test_contraction_is_the_jacobians_norm(items: torch.Tensor) -> None:
    """Averaged over projections the penalty is the squared Frobenius norm of the encoder's Jacobian."""
    network = build_network(PRESETS["contractive"], (1, 8, 8), seed=0).eval()
    assert isinstance(network, Hourglass)
    exact = torch.stack(
        [torch.autograd.functional.jacobian(network.encode, item[None]).square().sum() for item in items[:4]]
    ).mean()
    noise = Noise(generator(0, "posterior"))
    found = torch.stack([network._contraction(items[:4], noise) for _ in range(300)]).mean()
    assert float(found.detach()) == pytest.approx(float(exact), rel=0.1)


def test_a_memory_answers_with_its_prototypes(items: torch.Tensor) -> None:
    """Addresses are shares of the slots that sum to one, some of them exactly zero."""
    network = build_network(PRESETS["memory"], (1, 8, 8), seed=0).eval()
    weights = network.bottleneck.address(network.encode(items))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(weights.sum(1), torch.ones(64))
    assert bool((weights == 0).any())


def test_quantised_maps_consist_of_codebook_entries(items: torch.Tensor) -> None:
    """Rounding twice is rounding once, and every place holds an entry."""
    network = build_network(PRESETS["vq-vae"], (1, 8, 8), seed=0).eval()
    network.prepare(items)
    bottleneck = network.bottleneck
    once = bottleneck.quantise(network.encode(items))  # type: ignore[union-attr, operator]
    assert torch.equal(bottleneck.quantise(once), once)  # type: ignore[union-attr, operator]


def test_blocks_that_do_not_fit_are_refused() -> None:
    """A codebook without a map, KL sparsity without a sigmoid, a posterior with squared errors: one clear error."""
    from dataclasses import replace

    cases = {
        "convolutional": replace(PRESETS["basic"], bottleneck=PRESETS["vq-vae"].bottleneck),
        "sigmoid": override(PRESETS["sparse"], ["kl_sparsity=0.1"]),
        "bernoulli": override(PRESETS["vae"], ["likelihood.kind=mse"]),
        "at most latent_dim": override(PRESETS["sparse-topk"], ["latent_dim=5"]),
        "neither beta": override(PRESETS["beta-vae"], ["importance_samples=5"]),
        "bottleneck: expected one": replace(PRESETS["unet-denoiser"], bottleneck=Gaussian(4)),
        "for this architecture": replace(PRESETS["basic"], bottleneck=NoBottleneck()),
    }
    for message, preset in cases.items():
        with pytest.raises(TrainingError, match=message):
            build_network(preset, (1, 8, 8), seed=0)


def test_depth_follows_the_picture() -> None:
    """A larger picture is halved more often, odd sides rounding up."""
    assert conv_stages((1, 8, 8), (32, 64), 7) == [(1, 8, 8), (32, 4, 4)]
    assert conv_stages((1, 28, 28), (32, 64), 7) == [(1, 28, 28), (32, 14, 14), (64, 7, 7)]
    assert conv_stages((3, 37, 50), (32, 64), 7)[-1] == (64, 5, 7)
