"""The artifacts that the benchmark serves, and the requests it sends: made here, deterministically, from no data.

Weights are random and requests are drawn: what a forward pass and a parsed number cost does not depend on their values.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import itertools
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import (
    CalibrationEntry,
    Capability,
    DataProvenance,
    FileEntry,
    InputSpec,
    Manifest,
    Method,
    PictureSpec,
    SelfTest,
    TensorSpec,
    TrainingProvenance,
)
from app.artifacts.store import write_artifact
from benchmarks.jobs import COLOUR, DIGIT, JOBS, Job

SLOW_FEATURES = 64


# torch types the call of a module as Any. The reason stands here and not beside each `type: ignore`: TorchScript reads
# such comments, and takes no other behind them.


class ReconstructionError(nn.Module):
    """An encoder, a decoder, and the methods of a plain autoencoder: its anomaly score is the mean squared error."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, latent_dim)."""
        return self.encoder(x)  # type: ignore[no-any-return]

    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, *item)."""
        return self.decoder(z)  # type: ignore[no-any-return]

    @torch.jit.export
    def reconstruct(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, *item)."""
        return self.decode(self.encode(x))

    @torch.jit.export
    def anomaly_score(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch,)."""
        return (self.reconstruct(x) - x).square().flatten(1).mean(1)


class Slow(nn.Module):
    """Keeps the executor busy for some .2 s a row with almost no bytes to send: deadlines pass meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(SLOW_FEATURES, 1024)
        self.round = nn.Linear(1024, 1024)
        self.narrow = nn.Linear(1024, 4)

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        """(batch, features) → (batch, 4)."""
        hidden = self.widen(x)
        for _ in range(1500):  # products with a 1024 × 1024 matrix
            hidden = torch.tanh(self.round(hidden))
        return self.narrow(hidden)  # type: ignore[no-any-return]


def basic(shape: tuple[int, ...], sizes: Sequence[int]) -> ReconstructionError:
    """The classic fully connected autoencoder: from the item through `sizes`, the last of them the latent, and back."""
    widths = [math.prod(shape), *sizes]
    encoder: list[nn.Module] = [nn.Flatten(1)]
    decoder: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        encoder += [nn.Linear(wide, narrow), nn.ReLU()]
        decoder = [nn.Linear(narrow, wide), nn.ReLU(), *decoder]
    decoder[-1:] = [nn.Sigmoid(), nn.Unflatten(1, shape)]
    return ReconstructionError(nn.Sequential(*encoder[:-1]), nn.Sequential(*decoder))


def convolutional() -> ReconstructionError:
    """Four halvings of a 3 × 224 × 224 picture around a dense latent: some 6 ms of forward on one thread."""
    widths, side = (3, 16, 32, 64, 64), 14
    encoder: list[nn.Module] = []
    decoder: list[nn.Module] = []
    for shallow, deep in itertools.pairwise(widths):
        encoder += [nn.Conv2d(shallow, deep, 3, stride=2, padding=1), nn.ReLU()]
        decoder = [nn.ConvTranspose2d(deep, shallow, 4, stride=2, padding=1), nn.ReLU(), *decoder]
    flat = widths[-1] * side * side
    encoder += [nn.Flatten(1), nn.Linear(flat, 32)]
    decoder = [nn.Linear(32, flat), nn.Unflatten(1, (widths[-1], side, side)), *decoder[:-1], nn.Sigmoid()]
    return ReconstructionError(nn.Sequential(*encoder), nn.Sequential(*decoder))


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
    sources = (Path(__file__), *(Path(inspect.getfile(part)) for part in (Job, Manifest)))
    made_by = hashlib.sha256(torch.__version__.encode())
    for source in sources:
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
    torch.manual_seed(0)
    classic = basic(DIGIT, (128, 64, 32))
    for store in (stores.small, stores.slow):
        _write(store, "bench-basic", classic, DIGIT, 32, JOBS["score"].max_batch_size)
    _write(stores.small, "bench-small", basic((1, 16, 16), (96, 48, 16)), (1, 16, 16), 16, 64)
    _write(stores.small, "bench-record", basic((64,), (48, 24, 8)), (64,), 8, 64)
    _write(stores.conv, "bench-conv", convolutional(), COLOUR, 32, JOBS["conv"].max_batch_size)
    _write(stores.slow, "bench-slow", Slow(), (SLOW_FEATURES,), 4, 1, capabilities=(Capability.ENCODE,))


_CAPABILITIES = (Capability.ENCODE, Capability.DECODE, Capability.RECONSTRUCT, Capability.ANOMALY_SCORE)


def _write(
    store: Path,
    name: str,
    module: nn.Module,
    shape: tuple[int, ...],
    latent_dim: int,
    max_batch_size: int,
    capabilities: Sequence[Capability] = _CAPABILITIES,
) -> None:
    """Writes a module as an artifact that the service loads like any other: calibrated on noise, with a self-test."""
    noise = torch.Generator().manual_seed(1)
    item, latent = TensorSpec(name="x", shape=shape), TensorSpec(name="z", shape=(latent_dim,))
    signatures = {
        Capability.ENCODE: (item, latent),
        Capability.DECODE: (latent, item),
        Capability.RECONSTRUCT: (item, item),
        Capability.ANOMALY_SCORE: (item, TensorSpec(name="score", shape=())),
    }
    methods = {
        capability: Method(inputs=(signatures[capability][0],), outputs=(signatures[capability][1],))
        for capability in capabilities
    }
    module.eval()
    vectors: dict[str, NDArray[np.float32]] = {}
    with torch.inference_mode():
        for capability, (given, found) in ((name, signatures[name]) for name in capabilities):
            rows = torch.rand(2, *given.shape, generator=noise)
            vectors[f"{capability}/in/{given.name}"] = rows.numpy()
            vectors[f"{capability}/out/{found.name}"] = getattr(module, capability)(rows).numpy()
    files = {"model.pt": _scripted(module), "self_test.npz": _saved(np.savez, **vectors)}
    calibration = None
    if isinstance(module, ReconstructionError):
        with torch.inference_mode():
            normal = [torch.rand(1, *shape, generator=noise) for _ in range(99)]
            scores = Calibration.from_scores(torch.cat([module.anomaly_score(one) for one in normal]).numpy())
        files["calibration.npy"] = _saved(np.save, scores.scores)
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
            files={file: FileEntry(sha256="0" * 64, bytes=0) for file in files},
            input=InputSpec(shape=shape, range=(0, 1) if picture else None, picture=PictureSpec() if picture else None),
            latent_dim=latent_dim,
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
                parameters=sum(parameter.numel() for parameter in module.parameters()),
            ),
        ),
        files,
    )


def _scripted(module: nn.Module) -> bytes:
    """The bytes of `model.pt`."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
        torch.jit.save(torch.jit.script(module), stream)
    return stream.getvalue()


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


def npy_rows(rows: int) -> bytes:
    """An npy file with that many items for bench-slow."""
    return _saved(np.save, np.zeros((rows, SLOW_FEATURES), np.float32))


def _saved(save: Callable[..., None], *arrays: NDArray[Any], **named: NDArray[Any]) -> bytes:
    """What NumPy's `save` or `savez` writes."""
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()
