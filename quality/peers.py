"""Two presets beside pythae's and PyOD's models: the same network, data and seconds of one core."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import python_of, version_of
from quality.models import FOLDER, SEED, part, trained_network
from training.autoencoders import Autoencoder
from training.losses import mean_squared_error
from training.noise import Noise, generator
from training.presets import get_preset, override

PRESETS = {"autoencoder": "basic", "vae": "vae"}
EPOCHS = 8
ONE_CLASS_EPOCHS = 45
NORMAL_DIGIT = 8
"""The hardest of the ten in pilots, chosen before this was measured."""


def trained(kind: str, x: Tensor, epochs: int) -> tuple[Autoencoder, float]:
    """A preset's network trained on float pictures, and the seconds of CPU that this took."""
    preset = override(get_preset(PRESETS[kind]), [f"epochs={epochs}"])
    items = (x * 255).round().to(torch.uint8)
    start = time.process_time()
    network = trained_network(preset, items, SEED)
    return network, time.process_time() - start


def peer(package: str, kind: str, x: Tensor, test: Tensor, seconds: float) -> dict[str, Any]:
    """What the peer reached with so many seconds of CPU. Raises benchmarks.peers.PeerUnavailable."""
    python = python_of(package, (FOLDER / "venvs").resolve())
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, train=x.flatten(1).numpy(), test=test.flatten(1).numpy())
        command = [str(python), str(Path(__file__).with_name("peer_training.py")), package, kind, str(data)]
        done = subprocess.run([*command, str(seconds)], check=True, capture_output=True, text=True, cwd=folder)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"version": version_of(package, python)}


@torch.inference_mode()
def mse(network: Autoencoder, test: Tensor) -> float:
    """Of the reconstruction, per pixel."""
    errors = [(network.reconstruct(x) - x).square().flatten(1).mean(1) for x in torch.split(test, 500)]
    return float(torch.cat(errors).double().mean())


@torch.inference_mode()
def negative_elbo(network: Autoencoder, test: Tensor) -> float:
    """With one posterior draw per picture, grey levels as Bernoulli means, in nats."""
    noise = Noise(generator(0, "peers"))
    losses = [network.loss(x, None, x, noise) for x in torch.split(test, 500)]
    return float(torch.stack(losses).double().mean())


def auroc(scores: Any, is_normal: Tensor) -> float:
    """That a strange picture scores higher than a normal one."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(~is_normal.numpy(), np.asarray(scores)))


@torch.inference_mode()
def scores(network: Autoencoder, test: Tensor) -> Any:
    """Reconstruction errors, (items,): what the peer scores by, too."""
    return torch.cat([mean_squared_error(network.reconstruct(x), x) for x in torch.split(test, 500)]).numpy()


@dataclass(frozen=True)
class Comparison:
    """One figure of a preset and of a peer after the same seconds of one core."""

    measure: str
    unit: str
    ours: float
    theirs: float
    less_is_better: bool
    peer: str  # with its version
    protocol: str

    @property
    def is_better(self) -> bool:
        """Whether the preset is ahead."""
        return self.ours < self.theirs if self.less_is_better else self.ours > self.theirs


def comparisons() -> list[Comparison]:
    """All of them. Raises benchmarks.peers.PeerUnavailable."""
    (x, y), (test, test_y) = part("train"), part("test")
    rows = []
    for kind, preset in PRESETS.items():
        network, seconds = trained(kind, x, EPOCHS)
        found = peer("pythae", kind, x, test, seconds)
        name = f"pythae {found['version']}"
        how = (
            f"the same network, {seconds:.0f} s of one core each: {EPOCHS * len(x):,} items, the peer "
            f"{found['items']:,}; the peer with its own trainer, Adam 1e-3, batch 128"
        )
        rows.append(Comparison(f"test MSE, `{preset}`", "", mse(network, test), found["mse"], True, name, how))
        if kind == "vae":
            elbo = negative_elbo(network, test)
            rows.append(
                Comparison(f"−ELBO on grey levels, `{preset}`", "nats", elbo, found["negative_elbo"], True, name, how)
            )
    normal, is_normal = x[y == NORMAL_DIGIT], test_y == NORMAL_DIGIT
    for kind, preset in PRESETS.items():
        network, seconds = trained(kind, normal, ONE_CLASS_EPOCHS)
        found = peer("pyod", kind, normal, test, seconds)
        how = (
            f"the same layers, {seconds:.0f} s of one core each: {ONE_CLASS_EPOCHS * len(normal):,} items, the peer "
            f"{found['items']:,}; trained on digit {NORMAL_DIGIT}, the other digits are strange; scores are "
            "reconstruction errors, the peer with its own defaults"
        )
        ours, theirs = auroc(scores(network, test), is_normal), auroc(found["scores"], is_normal)
        rows.append(
            Comparison(f"AUROC, `{preset}`, one class", "", ours, theirs, False, f"PyOD {found['version']}", how)
        )
    return rows
