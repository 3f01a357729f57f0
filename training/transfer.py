"""A small classifier on an artifact's latent vectors: what labels are worth once an encoder has seen the items."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from app.artifacts.manifest import Capability
from app.artifacts.store import Artifact
from training.dataset import Dataset, to_float
from training.errors import TrainingError
from training.export import ExportedModule, export_classifier
from training.noise import generator
from training.splits import split_dataset

CLASSIFIER_FILE = "classifier.pt"
FACTS_FILE = "classifier.json"
WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
EPOCHS = 30
FEWEST_STEPS = 600
BATCH_SIZE = 250
LEARNING_RATE = 2e-3


class Head(nn.Module):
    """Latent vectors to logits: linear, or with one hidden layer."""

    if TYPE_CHECKING:  # TorchScript would take the annotation for a type of its own
        scale: Tensor

    def __init__(self, features: int, classes: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(features))
        hidden = [nn.Linear(features, hidden_size), nn.GELU()] if hidden_size else []
        self.layers = nn.Sequential(*hidden, nn.Linear(hidden_size or features, classes))

    def forward(self, z: Tensor) -> Tensor:
        """(batch, features) → (batch, classes)."""
        return self.layers(z / self.scale)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Classifier:
    """A head chosen on validation items, and how good it is beside the same head on other features."""

    head: Head
    weight_decay: float
    labelled: int  # training items
    accuracy: float  # of the test part
    baselines: dict[str, float]


def train_head(
    z: Tensor, labels: Tensor, classes: int, *, weight_decay: float, hidden_size: int = 0, alike: bool = False
) -> Head:
    """A head fitted on float features, (items, features): AdamW on the cross-entropy, cosine schedule, seed 0.

    Features are brought to the same deviation, or all divided `alike` by the average one: of sparse codes the first
    would blow up units that are seldom active.
    """
    noise = generator(0, "linear probe")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(z.shape[1], classes, hidden_size)
    variances = z.var(0, correction=0)
    head.scale.copy_((variances.mean() if alike else variances).sqrt().clamp_min(1e-3))
    steps_per_epoch = math.ceil(len(z) / BATCH_SIZE)
    epochs = max(EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))
    optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps_per_epoch)
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(len(z), generator=noise), BATCH_SIZE):
            loss = nn.functional.cross_entropy(head(z[indices]), labels[indices])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimiser.step()
            schedule.step()
    return head.eval()


@torch.inference_mode()
def accuracy(head: Head, z: Tensor, labels: Tensor) -> float:
    """Share of items that the head names rightly."""
    return float((head(z).argmax(1) == labels).double().mean())


def finetune(
    artifact: Artifact, dataset: Dataset, *, hidden_size: int = 0, labels_per_class: int | None = None
) -> Classifier:
    """A classifier on the artifact's latent vectors; encoder and artifact stay as they are.

    The data is split as the artifact's own was: of the same data, neither encoder nor head has seen the test part.

    Args:
        hidden_size: of the head's hidden layer; 0: it is linear.
        labels_per_class: so many labelled training items of each class at most, drawn with seed 0; None: all.

    Raises TrainingError if the artifact gives no latent vectors, or the items have no labels or another shape.
    """
    if Capability.ENCODE not in artifact.manifest.capabilities:
        raise TrainingError(f"{artifact.ref}: {artifact.manifest.unsupported.get(Capability.ENCODE, 'cannot encode')}")
    if dataset.item_shape != artifact.manifest.input.shape:
        raise TrainingError(
            f"data {dataset.name}: expected items of {artifact.manifest.input.shape}, found {dataset.item_shape}"
        )
    if dataset.labels is None or len(dataset.label_names) < 2:
        raise TrainingError(
            f"data {dataset.name}: expected labels of two classes or more (sub-folders, a column `label`), found "
            f"{'none' if dataset.labels is None else 'one class'}"
        )
    labels, classes = dataset.labels, len(dataset.label_names)
    split = split_dataset(dataset, artifact.manifest.training.seed)
    chosen = split.train if labels_per_class is None else _few(split.train, labels, classes, labels_per_class)
    parts = (chosen, split.validation, split.test)
    exported = ExportedModule(artifact.model)
    items = [to_float(dataset.items[part]) for part in parts]
    of_parts = [labels[part] for part in parts]
    codes = [exported.run(Capability.ENCODE, x) for x in items]
    head, weight_decay = _best_head(codes, of_parts, classes, hidden_size)
    raw = [x.flatten(1) for x in items]
    size = codes[0].shape[1]
    features = {f"{raw[0].shape[1]} raw values": raw}
    if size < min(raw[0].shape):
        features[f"PCA of {size} numbers"] = _principal_components(raw, size)
    baselines = {}
    for words, z in features.items():
        other, _ = _best_head(z, of_parts, classes, hidden_size)
        baselines[words] = accuracy(other, z[2], of_parts[2])
    return Classifier(head, weight_decay, len(chosen), accuracy(head, codes[2], of_parts[2]), baselines)


def write_classifier(folder: Path, classifier: Classifier, artifact: Artifact, dataset: Dataset) -> None:
    """Writes CLASSIFIER_FILE, a TorchScript module from items to class probabilities, and FACTS_FILE beside it.

    Raises TrainingError if the folder cannot be made.
    """
    facts = {
        "artifact": str(artifact.ref),
        "model_sha256": artifact.manifest.files[artifact.manifest.model_file].sha256,
        "labels": list(dataset.label_names),
        "input_shape": list(dataset.item_shape),
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "labelled_items": classifier.labelled,
        "weight_decay": classifier.weight_decay,
        "test_accuracy": classifier.accuracy,
        "test_accuracy_of_the_same_head_on": classifier.baselines,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CLASSIFIER_FILE).write_bytes(export_classifier(artifact.model, classifier.head))
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise TrainingError(f"out {folder}: expected a folder to write to: {error.strerror}") from error


def _best_head(z: list[Tensor], labels: list[Tensor], classes: int, hidden_size: int) -> tuple[Head, float]:
    """The head whose weight decay does best on validation items, the larger one where two are as good."""
    heads = {
        decay: train_head(z[0], labels[0], classes, weight_decay=decay, hidden_size=hidden_size)
        for decay in WEIGHT_DECAYS
    }
    best = max(heads, key=lambda decay: (accuracy(heads[decay], z[1], labels[1]), decay))
    return heads[best], best


def _few(indices: Tensor, labels: Tensor, classes: int, per_class: int) -> Tensor:
    order = indices[torch.randperm(len(indices), generator=generator(0, "labelled items"))]
    return torch.cat([order[labels[order] == label][:per_class] for label in range(classes)])


def _principal_components(parts: list[Tensor], size: int) -> list[Tensor]:
    from sklearn.decomposition import PCA  # noqa: PLC0415  # slow to import

    fitted = PCA(size, random_state=0).fit(parts[0].numpy())
    return [torch.from_numpy(fitted.transform(x.numpy())).float() for x in parts]
