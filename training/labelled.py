"""What labelled anomalies tell of a score: how well it ranks them, what each rate lets slip, which weights are best."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.artifacts.calibration import Calibration, RateTooFine
from app.artifacts.manifest import Capability, FusionEntry, Metric
from training.dataset import Dataset, to_float
from training.errors import TrainingError
from training.export import ExportedModule
from training.noise import generator

NORMAL_NAMES = ("good", "normal", "ok")
RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
STEPS = 4  # of each weight, from nothing to this
FEWEST = 5  # of each kind, in each half
LEAST_GAIN = 0.002  # in AUROC: what is less is chance
Bools = NDArray[np.bool_]
Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Trade:
    """What a false-positive rate costs: normal items flagged (overkill), anomalies not flagged (escape)."""

    target_fpr: float
    overkill: float
    escape: float


@dataclass(frozen=True)
class Judged:
    """How a score does on labelled items that had no say in it."""

    anomalies: int
    normals: int
    auroc: float
    average_precision: float
    best_f1: float
    trades: tuple[Trade, ...]


@dataclass(frozen=True)
class Labelled:
    """Items of which it is known what is normal, in two halves: one to choose weights on, one to judge by."""

    items: Tensor
    odd: Bools
    chooses: Bools
    name: str


def labelled_items(dataset: Dataset, normal: str | None, seed: int) -> Labelled:
    """A data set with classes as labelled items, halved at random within the normal and within the other ones.

    Args:
        normal: the class of normal items, by default one of NORMAL_NAMES.

    Raises TrainingError without classes, without that one, or with too few items of a kind.
    """
    if dataset.labels is None:
        raise TrainingError(f"labelled {dataset.name}: expected classes, such as sub-folders, found none")
    names = [normal] if normal is not None else [name for name in NORMAL_NAMES if name in dataset.label_names]
    if not names or names[0] not in dataset.label_names:
        expected = normal or f"one of {', '.join(NORMAL_NAMES)} (or --normal)"
        raise TrainingError(f"labelled {dataset.name}: expected {expected} among the classes {dataset.label_names}")
    odd = (dataset.labels != dataset.label_names.index(names[0])).numpy()
    chooses = np.zeros(len(odd), dtype=bool)
    for kind in (odd, ~odd):
        where = np.flatnonzero(kind)
        if len(where) < 2 * FEWEST:
            raise TrainingError(
                f"labelled {dataset.name}: expected at least {2 * FEWEST} items of {names[0]} and of other classes, "
                f"found {int((~odd).sum())} and {int(odd.sum())}"
            )
        order = torch.randperm(len(where), generator=generator(seed, "labelled")).numpy()
        chooses[where[order[: len(where) // 2]]] = True
    return Labelled(dataset.items, odd, chooses, dataset.name)


def learn_weights(exported: ExportedModule, labelled: Labelled) -> FusionEntry | None:
    """The weights of the score's parts that rank the choosing half best; None where they hardly gain on the module's.

    By trying all weights of a few steps, so that nothing is fitted that few anomalies could not support.
    """
    outputs = exported.outputs(Capability.ANOMALY_SCORE, to_float(labelled.items))
    if len(outputs) < 2 or outputs[1].shape[1] < 2:
        return None
    own, parts = outputs[0].numpy()[labelled.chooses], outputs[1].numpy()[labelled.chooses]
    odd = labelled.odd[labelled.chooses]
    candidates = [weights for weights in itertools.product(range(STEPS + 1), repeat=parts.shape[1]) if any(weights)]
    # Of equally good ones the most even, which leans on no part alone.
    best = max(candidates, key=lambda weights: (round(auroc(odd, parts @ np.array(weights)), 6), -np.std(weights)))
    gained = auroc(odd, parts @ np.array(best)) - auroc(odd, own)
    if gained < LEAST_GAIN:
        return None
    return FusionEntry(
        weights=tuple(float(weight) for weight in best),
        source=f"{labelled.name}: {int(odd.sum())} labelled anomalies and {int((~odd).sum())} normal items",
    )


def judge(scores: Scores, labelled: Labelled, calibration: Calibration) -> Judged:
    """The judging half's figures, by scores of all labelled items."""
    from sklearn.metrics import average_precision_score, precision_recall_curve  # noqa: PLC0415  # slow to import

    scores, odd = scores[~labelled.chooses], labelled.odd[~labelled.chooses]
    precision, recall, _ = precision_recall_curve(odd, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    trades = []
    for rate in RATES:
        try:
            flagged = calibration.verdicts(scores.astype(np.float32), rate).is_anomaly
        except RateTooFine:
            continue
        trades.append(Trade(rate, float(flagged[~odd].mean()), float((~flagged[odd]).mean())))
    return Judged(
        anomalies=int(odd.sum()),
        normals=int((~odd).sum()),
        auroc=auroc(odd, scores),
        average_precision=float(average_precision_score(odd, scores)),
        best_f1=float(f1.max()),
        trades=tuple(trades),
    )


def metrics_of(judged: Judged, labelled: Labelled) -> dict[str, Metric]:
    """The figures as the manifest states them."""
    protocol = f"{labelled.name}, {judged.anomalies} anomalies and {judged.normals} normal items that chose no weights"
    return {
        f"labelled_{name}": Metric(value=value, unit="0 to 1", protocol=protocol)
        for name, value in (
            ("auroc", judged.auroc),
            ("average_precision", judged.average_precision),
            ("best_f1", judged.best_f1),
        )
    }


def auroc(odd: Bools, scores: Scores) -> float:
    """How often an anomaly scores above a normal item, ties counting half."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  # slow to import

    return float(roc_auc_score(odd, scores))
