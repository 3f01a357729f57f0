"""A head on an artifact's latent vectors: what it learns, what it writes, what it refuses."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.artifacts.manifest import Capability
from training.data import Dataset
from training.dataset import to_float
from training.errors import TrainingError
from training.export import ExportedModule
from training.run import open_artifact
from training.splits import split_dataset
from training.transfer import CLASSIFIER_FILE, FACTS_FILE, accuracy, finetune, train_head, write_classifier


def test_head_learns_and_is_written_whole(tiny_store: Path, digits: Dataset, tmp_path: Path) -> None:
    """The file answers for items with the encoder's and the head's probabilities, and is as good as was stated."""
    artifact = open_artifact("tiny-variational", tiny_store)
    classifier = finetune(artifact, digits)
    assert classifier.accuracy > 0.3  # four numbers after one epoch; chance is .1
    assert list(classifier.baselines) == ["64 raw values", "PCA of 4 numbers"]
    assert classifier.baselines["64 raw values"] > 0.9
    write_classifier(tmp_path / "new", classifier, artifact, digits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.jit.load(tmp_path / "new" / CLASSIFIER_FILE)
    test = split_dataset(digits, artifact.manifest.training.seed).test
    x = to_float(digits.items[test])
    with torch.inference_mode():
        found = module(x)
        expected = classifier.head(ExportedModule(artifact.model).run(Capability.ENCODE, x)).softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    facts = json.loads((tmp_path / "new" / FACTS_FILE).read_text())
    assert facts["labels"] == [str(digit) for digit in range(10)]
    assert digits.labels is not None
    assert float((found.argmax(1) == digits.labels[test]).double().mean()) == facts["test_accuracy"]


def test_few_labels_are_taken_of_each_class(tiny_store: Path, digits: Dataset) -> None:
    """So many of each class, and no more."""
    assert finetune(open_artifact("tiny-variational", tiny_store), digits, labels_per_class=3).labelled == 30


def test_a_hidden_layer_separates_what_a_linear_head_cannot() -> None:
    """Exclusive or."""
    z = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(10, 1)
    labels = (z[:, 0] != z[:, 1]).long()
    right = [accuracy(train_head(z, labels, 2, weight_decay=0.0, hidden_size=size), z, labels) for size in (0, 16)]
    assert right[0] <= 0.75
    assert right[1] == 1


def test_refusals_name_what_is_missing(tiny_store: Path, digits: Dataset, records: Dataset) -> None:
    """No labels, one class, another shape."""
    artifact = open_artifact("tiny-variational", tiny_store)
    with pytest.raises(TrainingError, match=r"expected labels of two classes or more .*, found none"):
        finetune(artifact, replace(digits, labels=None))
    with pytest.raises(TrainingError, match="found one class"):
        finetune(artifact, replace(digits, label_names=("all",), labels=torch.zeros(len(digits.items)).long()))
    with pytest.raises(TrainingError, match=r"expected items of \(1, 8, 8\), found \(30,\)"):
        finetune(artifact, records)
