"""Real, tiny artifacts made without `training`, and a real server over them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import (
    CalibrationEntry,
    Capability,
    DataProvenance,
    InputSpec,
    Manifest,
    Method,
    PictureSpec,
    ProjectionEntry,
    SelfTest,
    TensorSpec,
    TrainingProvenance,
)
from app.artifacts.store import ArtifactRef, write_artifact
from app.settings import Settings

SHAPE, LATENT_DIM = (1, 8, 8), 4
POISON, NOT_A_NUMBER = 0.9375, 0.96875  # exact in binary: a first pixel of these values makes the module misbehave


class TinyAutoencoder(torch.nn.Module):
    """1×8×8 ⇄ 4 linearly. A first pixel of POISON raises, one of NOT_A_NUMBER gives NaN for that row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(LATENT_DIM, 64, generator=torch.Generator().manual_seed(seed)) / 8
        self.register_buffer("weight", weight)

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        if bool((flat[:, 0] == 0.9375).any()):
            raise RuntimeError("poisoned row")
        bad = (flat[:, 0] == 0.96875).unsqueeze(1)
        return torch.where(bad, torch.full_like(flat[:, :1], float("nan")), flat @ self.weight.t())

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(z @ self.weight).reshape(-1, 1, 8, 8)

    @torch.jit.export
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    @torch.jit.export
    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        return self.reconstruct(x)

    @torch.jit.export
    def inpaint(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.reconstruct(x * (1 - mask))

    @torch.jit.export
    def anomaly_score(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.reconstruct(x)).square().flatten(1).mean(1)

    @torch.jit.export
    def sample(self, u: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return self.decode(eps + u.unsqueeze(1))


class LabelledAutoencoder(TinyAutoencoder):
    """Its samples are all of the value label / 10; of .5 without a label."""

    @torch.jit.export
    def sample(self, u: torch.Tensor, eps: torch.Tensor, label: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        value = torch.where(label < 0, torch.full_like(label, 0.5), label / 10)
        return value.reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8) + 0 * eps.sum(1).reshape(-1, 1, 1, 1)


METHODS = {
    Capability.ENCODE: (["x"], "latent"),
    Capability.DECODE: (["latent"], "x"),
    Capability.RECONSTRUCT: (["x"], "x"),
    Capability.DENOISE: (["x"], "x"),
    Capability.INPAINT: (["x", "mask"], "x"),
    Capability.ANOMALY_SCORE: (["x"], "score"),
    Capability.SAMPLE: (["u", "eps"], "x"),
}
SHAPES = {"x": SHAPE, "mask": SHAPE, "label": (), "latent": (LATENT_DIM,), "score": (), "u": (), "eps": (LATENT_DIM,)}


def write_tiny(
    store: Path, name: str = "tiny", *, seed: int = 0, without: frozenset[Capability] = frozenset(), **changes: object
) -> ArtifactRef:
    """Writes a tiny artifact into `store`; `changes` replace fields of its manifest."""
    capabilities = [capability for capability in METHODS if capability not in without]
    methods = METHODS
    module = TinyAutoencoder(seed).eval()
    if "labels" in changes:
        methods = METHODS | {Capability.SAMPLE: (["u", "eps", "label"], "x")}
        module = LabelledAutoencoder(seed).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
        scripted = torch.jit.script(module)
        stream = io.BytesIO()
        torch.jit.save(scripted, stream)
    generator = np.random.default_rng(seed)
    vectors: dict[str, np.ndarray] = {}
    for capability in capabilities:
        names, output = methods[capability]
        given = [(generator.random((3, *SHAPES[n])) * 0.9).astype(np.float32) for n in names]
        vectors |= {f"{capability}/in/{n}": array for n, array in zip(names, given, strict=True)}
        with torch.inference_mode():
            found = getattr(scripted, capability)(*map(torch.from_numpy, given))
        vectors[f"{capability}/out/{output}"] = found.numpy()
    normal = torch.from_numpy((generator.random((99, *SHAPE)) * 0.9).astype(np.float32))
    with torch.inference_mode():
        calibration = Calibration.from_scores(scripted.anomaly_score(normal).numpy())
    files = {"model.pt": stream.getvalue(), "calibration.npy": _npy(calibration.scores), "self_test.npz": _npz(vectors)}
    places = {"mean": np.ones(LATENT_DIM), "components": np.eye(2, LATENT_DIM), "points": np.zeros((3, 2))}
    files["projection.npz"] = _npz({**places, "labels": np.array([0, 1, -1])})
    manifest = Manifest(
        name=name,
        version=1,
        description="A tiny linear autoencoder for tests.",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        torch_version=torch.__version__,
        files={file: {"sha256": "0" * 64, "bytes": 0} for file in files},
        input=InputSpec(shape=SHAPE, range=(0, 1), picture=PictureSpec(polarity="light_on_dark")),
        latent_dim=LATENT_DIM,
        capabilities={
            capability: Method(
                inputs=[TensorSpec(name=n, shape=SHAPES[n]) for n in methods[capability][0]],
                outputs=[TensorSpec(name=methods[capability][1], shape=SHAPES[methods[capability][1]])],
            )
            for capability in capabilities
        },
        labels=changes.get("labels"),
        max_batch_size=16,
        projection=ProjectionEntry(file="projection.npz", method="hand", count=3),
        calibration=CalibrationEntry(
            id=calibration.id, file="calibration.npy", count=len(calibration.scores), source="uniform noise"
        ),
        self_test=SelfTest(file="self_test.npz"),
        training=TrainingProvenance(
            preset="tiny",
            data=DataProvenance(name="noise", sha256="0" * 64, split_sha256="0" * 64, counts={"calibration": 99}),
            seed=seed,
            config={},
            epochs=0,
            wall_time_s=0,
            threads=1,
            device="cpu",
            parameters=0,
        ),
    )
    return write_artifact(store, manifest.model_copy(update=changes), files)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@pytest.fixture(scope="session")
def write_artifact_named() -> Callable[..., ArtifactRef]:
    """`write_tiny(store, name, seed=…, without=…, **manifest fields)`."""
    return write_tiny


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, not to be written to: `tiny` in two versions, and `tiny-plain`, which can neither sample nor denoise."""
    store = tmp_path_factory.mktemp("store")
    write_tiny(store, "tiny", seed=0)
    write_tiny(store, "tiny", seed=1, default_for=(Capability.ANOMALY_SCORE,))
    write_tiny(
        store,
        "tiny-plain",
        seed=2,
        without=frozenset({Capability.SAMPLE, Capability.DENOISE}),
        unsupported={Capability.DENOISE: "denoising lowers PSNR from 14.9 to 14.1 dB"},
    )
    return store


@pytest.fixture(scope="session")
def base_url(store: Path, serve: Callable[[Settings], AbstractContextManager[str]]) -> Iterator[str]:
    """Base URL of a real server over `store`."""
    with serve(Settings(models_store=store, log_format="json", max_body_bytes=1_000_000)) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[httpx.Client]:
    """A client of the server over `store`."""
    with httpx.Client(base_url=base_url, timeout=30) as client:
        yield client
