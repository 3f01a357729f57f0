"""Scores: parts that mean something, fused without labels, in the artifact as in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.artifacts.manifest import Capability
from training.autoencoders import Autoencoder
from training.autoencoders.paired import PairedHourglass, shifted
from training.data import Dataset, to_float
from training.errors import TrainingError
from training.export import TOLERANCE, ExportedModule, export, servable
from training.noise import generator
from training.presets import PRESETS, Preset, build_network
from training.scores import PARTS, Scorer, Scoring, Tails, fit_scorer

VARIATIONAL_PARTS = {"likelihood", "divergence"}


def scoring_of_all_parts(network: Autoencoder) -> Scoring:
    if network.latent_dim is None:
        return Scoring(("residual", "local"), windows=(3, 5))
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
