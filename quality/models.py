"""The networks that are measured: presets with the settings fixed on the validation part, before any test figure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from app.artifacts.store import Artifact, list_artifacts
from training.autoencoders import Autoencoder
from training.checkpoints import CheckpointFile
from training.data import default_data_root, load_dataset
from training.dataset import Dataset, to_float
from training.loop import train
from training.presets import Preset, build_network, get_preset, override
from training.progress import Lines, Silent
from training.run import make_artifact, open_artifact
from training.splits import Split, split_dataset

FOLDER = Path(".quality")
STORE = FOLDER / "store"
SEED = 0
console = Console()


def saved_results(file: Path) -> dict[str, Any]:
    """What was measured so far, by part."""
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return results


def trained_network(preset: Preset, items: Tensor, seed: int) -> Autoencoder:
    """The preset's network after training on uint8 pictures of digits, (n, 1, 28, 28): neither split nor calibrated."""
    network, _ = train(
        build_network(preset, (1, 28, 28), seed),
        items,
        items[:100],
        preset.optimisation,
        preset.corruption,
        seed=seed,
        device=torch.device("cpu"),
        progress=Silent(),
    )
    return network


@dataclass(frozen=True)
class Measured:
    """A preset with settings, trained on MNIST's training part with seed 0 on one thread."""

    name: str
    preset: str
    settings: tuple[str, ...] = ()
    max_minutes: float | None = None

    def artifact(self) -> Artifact:
        """The trained artifact: from an earlier run if there is one, else trained now, from its checkpoint if any."""
        if not any(ref.name == self.name for ref in list_artifacts(STORE)):
            FOLDER.mkdir(exist_ok=True)
            checkpoint = FOLDER / f"{self.name}.pt"
            make_artifact(
                override(get_preset(self.preset), self.settings),
                mnist(),
                name=self.name,
                store=STORE,
                seed=SEED,
                device=torch.device("cpu"),
                progress=Lines(console),
                checkpoints=CheckpointFile(checkpoint),
                max_minutes=self.max_minutes,
            )
            checkpoint.unlink()
        return open_artifact(self.name, STORE)

    @property
    def words(self) -> str:
        """How it was made."""
        limit = "" if self.max_minutes is None else f", at most {self.max_minutes:g} minutes"
        return f"`{self.preset}`" + (f" with {', '.join(self.settings)}" if self.settings else "") + limit


@cache
def mnist() -> Dataset:
    """MNIST from HOURGLASS_DATA_ROOT."""
    return load_dataset("mnist", default_data_root())


@cache
def split() -> Split:
    """Its parts, as in every training with seed 0."""
    return split_dataset(mnist(), SEED)


def part(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float pictures and labels of a part."""
    dataset, indices = mnist(), getattr(split(), name)
    if dataset.labels is None:
        raise ValueError("mnist: expected labels, found none")
    return to_float(dataset.items[indices]), dataset.labels[indices]


_MLP = (
    "hidden_sizes=[500,250]",
    "optimisation.epochs=10",
    "optimisation.batch_size=256",
    "optimisation.bfloat16=true",
)

TUTORIAL = Measured("q-tutorial", "basic-tutorial")
KNN_2 = Measured("q-knn-2", "basic", (*_MLP, "latent_dim=2"))
KNN_8 = Measured("q-knn-8", "basic", (*_MLP, "latent_dim=8"))
DENSE_32 = Measured("q-basic", "basic")
VAE = Measured(
    "q-vae",
    "vae",
    (
        "hidden_sizes=[500,500]",
        "latent_dim=40",
        "likelihood.binarise=true",
        "bottleneck.warmup_fraction=0.08",
        "optimisation.epochs=70",
        "optimisation.learning_rate=1e-3",
        "optimisation.bfloat16=true",
    ),
)
TOP_K = Measured("q-topk", "sparse-topk")
U_NET = Measured("q-unet-denoiser", "unet-denoiser")
SAMPLES = DENSE_32
VAE_FAMILY = Measured("q-vae-preset", "vae", ("optimisation.epochs=15",))


def _family(preset: str, epochs: int) -> Measured:
    """A preset at its own settings but for fewer epochs: half a minute of a free core or so."""
    return Measured(f"q-family-{preset}", preset, (f"optimisation.epochs={epochs}",))


# 49 places with 8 bits each are worth 49 components of 8 bits.
FAMILIES: tuple[tuple[Measured, int, str], ...] = (
    (TUTORIAL, 32, ""),
    (DENSE_32, 32, ""),
    (_family("denoising", 3), 64, ""),
    (_family("vae-tutorial", 5), 20, ""),
    (VAE_FAMILY, 16, ""),
    (_family("beta-vae", 6), 10, ""),
    (_family("iwae", 15), 40, ""),
    (_family("conv", 2), 64, ""),
    (_family("conv-vae", 3), 32, ""),
    (_family("contractive", 4), 32, ""),
    (_family("memory", 3), 32, ""),
    (TOP_K, 25, ", as many as units are active"),
    (_family("vq-vae", 2), 49, ", unrounded, as the code has bytes"),
)
"""Each with the components of PCA that it is compared with, and why so many."""
