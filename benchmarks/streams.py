"""python -m benchmarks.streams: what a long bulk stream costs in memory, what clients that leave one leave behind, and
what each form of numbers costs in time.

Prints all three; the last compares, in one run and in turns, this service's JSON and binary tensors with a plain
FastAPI app that validates its numbers with pydantic.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer

from benchmarks import leavers, load, wrk
from benchmarks.processes import Server, free_port, running

ITEMS, VALUES = 100_000, 784
STORE = Path("models_store")
_BINARY = {
    "inputs": [
        {"name": "input", "shape": [1, VALUES], "datatype": "FP32", "parameters": {"binary_data_size": 4 * VALUES}}
    ],
    "outputs": [{"name": "reconstruction", "parameters": {"binary_data": True}}],
}


def bench(
    items: Annotated[int, typer.Option(help="Items of the stream.")] = ITEMS,
    rounds: Annotated[int, typer.Option(help="Rounds in which the forms take turns.")] = 5,
    seconds: Annotated[int, typer.Option(help="Seconds of each measurement.")] = 3,
    connections: Annotated[int, typer.Option(help="Connections at the same time.")] = 16,
    only: Annotated[str | None, typer.Option(help="stream, leavers or forms.")] = None,
) -> None:
    """Measure streams and forms of numbers."""
    with tempfile.TemporaryDirectory(prefix="bench-streams-") as name:
        if only in (None, "stream"):
            _stream(Path(name), items)
        if only in (None, "leavers"):
            _leavers(Path(name))
        if only in (None, "forms"):
            _forms(Path(name), rounds, seconds, connections)


def _numbers(index: int) -> list[float]:
    return [round(((index * 31 + position * 17) % 1000) / 1000, 3) for position in range(VALUES)]


def _start(folder: Path, *command: str) -> AbstractContextManager[Server]:
    port = free_port()
    filled = [sys.executable, *(part.replace("PORT", str(port)) for part in command)]
    return running(filled, {}, port=port, ready_path="/readyz", log=folder / f"{port}.log")


def _stream(folder: Path, items: int) -> None:
    lines = [json.dumps({"id": index, "instance": _numbers(index)}).encode() + b"\n" for index in range(200)]
    body = folder / "items.ndjson"
    with body.open("wb") as file:
        for index in range(items):
            file.write(lines[index % len(lines)])
    print(f"{items} items of {VALUES} numbers, {body.stat().st_size / 1e6:.0f} MB, through /bulk/anomaly-score")
    with _start(folder, "-m", "app", "serve", "--port", "PORT") as server:
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
    line = json.dumps(_numbers(1)).encode() + b"\n"
    with _start(folder, "-m", "app", "serve", "--port", "PORT") as server:
        httpx.post(f"http://127.0.0.1:{server.port}/bulk/reconstruct", content=line * 2000)
        leavers.measure(server, line)


def _by_httpx(url: str, body: Path) -> bytes:
    with body.open("rb") as file:
        return httpx.post(url, content=file, timeout=None).content.splitlines()[-1]


def _by_curl(url: str, body: Path) -> bytes:
    command = ["curl", "-sN", "-T", str(body), "-X", "POST", url]
    return subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1]


def _forms(folder: Path, rounds: int, seconds: int, connections: int) -> None:
    numbers = json.dumps({"instances": [_numbers(1)]}).encode()
    head = json.dumps(_BINARY).encode()
    tensor = np.asarray(_numbers(1), "<f4").tobytes()
    processes = os.cpu_count() or 1
    own = ("-m", "app", "serve", "--port", "PORT", "--workers", str(processes))
    plain = ("-m", "benchmarks.servers.plain", "PORT", str(processes))
    length = f"Inference-Header-Content-Length: {len(head)}"
    infer = "/v2/models/mnist-basic/infer"
    contenders = {
        "plain FastAPI, JSON": (plain, load.http_request("/reconstruct", numbers, "application/json")),
        "own JSON": (own, load.http_request("/reconstruct?model=mnist-basic", numbers, "application/json")),
        "own binary tensors": (own, load.http_request(infer, head + tensor, "application/octet-stream", [length])),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    closed_loop = wrk.closed_loop if wrk.available() else load.closed_loop
    for _ in range(rounds):
        for name, (command, request) in contenders.items():
            with _start(folder, *command) as server:
                closed_loop(server.port, [request], connections, 1)
                answered = closed_loop(server.port, [request], connections, seconds)
                assert not answered.failed, name
                found[name].append(answered.per_s)
    print(f"{VALUES} numbers in, {VALUES} out, mnist-basic, {connections} connections, {processes} processes each")
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rates in found.items():
        print(f"  {name:20} {medians[name]:7.0f} requests/s ({min(rates):.0f} to {max(rates):.0f})")
    json_ratio = medians["own JSON"] / medians["plain FastAPI, JSON"]
    binary_ratio = medians["own binary tensors"] / medians["own JSON"]
    print(f"  own JSON is {json_ratio:.1f} × plain FastAPI (promise: 5)")
    print(f"  binary tensors are {binary_ratio:.1f} × own JSON (promise: 2)")


if __name__ == "__main__":
    typer.run(bench)
