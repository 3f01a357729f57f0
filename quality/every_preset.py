"""Every preset on every kind of data that it takes: trained for a minute, verified, served over HTTP; others refused.

Usage: python -m quality.every_preset [MINUTES]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from app.artifacts.manifest import Capability
from app.artifacts.store import Artifact
from training.autoencoders import kind_of
from training.data import load_dataset
from training.dataset import Dataset, to_float
from training.errors import TrainingError
from training.export import ExportedModule
from training.presets import PRESETS, Preset, override
from training.progress import Silent
from training.run import check_fits, make_artifact, open_artifact, verify_artifact

TOLERANCE = 1e-5
BATCH_SIZES = (1, 2, 7, 64)
ANSWERS = {
    Capability.ENCODE: "latent",
    Capability.RECONSTRUCT: "reconstruction",
    Capability.DENOISE: "denoised",
    Capability.INPAINT: "inpainted",
    Capability.ANOMALY_SCORE: "score",
}
console = Console()


def photo_folder(folder: Path) -> Path:
    """100 colour JPEGs of mixed sizes in two sub-folders: smooth coloured shapes."""
    random = np.random.default_rng(0)
    for i in range(100):
        label = folder / ("stripes", "spots")[i % 2]
        label.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in random.integers(40, 90, 2))
        y, x = np.mgrid[0:height, 0:width] / 12
        wave = np.sin(x + y + random.uniform(0, 6)) if i % 2 else np.sin(x) * np.sin(y + random.uniform(0, 6))
        colour = random.uniform(40, 120, 3)
        pixels = 128 + wave[..., None] * colour + random.normal(0, 6, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(label / f"{i}.jpg", quality=90)
    return folder


def record_file(path: Path) -> Path:
    """scikit-learn's breast-cancer data as a table with a column `label`."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  # slow to import

    bunch = load_breast_cancer()
    header = ",".join([*(str(name).replace(" ", "_") for name in bunch.feature_names), "label"])
    names = [str(bunch.target_names[target]) for target in bunch.target]
    rows = [",".join([*map(repr, map(float, row)), name]) for row, name in zip(bunch.data, names, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@contextmanager
def served(store: Path) -> Iterator[httpx.Client]:
    """A client of a server process over the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HOURGLASS_MODELS_STORE": str(store), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "app", "serve", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                wait_until_ready(client, process)
                yield client
        finally:
            process.terminate()
            process.wait(30)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Until every artifact is loaded or refused. Raises RuntimeError after two minutes, or if the server ends."""
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            if client.get("/startupz").json().get("done"):
                return
        except (httpx.TransportError, ValueError):
            pass
        time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


def largest_difference(client: httpx.Client, artifact: Artifact, items: Tensor) -> float:
    """Between the answers over HTTP and the exported module's, over all methods and batch sizes.

    Of records and latent vectors in units of each number's size: they have units of their own.
    """
    exported = ExportedModule(artifact.model)
    mask = (torch.arange(items[0, :1].numel()) % 3 == 0).float().view(items[0, :1].shape)
    if items.dim() == 2:
        mask = (torch.arange(items.shape[1]) % 3 == 0).float()
    masks = mask.expand(len(items), *mask.shape)
    worst = 0.0
    for capability, field in ANSWERS.items():
        if capability not in artifact.manifest.capabilities:
            answer = client.post(
                f"/{capability.replace('_', '-')}?model={artifact.ref.name}", json=body(items[:1], masks)
            )
            if answer.status_code != 409:
                raise RuntimeError(f"{artifact.ref} {capability}: expected 409, found {answer.status_code}")
            continue
        inputs = (items, masks) if capability == Capability.INPAINT else (items,)
        expected = exported.run(capability, *inputs).numpy()
        for size in BATCH_SIZES:
            route = f"/{capability.replace('_', '-')}?model={artifact.ref.name}"
            sent = body(items[:size], masks[:size] if capability == Capability.INPAINT else None)
            answer = client.post(route, json=sent)
            if answer.status_code != 200:
                raise RuntimeError(f"{artifact.ref} {capability}: {answer.status_code}: {answer.text[:300]}")
            found = np.array([result[field] for result in answer.json()["results"]])
            own_units = items.dim() == 2 or capability == Capability.ENCODE
            scale = np.maximum(1, np.abs(expected).max(0)) if own_units else 1
            worst = max(worst, float((np.abs(found - expected[:size]) / scale).max()))
    if Capability.SAMPLE in artifact.manifest.capabilities:
        drawn = {"count": 2, "seed": 1} | ({"label": artifact.manifest.labels[-1]} if artifact.manifest.labels else {})
        answer = client.post(f"/sample?model={artifact.ref.name}", json=drawn)
        if answer.status_code != 200:
            raise RuntimeError(f"{artifact.ref} sample: {answer.status_code}: {answer.text[:300]}")
    return worst


def body(items: Tensor, masks: Tensor | None) -> dict[str, object]:
    """The JSON request for items, with masks where they are given."""
    return {"instances": items.tolist()} | (
        {} if masks is None else {"masks": masks[:, 0].tolist() if masks.dim() == 4 else masks.tolist()}
    )


def refused(preset_name: str, dataset: Dataset) -> str:
    """How the preset refuses the data, before anything is trained."""
    try:
        check_fits(PRESETS[preset_name], dataset)
    except TrainingError as error:
        return str(error)
    raise RuntimeError(f"{preset_name}: expected a refusal of {dataset.name}")


def main() -> None:
    """Trains, verifies, serves, and prints a table; in the end an error if anything was wrong."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photos = load_dataset(str(photo_folder(folder / "photos")), folder)
        records = load_dataset(str(record_file(folder / "records.csv")), folder)
        datasets = {"digits": load_dataset("digits", folder), "photos": photos, "records": records}
        outcomes: dict[tuple[str, str], tuple[str, str]] = {}
        made: list[tuple[str, str, str]] = []
        for preset in PRESETS.values():
            for data, dataset in datasets.items():
                if kind_of(dataset.item_shape) not in preset.takes:
                    outcomes[preset.name, data] = (f"refused: {refused(preset.name, dataset)}", "")
                    continue
                name = f"{preset.name}-{data}"
                try:
                    train_and_verify(preset, dataset, name, folder / "store", minutes)
                except (TrainingError, RuntimeError) as error:
                    outcomes[preset.name, data] = (f"WRONG: {error}", "")
                    continue
                console.print(f"{name}: trained and verified")
                made.append((preset.name, data, name))
        with served(folder / "store") as client:
            for preset_name, data, name in made:
                items = to_float(datasets[data].items[: max(BATCH_SIZES)])
                try:
                    difference = largest_difference(client, open_artifact(name, folder / "store"), items)
                    outcome = "trained, verified, served" if difference <= TOLERANCE else "WRONG: differs over HTTP"
                    outcomes[preset_name, data] = (outcome, f"{difference:.1g}")
                except RuntimeError as error:
                    outcomes[preset_name, data] = (f"WRONG: {error}", "")
    table = Table(title=f"Every preset, at most {minutes:g} minutes each")
    for heading in ("preset", "data", "outcome", "largest difference over HTTP"):
        table.add_column(heading)
    for preset in PRESETS.values():
        for data in datasets:
            table.add_row(preset.name, data, *outcomes[preset.name, data])
    console.print(table)
    sys.exit(any(outcome.startswith("WRONG") for outcome, _ in outcomes.values()))


def train_and_verify(preset: Preset, dataset: Dataset, name: str, store: Path, minutes: float) -> None:
    """Makes an artifact. Raises TrainingError, and RuntimeError if it does not pass its self-test."""
    make_artifact(
        override(preset, ["optimisation.epochs=1000"]),
        dataset,
        name=name,
        store=store,
        seed=0,
        device=torch.device("cpu"),
        progress=Silent(),
        max_minutes=minutes,
    )
    if not all(d.within_tolerance for d in verify_artifact(open_artifact(name, store))):
        raise RuntimeError("does not pass its self-test")


if __name__ == "__main__":
    main()
