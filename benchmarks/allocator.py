"""python -m benchmarks.allocator: what a forward pass takes where the C library keeps freed memory, and where not.

Prints milliseconds for each row and page faults for each pass of the 224 × 224 model, processes of both kinds in turns.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import typer

from app.inference.allocator import keep_freed_memory
from benchmarks.artifact import payload, stores_in
from benchmarks.jobs import JOBS, Model
from benchmarks.results import spread

BATCH_SIZES, PASSES = (1, 2, 4, 8), 20


def bench(rounds: int = 4, folder: Path = Path(".bench")) -> None:
    """Measure forward passes with and without freed memory kept."""
    store = stores_in(folder / "store").conv
    found: dict[str, list[list[list[float]]]] = {"given back": [], "kept": []}
    for _ in range(rounds):
        for how, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.allocator", "measure", str(store), how]
            runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"224 × 224 model, one torch thread; {rounds} processes each, medians [lowest–highest]")
    for index, size in enumerate(BATCH_SIZES):
        for how, runs in found.items():
            times, faults = zip(*(run[index] for run in runs), strict=True)
            took = spread(times, "{:.2f}")
            print(f"  batch of {size}, {how:10} {took} ms a row, {statistics.median(faults):.0f} page faults a pass")


def measure(store: Path, how: str) -> list[tuple[float, float]]:
    """Median milliseconds for a row, and page faults for a pass, at each batch size; on a thread, as in the service."""
    if how == "kept":
        keep_freed_memory()
    figures: list[tuple[float, float]] = []

    def work() -> None:
        model, item = Model(store, JOBS["conv"]), JOBS["conv"].decode(payload("conv"))
        for size in BATCH_SIZES:
            model.run([item] * size)
            faults, times = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
            for _ in range(PASSES):
                started = time.perf_counter()
                model.run([item] * size)
                times.append((time.perf_counter() - started) / size * 1e3)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            figures.append((statistics.median(times), faults / PASSES))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        typer.run(bench)
