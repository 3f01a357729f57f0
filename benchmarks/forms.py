"""What each form of numbers costs: JSON and binary tensors of this service, JSON of a plain FastAPI app."""

from __future__ import annotations

import json
import os
import statistics
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from benchmarks import load, wrk
from benchmarks.processes import Server, free_port, running

VALUES = 784
_BINARY = {
    "inputs": [
        {"name": "input", "shape": [1, VALUES], "datatype": "FP32", "parameters": {"binary_data_size": 4 * VALUES}}
    ],
    "outputs": [{"name": "reconstruction", "parameters": {"binary_data": True}}],
}


def numbers(index: int) -> list[float]:
    """An item, the same every time."""
    return [round(((index * 31 + position * 17) % 1000) / 1000, 3) for position in range(VALUES)]


def start(folder: Path, *command: str) -> AbstractContextManager[Server]:
    """A server on a free port, which replaces PORT in its command; its log is in `folder`."""
    port = free_port()
    filled = [sys.executable, *(part.replace("PORT", str(port)) for part in command)]
    return running(filled, {}, port=port, ready_path="/readyz", log=folder / f"{port}.log")


def measure(folder: Path, rounds: int, seconds: int, connections: int) -> None:
    """Prints requests a second of each form, the forms taking turns, and how they compare."""
    body = json.dumps({"instances": [numbers(1)]}).encode()
    head = json.dumps(_BINARY).encode()
    tensor = np.asarray(numbers(1), "<f4").tobytes()
    processes = os.cpu_count() or 1
    own = ("-m", "app", "serve", "--port", "PORT", "--workers", str(processes))
    plain = ("-m", "benchmarks.servers.plain", "PORT", str(processes))
    length = f"Inference-Header-Content-Length: {len(head)}"
    infer = "/v2/models/mnist-basic/infer"
    contenders = {
        "plain FastAPI, JSON": (plain, load.http_request("/reconstruct", body, "application/json")),
        "own JSON": (own, load.http_request("/reconstruct?model=mnist-basic", body, "application/json")),
        "own binary tensors": (own, load.http_request(infer, head + tensor, "application/octet-stream", [length])),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    closed_loop = wrk.closed_loop if wrk.available() else load.closed_loop
    for _ in range(rounds):
        for name, (command, request) in contenders.items():
            with start(folder, *command) as server:
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
