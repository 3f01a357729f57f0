"""The best bare loop: decode and forward in every process, no HTTP: what the cores could do for a job at most."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.jobs import JOBS, Model
from benchmarks.servers import TUNED_ALLOCATOR, Launch
from benchmarks.servers.options import Options

BATCH_SIZES = (1, 2, 4)


def rate_per_s(store: Path, job: str, payload: bytes, processes: int, seconds: float) -> float:
    """Items a second of that many processes with one torch thread each, at the best of some batch sizes."""
    share_s = seconds / len(BATCH_SIZES)
    return max(_rate_per_s(store, job, payload, processes, share_s, batch_size) for batch_size in BATCH_SIZES)


def _rate_per_s(store: Path, job: str, payload: bytes, processes: int, seconds: float, batch_size: int) -> float:
    launch = Launch(Path(sys.executable), port=0, store=store, job=job, workers=processes)
    environment = {**os.environ, **launch.environment(), **TUNED_ALLOCATOR}
    command = [sys.executable, "-m", "benchmarks.bare_loop", str(seconds), str(batch_size)]
    loops: list[subprocess.Popen[bytes]] = []
    try:
        loops.extend(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(processes)
        )
        for loop in loops:
            if loop.stdout is None or loop.stdout.readline() != b"ready\n":
                raise RuntimeError("bare loop: did not start")
        for loop in loops:  # all are warm: now they run at the same time
            if loop.stdin is not None:
                loop.stdin.write(payload)
                loop.stdin.close()
        return sum(float(loop.stdout.read()) for loop in loops if loop.stdout is not None)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(model: Model, job: str, payload: bytes, seconds: float, batch_size: int) -> float:
    """Items a second of this process."""
    decode, encode = JOBS[job].decode, JOBS[job].encode
    done = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for output in model.run([decode(payload) for _ in range(batch_size)]):
            encode(output)
        done += batch_size
    return done / (time.perf_counter() - start)


def forward_s(model: Model, job: str, payload: bytes, calls: int = 2000) -> float:
    """Median seconds of the bare forward of one item: array in, array out."""
    item = JOBS[job].decode(payload)
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        model.run([item])
        times.append(time.perf_counter() - start)
    return sorted(times)[calls // 2]


if __name__ == "__main__":
    options = Options.from_environment()
    loaded = Model(options.store, options.job)
    print("ready", flush=True)
    picture = sys.stdin.buffer.read()
    print(measure(loaded, options.job.name, picture, float(sys.argv[1]), int(sys.argv[2])))
