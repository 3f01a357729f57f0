"""What a server's script is told, in its environment: arguments would get lost on the way to spawned workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import JOBS, Job


@dataclass(frozen=True)
class Options:
    """Where to listen, which job to serve from which store, and with how many processes."""

    port: int
    store: Path
    job: Job
    workers: int

    @classmethod
    def from_environment(cls) -> Options:
        """The options as `Launch.environment` wrote them."""
        return cls(
            port=int(os.environ["BENCH_PORT"]),
            store=Path(os.environ["BENCH_STORE"]),
            job=JOBS[os.environ["BENCH_JOB"]],
            workers=int(os.environ["BENCH_WORKERS"]),
        )
