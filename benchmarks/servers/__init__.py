"""The servers that are compared: one file each, and the one list of how each is started and asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.jobs import JOBS

BOUNDARY = "hourglass-benchmark"


@dataclass(frozen=True)
class Launch:
    """What a server is told: where to listen, what to serve, and with how many processes."""

    python: Path
    port: int
    store: Path
    job: str
    workers: int

    def environment(self) -> dict[str, str]:
        """The launch for a script of this folder."""
        return {
            "BENCH_PORT": str(self.port),
            "BENCH_STORE": str(self.store),
            "BENCH_JOB": self.job,
            "BENCH_WORKERS": str(self.workers),
            # torch.set_num_threads holds for the thread that calls it; oneDNN in any other would start its own.
            "OMP_NUM_THREADS": "1",
        }


@dataclass(frozen=True)
class Contender:
    """One server under test.

    Args:
        name: in the report.
        command, environment: what starts it.
        package: the peer's name on PyPI, which gets an environment of its own; None: the project's environment.
        paths: a job's path, where it is not the job's name.
        raw_uploads: a picture is the whole body, because the server knows no multipart.
        batches: whether it gathers requests into batches.
        ready_path: answers 200 once the server is ready.
    """

    name: str
    command: Callable[[Launch], Sequence[str]]
    package: str | None = None
    environment: Callable[[Launch], Mapping[str, str]] = Launch.environment
    paths: Mapping[str, str] = field(default_factory=dict)
    raw_uploads: bool = False
    batches: bool = True
    ready_path: str = "/ready"
    jobs: Sequence[str] = tuple(JOBS)

    def path(self, job: str) -> str:
        """Where that job is asked for."""
        return self.paths.get(job, f"/{job}")

    def body(self, job: str, payload: bytes) -> tuple[bytes, str]:
        """The request's body and its media type."""
        upload = JOBS[job].upload
        if upload is None:
            return payload, "application/json"
        if self.raw_uploads:
            return payload, upload
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="picture"\r\n'
            f"Content-Type: {upload}\r\n\r\n"
        )
        return head.encode() + payload + f"\r\n--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"


TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Has glibc keep what a forward pass frees instead of giving it back and asking anew: half the time of a large model.

For what must be as fast as it can be, the bare app and the bare loop; the peers run as their guides say.
"""


def _module(name: str, *arguments: str) -> Callable[[Launch], Sequence[str]]:
    """`python -m benchmarks.servers.NAME`."""
    return lambda launch: [str(launch.python), "-m", f"benchmarks.servers.{name}", *arguments]


HOURGLASS = Contender(
    "hourglass",
    command=lambda launch: [sys.executable, "-m", "app", "serve", "--host", "127.0.0.1", "--port", str(launch.port)],
    environment=lambda launch: {
        "HOURGLASS_MODELS_STORE": str(launch.store),
        "HOURGLASS_WORKERS": str(launch.workers),
        "HOURGLASS_LOG_FORMAT": "json",
    },
    paths={
        "score": "/anomaly-score?model=bench-basic",
        "reconstruct": "/reconstruct?model=bench-basic",
        "latent": "/encode?model=bench-basic",
        "conv": "/anomaly-score?model=bench-conv",
    },
    ready_path="/readyz",
)
BARE = Contender(
    "bare app",
    command=_module("bare"),
    environment=lambda launch: {**launch.environment(), **TUNED_ALLOCATOR},
)
OWNER = Contender(
    "device owner",
    command=_module("owner"),
    environment=lambda launch: {k: v for k, v in BARE.environment(launch).items() if k != "OMP_NUM_THREADS"},
)
MOSEC = Contender("mosec", command=_module("mosec_server"), package="mosec", raw_uploads=True, ready_path="/")
LITSERVE = Contender("LitServe", command=_module("litserve_server"), package="litserve", ready_path="/health")
BENTOML = Contender(
    "BentoML",
    command=lambda launch: [
        str(launch.python), "-m", "bentoml", "serve", "benchmarks.servers.bentoml_server:Bench",
        "--host", "127.0.0.1", "--port", str(launch.port), "--working-dir", ".",
    ],
    package="bentoml",
    environment=lambda launch: {**launch.environment(), "BENTOML_DO_NOT_TRACK": "true"},
    ready_path="/readyz",
)  # fmt: skip
NAIVE_DEF = Contender("naive def", command=_module("naive", "def"), batches=False)
NAIVE_ASYNC = Contender("naive async", command=_module("naive", "async"), batches=False)

CONTENDERS = (HOURGLASS, MOSEC, BARE, NAIVE_DEF, NAIVE_ASYNC, LITSERVE, BENTOML)
