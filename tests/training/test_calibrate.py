from __future__ import annotations

import io

import numpy as np
import torch

from training.calibrate import calibrate
from training.data import Dataset, to_float
from training.export import ExportedModule, export
from training.noise import generator
from training.presets import PRESETS, build_network


def test_calibration_is_the_exported_modules_scores(digits: Dataset) -> None:
    """The stored scores are the served method's, sorted, and the entry describes them."""
    network = build_network(PRESETS["basic"], (1, 8, 8), seed=0)
    exported = ExportedModule(export(network, to_float(digits.items[:64]), generator(0, "check")))
    images = digits.items[:99]
    calibration, entry, data = calibrate(exported, images, "digits, calibration part")
    stored = np.load(io.BytesIO(data), allow_pickle=False)
    expected = np.sort(exported.run("anomaly_score", to_float(images)).numpy())
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, expected)
    assert (entry.id, entry.count, entry.source) == (calibration.id, 99, "digits, calibration part")


def test_verdicts_flag_the_stated_share_of_the_calibration_items(digits: Dataset) -> None:
    """At 10 % of 99 items, the 9 highest scores lie above the threshold; a score above all has p = 1/100."""
    network = build_network(PRESETS["basic"], (1, 8, 8), seed=0)
    exported = ExportedModule(export(network, to_float(digits.items[:64]), generator(0, "check")))
    calibration, _, _ = calibrate(exported, digits.items[:99], "digits")
    verdicts = calibration.verdicts(calibration.scores, 0.1)
    assert int(verdicts.is_anomaly.sum()) == 9
    highest = calibration.verdicts(np.array([calibration.scores[-1] + 1], dtype=np.float32), 0.01)
    assert highest.p_value.tolist() == [0.01]
    assert highest.is_anomaly.tolist() == [True]


def test_noise_scores_above_digits(digits: Dataset) -> None:
    """What the network never saw scores higher than what it was trained on, for a network that reconstructs."""
    from training.corruptions import Corruption
    from training.loop import Optimisation, train
    from training.progress import Silent

    network, _ = train(
        build_network(PRESETS["basic"], (1, 8, 8), seed=0),
        digits.items[:1000],
        digits.items[1000:1100],
        Optimisation(epochs=5, batch_size=50),
        Corruption(),
        seed=0,
        device=torch.device("cpu"),
        progress=Silent(),
    )
    exported = ExportedModule(export(network, to_float(digits.items[:64]), generator(0, "check")))
    calibration, _, _ = calibrate(exported, digits.items[1100:1400], "digits")
    noise = torch.rand(50, 1, 8, 8, generator=generator(0, "noise"))
    scores = exported.run("anomaly_score", noise).numpy()
    assert calibration.verdicts(scores, 0.01).is_anomaly.mean() > 0.9
