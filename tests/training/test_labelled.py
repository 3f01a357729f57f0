"""Recalibration and labelled anomalies: new verdicts for the same model, weights that gain, figures that hold."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.artifacts.store import Artifact, read_artifact
from training.calibrate import scores_of
from training.data import Dataset, to_float
from training.errors import TrainingError
from training.export import ExportedModule
from training.labelled import auroc, labelled_items
from training.presets import get_preset, override
from training.progress import Silent
from training.run import make_artifact, open_artifact, recalibrate


@pytest.fixture(scope="module")
def artifact(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Trained a little on the digits 0 to 4 of scikit-learn's."""
    assert digits.labels is not None
    few = replace(digits, items=digits.items[digits.labels < 5], labels=None, label_names=(), name="low digits")
    ref = make_artifact(
        override(get_preset("basic"), ["hidden_sizes=[64]", "latent_dim=8", "epochs=30"]),
        few,
        name="low",
        store=tmp_path_factory.mktemp("store"),
        seed=0,
        device=torch.device("cpu"),
        progress=Silent(),
    )
    assert ref is not None
    return read_artifact(ref)


@pytest.fixture
def known(digits: Dataset) -> Dataset:
    """The digits again, the low ones good, the high ones bad."""
    assert digits.labels is not None
    return replace(digits, labels=(digits.labels >= 5).long(), label_names=("good", "bad"))


def test_recalibration_changes_verdicts_and_no_model(artifact: Artifact, digits: Dataset) -> None:
    """Another set of normal items gives another calibration and other verdicts; the model's hash stays."""
    assert digits.labels is not None
    high = replace(digits, items=digits.items[digits.labels >= 5][:400], labels=None, label_names=())
    ref, judged = recalibrate(artifact, high, "high digits")
    again = read_artifact(ref)
    assert judged is None
    assert (ref.name, ref.version) == ("low", 2)
    assert hashlib.sha256(again.model).hexdigest() == hashlib.sha256(artifact.model).hexdigest()
    assert again.manifest.files["model.pt"] == artifact.manifest.files["model.pt"]
    before, after = artifact.calibration(), again.calibration()
    assert before is not None
    assert after is not None
    assert after.id != before.id
    scores = ExportedModule(artifact.model).run("anomaly_score", to_float(digits.items[:500])).numpy()
    flagged = [calibration.verdicts(scores, 0.05).is_anomaly for calibration in (before, after)]
    assert flagged[0].sum() > flagged[1].sum()


def test_labelled_anomalies_are_judged_and_weigh_the_parts(artifact: Artifact, known: Dataset) -> None:
    """The figures are those of items that chose no weights; learnt weights are in the manifest and in the scores."""
    labelled = labelled_items(known, None, 0)
    assert labelled.name == "digits"
    normal = replace(known, items=known.items[~labelled.odd], labels=None, label_names=())
    ref, judged = recalibrate(artifact, normal, "low digits", labelled)
    made = open_artifact(str(ref), ref.path.parent.parent)
    assert judged is not None
    scores = scores_of(ExportedModule(made.model), to_float(known.items), made.manifest.fusion)
    assert judged.auroc == auroc(labelled.odd[~labelled.chooses], scores[~labelled.chooses])
    assert judged.auroc > 0.7
    assert 0 < judged.best_f1 <= 1
    assert made.manifest.metrics["labelled_auroc"].value == pytest.approx(judged.auroc)
    escapes = [trade.escape for trade in judged.trades]
    overkills = [trade.overkill for trade in judged.trades]
    assert escapes == sorted(escapes, reverse=True)
    assert overkills == sorted(overkills)
    calibration = made.calibration()
    assert calibration is not None
    expected = scores_of(ExportedModule(made.model), to_float(normal.items), made.manifest.fusion)
    np.testing.assert_array_equal(calibration.scores, np.sort(expected))
    if made.manifest.fusion is not None:
        assert "labelled anomalies" in made.manifest.fusion.source
        assert len(made.manifest.fusion.weights) == len(made.manifest.components)


def test_weights_follow_the_part_that_tells(artifact: Artifact, digits: Dataset) -> None:
    """Where one part alone tells anomalies from normal items, it gets the weight."""
    from training.labelled import Labelled, learn_weights

    class Told(ExportedModule):
        def __init__(self) -> None:
            pass

        def outputs(self, method: str, *inputs: torch.Tensor, batch_size: int = 256) -> list[torch.Tensor]:
            del method, batch_size
            noise = torch.rand(len(inputs[0]), generator=torch.Generator().manual_seed(0)) * 3
            parts = torch.stack([noise, inputs[0].flatten(1)[:, 0]], 1)
            return [parts.mean(1), parts]

    odd = np.arange(200) % 4 == 0
    items = torch.from_numpy(odd.astype(np.float32))[:, None] + torch.rand(200, 1)
    fusion = learn_weights(Told(), Labelled(items, odd, np.ones(200, dtype=bool), "told"))
    assert fusion is not None
    assert fusion.weights[1] > fusion.weights[0]
    parts = np.float32([[1, 3], [2, 4]])
    weights = np.array(fusion.weights) / sum(fusion.weights)
    np.testing.assert_allclose(fusion.fuse(parts), parts @ weights, rtol=1e-6)


def test_labels_that_do_not_help_are_refused(known: Dataset, tmp_path: Path) -> None:
    """Without classes, without a normal one, or with too few of a kind there is one clear error."""
    del tmp_path
    with pytest.raises(TrainingError, match="expected classes"):
        labelled_items(replace(known, labels=None, label_names=()), None, 0)
    with pytest.raises(TrainingError, match="expected one of good, normal, ok"):
        labelled_items(replace(known, label_names=("fine", "bad")), None, 0)
    with pytest.raises(TrainingError, match="expected perfect among the classes"):
        labelled_items(known, "perfect", 0)
    few = torch.cat([torch.arange(3), torch.full((40,), 0)])
    bad = replace(known, items=known.items[: len(few)], labels=(few > 0).long())
    with pytest.raises(TrainingError, match="at least 10 items of good and of other classes"):
        labelled_items(bad, None, 0)
