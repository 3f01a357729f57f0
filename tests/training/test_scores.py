"""Scores: parts that mean something, fused without labels, in the artifact as in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from app.artifacts.manifest import Capability
from training.autoencoders import Autoencoder
from training.autoencoders.paired import PairedHourglass, shifted
from training.data import Dataset, to_float
from training.errors import TrainingError
from training.export import TOLERANCE, ExportedModule, export, servable
from training.noise import generator
from training.presets import PRESETS, Preset, build_network
from training.scores import PARTS, PatchMap, Scorer, Scoring, Tails, fit_scorer

VARIATIONAL_PARTS = {"likelihood", "divergence"}


def scoring_of_all_parts(network: Autoencoder) -> Scoring:
    if network.latent_dim is None:
        return Scoring(("residual", "local", "patches"), windows=(3, 5))
    lacking = set() if network.prior else VARIATIONAL_PARTS
    lacking = lacking if isinstance(network, PairedHourglass) else lacking | {"companion"}
    return Scoring(tuple(name for name in PARTS if name not in lacking), neighbours=50)


def test_every_part_scores_alike_in_the_artifact(preset: Preset, digits: Dataset) -> None:
    """With all of its parts fitted, a network's scores, parts and maps are the artifact's, in batches of any size."""
    network = build_network(preset, (1, 8, 8), seed=0).eval()
    if Capability.ANOMALY_SCORE not in network.capabilities:
        pytest.skip("gives no scores")
    network.prepare(to_float(digits.items[:500]))
    scorer = fit_scorer(network, scoring_of_all_parts(network), digits.items[:300], digits.items[300:500])
    x = to_float(digits.items[500:564])
    exported = ExportedModule(export(network, x, generator(0, "check"), scorer))
    with torch.inference_mode():
        score, parts = servable(network, scorer).anomaly_score(x)  # type: ignore[operator]
    assert parts.shape == (64, len(scorer.names))
    torch.testing.assert_close(score, parts.mean(1), atol=1e-6, rtol=1e-6)
    assert (parts > 0).all()
    for batch_size in (1, 7, 64):
        found = exported.outputs("anomaly_score", x, batch_size=batch_size)
        torch.testing.assert_close(found, [score, parts], atol=5 * TOLERANCE, rtol=TOLERANCE)
    assert exported.run("anomaly_map", x).shape == x.shape


def test_records_have_maps_of_features(records: Dataset) -> None:
    """A record's map has a place per feature; few normal records exceed 1 in any."""
    network = build_network(PRESETS["basic"], (30,), seed=0).eval()
    network.prepare(records.items)
    scorer = fit_scorer(network, Scoring(), records.items[:300], records.items[300:400])
    exported = ExportedModule(export(network, records.items[:64], generator(0, "check"), scorer))
    maps = exported.run("anomaly_map", records.items[:400])
    assert maps.shape == (400, 30)
    assert 0.9 < float((maps.amax(1) <= 1).float().mean()) < 1
    changed = records.items[:64].clone()
    changed[:, 7] += 20 * records.items[:, 7].std()
    assert (exported.run("anomaly_map", changed).argmax(1) == 7).float().mean() > 0.9


def test_tails_are_the_share_of_normal_values() -> None:
    """Evidence is −log10 of the share of values that high: as counted within the data, as the law's beyond it."""
    random = np.random.default_rng(0)
    normal = torch.from_numpy(random.pareto(4, (4000, 1)).astype(np.float32) + 1)
    tails = Tails(1)
    tails.fit(normal)
    for value in (1.05, 1.2, 1.5):
        expected = -np.log10(float((normal >= value).double().mean()))
        assert float(tails(torch.tensor([[value]]))) == pytest.approx(expected, abs=0.02)
    for value in (4.0, 20.0):
        assert float(tails(torch.tensor([[value]]))) == pytest.approx(4 * np.log10(value), rel=0.15)


def test_evidence_grows_with_the_value() -> None:
    """From nothing to far beyond the data evidence grows, strictly, whatever values are tied."""
    random = np.random.default_rng(0)
    normal = torch.from_numpy(np.round(random.gamma(2, size=(300, 2)), 1).astype(np.float32) + 0.1)
    tails = Tails(2)
    tails.fit(normal)
    values = torch.linspace(0.01, 50, 2000)[:, None].expand(-1, 2)
    steps = tails(values).diff(dim=0)
    assert (steps >= 0).all()
    beyond = values[1:, 0] > normal.max()
    assert (steps[beyond] > 0).all()


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3])
def test_values_almost_alike_make_no_step(apart: float) -> None:
    """Evidence grows no more steeply between few items than beyond them: a value's rounding is no evidence."""
    values = [1.0, 2.0, 2.0 + apart, 2.0 + 2 * apart, 3.0, 4.0, 5.0, 5.0 + apart, 5.0 + 2 * apart, 9.0]
    normal = torch.tensor([values * 3, [value / 2 for value in values * 3]]).T
    tails = Tails(2)
    tails.fit(normal)
    at = torch.cat([torch.linspace(0.5, 12, 5000), torch.tensor([2.0, 2.0 + apart, 5.0, 5.0 + apart])]).sort().values
    near = at * (1 + 1e-5)
    steepness = (tails(torch.stack([near, near], 1)).double() - tails(torch.stack([at, at], 1)).double()) / 1e-5
    assert steepness.max() < 12


@pytest.mark.parametrize("rows", [1, 2, 5, 11])
def test_few_normal_items_make_tails_too(rows: int) -> None:
    """However few there are, evidence is finite and grows."""
    tails = Tails(1)
    tails.fit(torch.rand(rows, 1, generator=generator(0, "few")) + 0.1)
    evidence = tails(torch.tensor([[1e-3], [0.5], [5.0], [1e6]]))
    assert torch.isfinite(evidence).all()
    assert (evidence.diff(dim=0) >= 0).all()


def test_the_pathway_is_whitened(digits: Dataset) -> None:
    """Of the items that it was fitted on, the mean square of every whitened direction is one."""
    network = build_network(PRESETS["basic"], (1, 8, 8), seed=0).eval()
    scorer = fit_scorer(network, Scoring(("pathway",), directions=20), digits.items[:500], digits.items[500:600])
    x = to_float(digits.items[:500])
    with torch.inference_mode():
        seen = network.observe(x, scorer.noise, scorer.sigma, scorer.wants)
        seen["ink"] = torch.ones(500)
        whitened = scorer.raw(seen)
    assert float(whitened.square().mean()) == pytest.approx(1, rel=1e-3)


def test_likeness_asks_neither_for_ink_nor_for_strength(digits: Dataset) -> None:
    """Known items are nearest; half as strong, a known item stays so; one with its pixels shuffled is far from all."""
    network = build_network(PRESETS["basic"], (1, 8, 8), seed=0).eval()
    scorer = fit_scorer(network, Scoring(("likeness",), neighbours=500), digits.items[:500], digits.items[500:600])
    known = to_float(digits.items[:50])
    order = torch.randperm(64, generator=generator(0, "shuffle"))
    shuffled = known.flatten(1)[:, order].reshape(known.shape)

    def likeness(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return scorer.raw(scorer.complete(x, network.observe(x, scorer.noise, scorer.sigma, scorer.wants)))[:, 0]

    torch.testing.assert_close(likeness(known / 2), likeness(known), atol=1e-4, rtol=1e-4)
    assert likeness(known).max() < likeness(shuffled).min()


def test_answer_likeness_is_of_the_reconstruction(digits: Dataset) -> None:
    """It looks at what the network answers, not at the item."""
    network = build_network(PRESETS["basic"], (1, 8, 8), seed=0).eval()
    scoring = Scoring(("likeness", "answer_likeness"), neighbours=100)
    scorer = fit_scorer(network, scoring, digits.items[:300], digits.items[300:400])
    x = to_float(digits.items[400:410])
    with torch.inference_mode():
        seen = scorer.complete(x, network.observe(x, scorer.noise, scorer.sigma, scorer.wants))
        before = scorer.raw(seen)
        seen["y"] = seen["y"].flip(0)
        after = scorer.raw(seen)
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert (before[:, 1] != after[:, 1]).all()


def textured(pictures: int, side: int, seed: int) -> torch.Tensor:
    """Smooth grain in one colour, as bytes: (pictures, 3, side, side)."""
    noise = torch.randn(pictures, 1, side, side, generator=generator(seed, "grain"))
    grain = functional.avg_pool2d(noise, 5, 1, 2)
    colour = 0.5 + 0.2 * grain * torch.tensor([1.0, 0.9, 0.8]).view(1, 3, 1, 1)
    return (colour.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (37, 50)])
def test_patches_find_a_tint_that_the_grain_never_has(shape: tuple[int, int]) -> None:
    """A square, fainter than the grain but of another tint, is where the map is highest; few good pictures pass 1."""
    height, width = shape
    items = textured(60, 64, 0)[:, :, :height, :width]
    patches = PatchMap((3, height, width))
    patches.fit(items[:40], items[40:50])
    x = to_float(items[50:])
    odd = x.clone()
    odd[:, 0, 12:20, 20:30] += 8 / 255  # the grain's deviation is 10 grey levels
    with torch.inference_mode():
        maps, good = patches(odd).view(10, height, width), patches(x)
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[10:22, 18:32] = True  # a patch reaches so far
    assert inside.flatten()[maps.flatten(1).argmax(1)].all()
    assert (maps.amax((1, 2)) > 1).all()
    assert float((good.amax(1) > 1).float().mean()) < 0.5


def test_patches_shrink_pictures_as_far_as_there_is_room() -> None:
    """Full size alone below 64 pixels, and another halving with each doubling."""
    counts = [len(PatchMap((1, side, side)).scales) for side in (8, 63, 64, 128, 256)]
    assert counts == [1, 1, 2, 3, 4]


def test_the_map_is_that_of_the_patches(digits: Dataset) -> None:
    """Where patches are a part, the exported map is theirs, and a row's map is the same in any batch."""
    network = build_network(PRESETS["inspection"], (1, 8, 8), seed=0).eval()
    scorer = fit_scorer(network, PRESETS["inspection"].scoring, digits.items[:300], digits.items[300:400])
    x = to_float(digits.items[400:464])
    exported = ExportedModule(export(network, x, generator(0, "check"), scorer))
    with torch.inference_mode():
        expected = scorer.patches(x).view(64, 1, 8, 8)
    for batch_size in (1, 7, 64):
        torch.testing.assert_close(exported.run("anomaly_map", x, batch_size=batch_size), expected)


@pytest.mark.parametrize("shape", [(30,), (1, 4, 9)])
def test_items_without_room_for_patches_are_refused(shape: tuple[int, ...]) -> None:
    """Records, and pictures smaller than a patch, are one clear error."""
    with pytest.raises(TrainingError, match=r"scoring\.parts: patches: expected pictures of 5 pixels or more"):
        Scorer(shape, Scoring(("patches",)))


def test_noise_is_the_same_for_every_item(digits: Dataset) -> None:
    """Restoration draws no noise of its own: the same item has the same score in any batch, and each time."""
    network = build_network(PRESETS["denoising"], (1, 8, 8), seed=0).eval()
    scorer = fit_scorer(network, Scoring(("restoration",)), digits.items[:200], digits.items[200:300])
    assert scorer.noise.shape == (2, 1, 8, 8)
    module = servable(network, scorer)
    x = to_float(digits.items[300:310])
    with torch.inference_mode():
        first, _ = module.anomaly_score(x)  # type: ignore[operator]
        again, _ = module.anomaly_score(x.flip(0))  # type: ignore[operator]
    torch.testing.assert_close(first, again.flip(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (Scoring(()), "scoring.parts: expected different parts, at least one"),
        (Scoring(("residual", "residual")), "scoring.parts: expected different parts"),
        (Scoring(("residual", "pathway"), weights=(1.0,)), "scoring.weights: expected none or one for each"),
    ],
)
def test_bad_settings_are_refused(scoring: Scoring, message: str) -> None:
    """Parts that are none, or twice, and weights that do not fit are one clear error."""
    with pytest.raises(TrainingError, match=message):
        Scorer((1, 8, 8), scoring)


def test_pictures_shift_by_whole_pixels() -> None:
    """Each picture moves by itself, as its number decides; nothing else about it changes."""
    x = torch.rand(9, 2, 5, 6, generator=generator(0, "shift"))
    moved = shifted(x, torch.arange(9) / 9 + 0.01, 1)
    torch.testing.assert_close(moved[4], x[4])
    torch.testing.assert_close(moved[0], torch.roll(x[0], (-1, -1), (1, 2)))
    torch.testing.assert_close(moved[5], torch.roll(x[5], 1, 2))


def test_parts_that_a_network_has_nothing_for_are_refused(digits: Dataset) -> None:
    """A part of variational networks, asked of another, is one clear error."""
    network = build_network(PRESETS["basic"], (1, 8, 8), seed=0).eval()
    with pytest.raises(TrainingError, match=r"scoring\.parts: this network has no divergence, likelihood to score by"):
        fit_scorer(network, Scoring(("divergence",)), digits.items[:30], digits.items[30:60])
