"""The scikit-learn estimators keep scikit-learn's rules, and wrap artifacts faithfully."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from app.artifacts.manifest import Capability
from training.data import Dataset
from training.dataset import to_float
from training.estimators import AutoencoderOutlierDetector, AutoencoderTransformer
from training.export import ExportedModule
from training.run import open_artifact

SMALL = ("hidden_sizes=[8]", "optimisation.epochs=2", "ema_decay=0")


@pytest.mark.filterwarnings("ignore")  # the checks themselves warn of estimators without what they need not have
@pytest.mark.parametrize("estimator", [AutoencoderTransformer, AutoencoderOutlierDetector])
def test_check_estimator_passes(estimator: type[Any]) -> None:
    """scikit-learn's own checks, all of them."""
    results = check_estimator(estimator(settings=SMALL), on_skip=None, on_fail="raise")
    assert sum(result["status"] == "passed" for result in results) > 30


def test_transformer_answers_as_the_artifact(tiny_store: Path, digits: Dataset) -> None:
    """Rows of pixels become the artifact's latent vectors and come back as its reconstruction."""
    x = to_float(digits.items[:50]).flatten(1)
    transformer = AutoencoderTransformer("tiny-variational", store=tiny_store)
    z = transformer.fit_transform(x.numpy())
    exported = ExportedModule(open_artifact("tiny-variational", tiny_store).model)
    items = x.view(-1, 1, 8, 8)
    np.testing.assert_allclose(z, exported.run(Capability.ENCODE, items).numpy(), atol=1e-5)
    back = transformer.inverse_transform(z)
    np.testing.assert_allclose(back, exported.run(Capability.RECONSTRUCT, items).flatten(1).numpy(), atol=1e-5)
    again = pickle.loads(pickle.dumps(transformer))
    np.testing.assert_array_equal(again.transform(x.numpy()), z)


def test_detector_judges_as_the_artifact(tiny_store: Path, digits: Dataset) -> None:
    """The share of normal items flagged is the calibration's; a white picture is an outlier."""
    x = to_float(digits.items).flatten(1).numpy()
    detector = AutoencoderOutlierDetector("tiny-variational", store=tiny_store, contamination=0.1).fit(x[:20])
    artifact = open_artifact("tiny-variational", tiny_store)
    calibration = artifact.calibration()
    assert calibration is not None
    scores = -detector.score_samples(x)
    verdicts = calibration.verdicts(scores, 0.1)
    np.testing.assert_array_equal(detector.predict(x) == -1, verdicts.is_anomaly)
    assert detector.predict(np.ones((1, 64))) == -1


@pytest.mark.parametrize(
    ("x", "message"),
    [(np.zeros((4, 30)), "expected rows of 64 values"), (np.full((4, 64), 255.0), r"expected values in \(0.0, 1.0\)")],
)
def test_refuses_what_the_artifact_does_not_take(x: Any, message: str, tiny_store: Path) -> None:
    """Another shape or another range is named before anything is computed."""
    with pytest.raises(ValueError, match=message):
        AutoencoderTransformer("tiny-variational", store=tiny_store).fit(x)


def test_detector_finds_what_is_unlike_the_rest(records: Dataset) -> None:
    """Of records trained on, those far from all others are among the few flagged."""
    x = records.items.numpy()[:200].astype(np.float64)
    strange = np.concatenate([x, x[:5] + 20 * x.std(0)])
    detector = AutoencoderOutlierDetector(settings=("hidden_sizes=[16]", "epochs=30"), contamination=0.05).fit(strange)
    assert (detector.predict(strange[-5:]) == -1).all()
