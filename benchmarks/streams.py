"""python -m benchmarks.streams: what a long bulk stream costs in memory, what clients that leave one leave behind, and
what each form of numbers costs in time.

Prints all three; the last compares, in one run and in turns, this service's JSON and binary tensors with a plain
FastAPI app that validates its numbers with pydantic.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import httpx
import typer

from benchmarks import forms, leavers
from benchmarks.forms import VALUES, numbers, start

ITEMS = 100_000


def bench(
    items: Annotated[int, typer.Option(help="Items of the stream.")] = ITEMS,
    rounds: Annotated[int, typer.Option(help="Rounds in which the forms take turns.")] = 5,
    seconds: Annotated[int, typer.Option(help="Seconds of each measurement.")] = 3,
    connections: Annotated[int, typer.Option(help="Connections at the same time.")] = 64,
    only: Annotated[str | None, typer.Option(help="stream, leavers or forms.")] = None,
) -> None:
    """Measure streams and forms of numbers."""
    with tempfile.TemporaryDirectory(prefix="bench-streams-") as name:
        if only in (None, "stream"):
            _stream(Path(name), items)
        if only in (None, "leavers"):
            _leavers(Path(name))
        if only in (None, "forms"):
            forms.measure(Path(name), rounds, seconds, connections)


def _stream(folder: Path, items: int) -> None:
    lines = [json.dumps({"id": index, "instance": numbers(index)}).encode() + b"\n" for index in range(200)]
    body = folder / "items.ndjson"
    with body.open("wb") as file:
        for index in range(items):
            file.write(lines[index % len(lines)])
    print(f"{items} items of {VALUES} numbers, {body.stat().st_size / 1e6:.0f} MB, through /bulk/anomaly-score")
    with start(folder, "-m", "app", "serve", "--port", "PORT") as server:
        url = f"http://127.0.0.1:{server.port}/bulk/anomaly-score"
        httpx.post(url, content=lines[0] * 300)
        ways: dict[str, Callable[[], bytes]] = {
            "httpx": lambda: _by_httpx(url, body),
            "curl -N": lambda: _by_curl(url, body),
        }
        for name, send in ways.items():
            idle, peak, done = server.memory_bytes(), [0], threading.Event()

            def watch(peak: list[int] = peak, done: threading.Event = done) -> None:
                while not done.wait(0.1):
                    peak[0] = max(peak[0], server.memory_bytes())

            watching = threading.Thread(target=watch)
            watching.start()
            started = time.perf_counter()
            last = send()
            took = time.perf_counter() - started
            done.set()
            watching.join()
            assert json.loads(last)["summary"]["ok"] == items, last
            print(
                f"  {name:8} {took:6.1f} s, {items / took:7.0f} items/s, memory {idle / 1e6:.0f} MB idle, "
                f"at most {(peak[0] - idle) / 1e6:+.0f} MB (promise: below 100)"
            )


def _leavers(folder: Path) -> None:
    line = json.dumps(numbers(1)).encode() + b"\n"
    with start(folder, "-m", "app", "serve", "--port", "PORT") as server:
        httpx.post(f"http://127.0.0.1:{server.port}/bulk/reconstruct", content=line * 2000)
        leavers.measure(server, line)


def _by_httpx(url: str, body: Path) -> bytes:
    with body.open("rb") as file:
        return httpx.post(url, content=file, timeout=None).content.splitlines()[-1]


def _by_curl(url: str, body: Path) -> bytes:
    command = ["curl", "-sN", "-T", str(body), "-X", "POST", url]
    return subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1]


if __name__ == "__main__":
    typer.run(bench)
