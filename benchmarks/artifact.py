"""The artifacts that the benchmark serves, and the requests it sends: made here, deterministically, from no data.

Weights are random and requests are drawn: what a forward pass and a parsed number cost does not depend on their values.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import (
    CalibrationEntry,
    Capability,
    DataProvenance,
    InputSpec,
    Manifest,
    PictureSpec,
    SelfTest,
    TrainingProvenance,
)
from app.artifacts.store import write_artifact
from benchmarks.jobs import COLOUR, DIGIT, JOBS
from training.autoencoders import Autoencoder
from training.autoencoders.basic import BasicAutoencoder, BasicConfig
from training.autoencoders.convolutional import ConvolutionalAutoencoder, ConvolutionalConfig
from training.autoencoders.layers import mlp
from training.export import ExportedModule, export, method_inputs, self_test_vectors, signatures

SLOW_ROUNDS = 1500  # of a product with a 1024 × 1024 matrix: some .2 s a row
SLOW_FEATURES = 64


@dataclass(frozen=True)
class SlowConfig:
    """Rows of this autoencoder take `rounds` matrix products."""

    rounds: int


class SlowAutoencoder(Autoencoder):
    """Keeps the executor busy for some .2 s a row with almost no bytes to send: deadlines pass meanwhile."""

    config_type: ClassVar[type[Any]] = SlowConfig
    capabilities: ClassVar[tuple[Capability, ...]] = (Capability.ENCODE,)

    def __init__(self, item_shape: tuple[int, ...], config: SlowConfig) -> None:
        super().__init__()
        self.latent_dim = 4
        self.rounds = config.rounds
        self.widen = torch.nn.Linear(item_shape[0], 1024)
        self.round = torch.nn.Linear(1024, 1024)
        self.narrow = torch.nn.Linear(1024, 4)

    def encode(self, x: Tensor) -> Tensor:
        """(batch, features) → (batch, 4)."""
        hidden = self.widen(x)
        for _ in range(self.rounds):
            hidden = torch.tanh(self.round(hidden))
        return self.narrow(hidden)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stores:
    """Folders of artifacts: a server loads what its cell needs, and no more."""

    small: Path
    """bench-basic, and bench-small and bench-record beside it for interleaved traffic."""
    conv: Path
    """bench-conv alone."""
    slow: Path
    """bench-basic and bench-slow."""

    def of(self, job: str) -> Path:
        """Where that job's artifact lies."""
        return self.conv if job == "conv" else self.small


def stores_in(folder: Path) -> Stores:
    """The artifacts in `folder`; made where there are none of this code and this torch, and older ones removed."""
    made_by = hashlib.sha256(torch.__version__.encode())
    for source in sorted({Path(inspect.getfile(part)) for part in _MADE_BY}):
        made_by.update(source.read_bytes())
    target = folder / made_by.hexdigest()[:16]
    if not target.exists():
        shutil.rmtree(folder, ignore_errors=True)
        writing = folder / ".writing"
        _write_stores(_stores(writing))
        writing.rename(target)
    return _stores(target)


def _stores(folder: Path) -> Stores:
    return Stores(folder / "small", folder / "conv", folder / "slow")


def _write_stores(stores: Stores) -> None:
    torch.set_num_threads(1)
    basic = BasicConfig(hidden_sizes=(128, 64), latent_dim=32, activation="relu", code_activation=False)
    for store in (stores.small, stores.slow):
        _write(store, "bench-basic", _seeded(BasicAutoencoder, DIGIT, basic), DIGIT, JOBS["score"].max_batch_size)
    small = BasicConfig(hidden_sizes=(96, 48), latent_dim=16, activation="relu")
    _write(stores.small, "bench-small", _seeded(BasicAutoencoder, (1, 16, 16), small), (1, 16, 16), 64)
    record = BasicConfig(hidden_sizes=(48, 24), latent_dim=8, activation="relu")
    _write(stores.small, "bench-record", _seeded(BasicAutoencoder, (64,), record), (64,), 64)
    conv = ConvolutionalConfig(channels=(12, 24, 32, 64), latent_dim=32, smallest_side=14)
    network = _seeded(ConvolutionalAutoencoder, COLOUR, conv)
    _write(stores.conv, "bench-conv", network, COLOUR, JOBS["conv"].max_batch_size)
    slow = _seeded(SlowAutoencoder, (SLOW_FEATURES,), SlowConfig(rounds=SLOW_ROUNDS))
    _write(stores.slow, "bench-slow", slow, (SLOW_FEATURES,), 1, rows=2)


# What decides the artifacts' bytes: this module, and where these are defined.
_MADE_BY = (Stores, SlowAutoencoder, BasicAutoencoder, ConvolutionalAutoencoder, mlp, export, Manifest, write_artifact)


def _seeded(kind: type[Autoencoder], shape: tuple[int, ...], config: Any) -> Autoencoder:
    torch.manual_seed(0)
    return kind(shape, config).eval()


def _write(
    store: Path, name: str, network: Autoencoder, shape: tuple[int, ...], max_batch_size: int, rows: int = 8
) -> None:
    """Exports a network as an artifact that any service loads: calibrated on noise, with a self-test."""
    noise = torch.Generator().manual_seed(1)
    items = torch.rand(rows, *shape, generator=noise)
    capabilities = network.capabilities
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's own deprecation
        data = export(network, items, noise)
    exported = ExportedModule(data).freeze()
    methods = signatures(capabilities, shape, network.latent_dim)
    inputs = method_inputs(capabilities, network.latent_dim, items[:2], noise)
    files = {"model.pt": data, "self_test.npz": self_test_vectors(exported, methods, inputs)}
    calibration = None
    if Capability.ANOMALY_SCORE in capabilities:
        scores = Calibration.from_scores(
            exported.run("anomaly_score", torch.rand(99, *shape, generator=noise), batch_size=2).numpy()
        )
        files["calibration.npy"] = _npy(scores.scores)
        calibration = CalibrationEntry(
            id=scores.id, file="calibration.npy", count=len(scores.scores), source="uniform noise"
        )
    picture = len(shape) == 3
    write_artifact(
        store,
        Manifest(
            name=name,
            version=1,
            description="Random weights, for benchmarks.",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            torch_version=torch.__version__,
            files={file: {"sha256": "0" * 64, "bytes": 0} for file in files},
            input=InputSpec(shape=shape, range=(0, 1) if picture else None, picture=PictureSpec() if picture else None),
            latent_dim=network.latent_dim,
            capabilities=methods,
            max_batch_size=max_batch_size,
            calibration=calibration,
            self_test=SelfTest(file="self_test.npz"),
            training=TrainingProvenance(
                preset="benchmark",
                data=DataProvenance(name="noise", sha256="0" * 64, split_sha256="0" * 64, counts={}),
                seed=0,
                config={},
                epochs=0,
                wall_time_s=0,
                threads=1,
                device="cpu",
                parameters=sum(parameter.numel() for parameter in network.parameters()),
            ),
        ),
        files,
    )


def digit() -> Image.Image:
    """A 28 × 28 picture like a written 7: light strokes, four fifths of it black."""
    large = Image.new("L", (112, 112))
    ImageDraw.Draw(large).line([(28, 28), (84, 28), (48, 92)], fill=255, width=9, joint="curve")
    return large.filter(ImageFilter.GaussianBlur(2)).resize((28, 28), Image.Resampling.BOX)


def photo() -> Image.Image:
    """A 224 × 224 colour picture with as much detail as a photograph has."""
    coarse = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, kind: str) -> bytes:
    """The picture as a file of that kind, PNG or JPEG."""
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return stream.getvalue()


def payload(job: str) -> bytes:
    """The JSON document or the picture file that asks for that job."""
    if job == "conv":
        return file_of(photo(), "JPEG")
    if job == "latent":
        return file_of(digit(), "PNG")
    return instances(np.asarray(digit()).reshape(-1) / 255)


def instances(values: NDArray[np.float64]) -> bytes:
    """{"instances": [[…]]} with one flat item."""
    return orjson.dumps({"instances": [values.tolist()]})


def interleaved_payloads() -> Sequence[tuple[str, bytes]]:
    """Path and body of three requests to three models, of three shapes, for three methods."""
    drawn = np.random.default_rng(0)
    return (
        ("/anomaly-score?model=bench-basic", payload("score")),
        ("/encode?model=bench-small", instances(np.round(drawn.random(256), 4))),
        ("/reconstruct?model=bench-record", instances(np.round(drawn.normal(size=64), 4))),
    )


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_rows(rows: int) -> bytes:
    """An npy file with that many items for bench-slow."""
    return _npy(np.zeros((rows, SLOW_FEATURES), np.float32))
