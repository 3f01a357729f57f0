"""Real, tiny artifacts made without `training`, and a real server over them whose application the tests can reach: to
hold its device, to watch it load, to break it.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from app.api.connections import HttpConnection
from app.artifacts.calibration import Calibration
from app.artifacts.manifest import (
    CalibrationEntry,
    Capability,
    DataProvenance,
    InputSpec,
    Manifest,
    MapScale,
    Method,
    PictureSpec,
    ProjectionEntry,
    SelfTest,
    TensorSpec,
    TrainingProvenance,
)
from app.artifacts.store import ArtifactRef, write_artifact
from app.main import create_app
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
    def anomaly_score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        error = (x - self.reconstruct(x)).square().flatten(1)
        return error.mean(1), torch.stack([error.mean(1), error.amax(1)], 1)

    @torch.jit.export
    def anomaly_map(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.reconstruct(x)).abs()

    @torch.jit.export
    def sample(self, u: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return self.decode(eps + u.unsqueeze(1))


class LabelledAutoencoder(TinyAutoencoder):
    """Its samples are all of the value label / 10; of .5 without a label."""

    @torch.jit.export
    def sample(self, u: torch.Tensor, eps: torch.Tensor, label: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        value = torch.where(label < 0, torch.full_like(label, 0.5), label / 10)
        return value.reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8) + 0 * eps.sum(1).reshape(-1, 1, 1, 1)


class RecordsAutoencoder(TinyAutoencoder):
    """Takes and gives records of 64 features instead of pictures of 8 × 8."""

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(z @ self.weight)


PICTURES = InputSpec(shape=SHAPE, range=(0, 1), picture=PictureSpec(polarity="light_on_dark"))
RECORDS = InputSpec(shape=(64,), features=tuple(f"f{number}" for number in range(64)))
METHODS = {
    Capability.ENCODE: (["x"], "latent"),
    Capability.DECODE: (["latent"], "x"),
    Capability.RECONSTRUCT: (["x"], "x"),
    Capability.DENOISE: (["x"], "x"),
    Capability.INPAINT: (["x", "mask"], "x"),
    Capability.ANOMALY_SCORE: (["x"], "score"),
    Capability.ANOMALY_MAP: (["x"], "mask"),
    Capability.SAMPLE: (["u", "eps"], "x"),
}
SHAPES = {"x": SHAPE, "mask": SHAPE, "label": (), "latent": (LATENT_DIM,), "score": (), "u": (), "eps": (LATENT_DIM,)}


def write_tiny(
    store: Path, name: str = "tiny", *, seed: int = 0, without: frozenset[Capability] = frozenset(), **changes: object
) -> ArtifactRef:
    """Writes a tiny artifact into `store`; `changes` replace fields of its manifest. `input=RECORDS` makes it one of
    records.
    """
    capabilities = [capability for capability in METHODS if capability not in without]
    methods = METHODS
    module = TinyAutoencoder(seed).eval()
    shapes = SHAPES
    spec = changes.get("input", PICTURES)
    if spec is RECORDS:
        module = RecordsAutoencoder(seed).eval()
        shapes = SHAPES | {"x": RECORDS.shape, "mask": RECORDS.shape}
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
        given = [(generator.random((3, *shapes[n])) * 0.9).astype(np.float32) for n in names]
        vectors |= {f"{capability}/in/{n}": array for n, array in zip(names, given, strict=True)}
        with torch.inference_mode():
            found = getattr(scripted, capability)(*map(torch.from_numpy, given))
        if capability is Capability.ANOMALY_SCORE:
            found, vectors["anomaly_score/out/parts"] = found[0], found[1].numpy()
        vectors[f"{capability}/out/{output}"] = found.numpy()
    normal = torch.from_numpy((generator.random((99, *shapes["x"])) * 0.9).astype(np.float32))
    with torch.inference_mode():
        calibration = Calibration.from_scores(scripted.anomaly_score(normal)[0].numpy())
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
        input=spec,
        latent_dim=LATENT_DIM,
        capabilities={
            capability: Method(
                inputs=[TensorSpec(name=n, shape=shapes[n]) for n in methods[capability][0]],
                outputs=[
                    TensorSpec(name=methods[capability][1], shape=shapes[methods[capability][1]]),
                    *([TensorSpec(name="parts", shape=(2,))] if capability is Capability.ANOMALY_SCORE else []),
                ],
            )
            for capability in capabilities
        },
        labels=changes.get("labels"),
        max_batch_size=16,
        projection=ProjectionEntry(file="projection.npz", method="hand", count=3),
        calibration=CalibrationEntry(
            id=calibration.id,
            file="calibration.npy",
            count=len(calibration.scores),
            source="uniform noise",
            map=MapScale(typical=0.25, threshold=0.5, target_fpr=0.01),
        ),
        components=() if Capability.ANOMALY_SCORE in without else ("mean", "largest"),
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


@dataclass
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = field(default=0)

    def get(self, path: str) -> httpx.Response:
        """One request over a connection of its own, so that any worker may get it."""
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=20)

    def post(self, path: str) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}{path}", json={"instances": [[0.25] * 64]}, timeout=20)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.holds(condition):
            assert time.monotonic() < deadline, f"{what} did not come about\n{self.log.read_text()}"
            time.sleep(0.05)

    @staticmethod
    def holds(condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except httpx.TransportError:
            return False

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


@contextmanager
def run_process(store: Path, log: Path, *arguments: str, port: int = 0, **environment: str) -> Iterator[Running]:
    """`python -m app serve` on a free port; its log in `log`."""
    variables = {**os.environ, "HOURGLASS_MODELS_STORE": str(store), "HOURGLASS_LOG_FORMAT": "console"}
    variables |= {"HOURGLASS_DRAIN_SECONDS": "0", **environment}
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "app", "serve", "--port", str(port), *arguments]
        process = subprocess.Popen(command, env=variables, stderr=stderr, cwd=Path(__file__).parents[2])
    service = Running(process, log)
    try:
        service.until(lambda: "Hourglass on http" in log.read_text(), "the announcement")
        service.port = int(re.findall(r"Hourglass on http://[^:]+:(\d+)", log.read_text())[0])
        service.until(lambda: service.get("/readyz").status_code == 200, "readiness")
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def running() -> Callable[..., AbstractContextManager[Running]]:
    """`running(store, log, *arguments, **environment)`: a service in a process of its own."""
    return run_process


@dataclass
class Load:
    """Clients in a thread of their own, each with a connection that it keeps, asking the same again and again.

    Args:
        port: of 127.0.0.1.
        path: posted to, with `body`.
        check: what is wrong with an answer, from its status, headers and body; None if nothing is.
        clients: how many at the same time.
        pause_s: how long each waits between an answer and its next request.
    """

    port: int
    path: str | Callable[[], str]
    body: bytes
    check: Callable[[int, dict[str, str], bytes], str | None]
    clients: int = 64
    pause_s: float = 0.03
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Requests that got no answer: refused or broken connections."""

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a client waits for an answer that never comes"

    @property
    def failures(self) -> list[str]:
        """Whatever is no good answer."""
        return [*self.wrong, *self.lost]

    async def _run(self) -> None:
        await asyncio.gather(*(self._ask() for _ in range(self.clients)))

    async def _ask(self) -> None:
        writer: asyncio.StreamWriter | None = None
        while not self._stop.is_set():
            path = self.path if isinstance(self.path, str) else self.path()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\n" % path.encode())
                writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(self.body), self.body))
                async with asyncio.timeout(30):
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    lines = head.split("\r\n")
                    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                    body = await reader.readexactly(int(headers["content-length"]))
            except (OSError, EOFError, TimeoutError) as error:
                self.lost.append(f"{type(error).__name__}: {error}")
                if writer is not None:
                    writer.close()
                writer = None
                await asyncio.sleep(0.05)
                continue
            self.answers += 1
            wrong = self.check(int(lines[0].split()[1]), headers, body)
            if wrong is not None:
                self.wrong.append(wrong)
            if headers.get("connection") == "close":
                writer.close()
                writer = None
            await asyncio.sleep(self.pause_s)
        if writer is not None:
            writer.close()


@pytest.fixture(scope="session")
def load() -> type[Load]:
    """Many clients at once; see `Load`."""
    return Load


@pytest.fixture(scope="session")
def write_artifact_named() -> Callable[..., ArtifactRef]:
    """`write_tiny(store, name, seed=…, without=…, **manifest fields)`."""
    return write_tiny


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, not to be written to: `tiny` in two versions, and `tiny-plain`, which can neither sample nor denoise,
    and has no maps.
    """
    store = tmp_path_factory.mktemp("store")
    write_tiny(store, "tiny", seed=0)
    write_tiny(store, "tiny", seed=1, default_for=(Capability.ANOMALY_SCORE,))
    write_tiny(
        store,
        "tiny-plain",
        seed=2,
        without=frozenset({Capability.SAMPLE, Capability.DENOISE, Capability.ANOMALY_MAP}),
        unsupported={Capability.DENOISE: "denoising lowers PSNR from 14.9 to 14.1 dB"},
    )
    return store


@pytest.fixture(scope="session")
def records_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, not to be written to: `rows`, a model of records of 64 features, f0 to f63."""
    store = tmp_path_factory.mktemp("records_store")
    write_tiny(store, "rows", without=frozenset({Capability.INPAINT, Capability.DENOISE}), input=RECORDS)
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


@dataclass
class Service:
    """A running service: its application, a client, its host and port."""

    app: FastAPI
    client: httpx.Client
    address: tuple[str, int]
    threads: list[threading.Thread] = field(default_factory=list)

    @contextmanager
    def held_device(self) -> Iterator[None]:
        """The device's worker thread is busy until the block ends: whatever is asked meanwhile waits."""
        holding, release = threading.Event(), threading.Event()
        self.app.state.catalog._workers[0].submit(lambda: (holding.set(), release.wait(30)))
        assert holding.wait(30)
        try:
            yield
        finally:
            release.set()

    def post_aside(self, url: str, **options: Any) -> Callable[[], httpx.Response]:
        """Sends a request from another thread; calling the result waits for the answer."""
        answers: list[httpx.Response] = []

        def send() -> None:
            with httpx.Client(base_url=self.client.base_url, timeout=30) as client:
                answers.append(client.post(url, **options))

        thread = threading.Thread(target=send)
        thread.start()
        self.threads.append(thread)

        def answer() -> httpx.Response:
            thread.join(30)
            return answers[0]

        return answer

    def until(self, happened: Callable[[], bool]) -> None:
        """Returns once something is true of the service; asks it for nothing but signs of life meanwhile."""
        for _ in range(10_000):
            if happened():
                return
            self.client.get("/livez")
        raise AssertionError("it never happened")

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the service's metrics, 0 if there is none yet."""
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0


@contextmanager
def run_service(settings: Settings, *, wait: bool = True, end: Callable[[], None] = lambda: None) -> Iterator[Service]:
    app = create_app(settings, end=end)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, http=HttpConnection)
    )
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        address = server.servers[0].sockets[0].getsockname()[:2]
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=30) as client:
            service = Service(app, client, address)
            while wait and not client.get("/startupz").json()["done"]:
                pass
            yield service
            for aside in service.threads:
                aside.join(30)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def run_app() -> Callable[..., AbstractContextManager[Service]]:
    """A context manager that runs a `Service` for some settings; with wait=False its artifacts may still load."""
    return run_service


@pytest.fixture(scope="module")
def service(store: Path) -> Iterator[Service]:
    """A service over `store` with small limits."""
    settings = Settings(
        models_store=store, log_format="json", max_body_bytes=200_000, max_queue_rows=40, max_image_pixels=10_000
    )
    with run_service(settings) as service:
        yield service


@pytest.fixture(scope="session")
def items() -> np.ndarray:
    """Ten harmless items, (10, 1, 8, 8)."""
    return (np.random.default_rng(0).random((10, 1, 8, 8)) * 0.9).astype(np.float32)
