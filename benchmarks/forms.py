"""What each form of numbers costs: JSON and binary tensors of this service, JSON of a plain FastAPI app."""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from benchmarks import load, wrk
from benchmarks.processes import Server, free_port, running
from benchmarks.results import spread

VALUES = 784
COUNTS = (1, 16, 64)
"""Items of a request: how the forms compare once they, not the request, are what costs."""


def numbers(index: int) -> list[float]:
    """An item, the same every time."""
    return [round(((index * 31 + position * 17) % 1000) / 1000, 3) for position in range(VALUES)]


def start(folder: Path, *command: str) -> AbstractContextManager[Server]:
    """A server on a free port, which replaces PORT in its command; its log is in `folder`."""
    port = free_port()
    filled = [sys.executable, *(part.replace("PORT", str(port)) for part in command)]
    return running(filled, {}, port=port, ready_path="/readyz", log=folder / f"{port}.log")


def measure(folder: Path, rounds: int, seconds: int, connections: int) -> None:
    """Prints requests a second of each form, the forms taking turns, and how they compare.

    The promises are of one item a request; the same with more is printed beside them.
    """
    processes = os.cpu_count() or 1
    own = ("-m", "app", "serve", "--port", "PORT", "--workers", str(processes))
    plain = ("-m", "benchmarks.servers.plain", "PORT", str(processes))
    servers = {"plain FastAPI, JSON": plain, "own JSON": own, "own binary tensors": own}
    closed_loop = wrk.or_own_closed_loop()
    found: dict[tuple[int, str], list[float]] = {}
    for _ in range(rounds):
        for name, command in servers.items():
            with start(folder, *command) as server:
                for items in COUNTS:
                    request = _requests(items)[name]
                    closed_loop(server.port, [request], connections, 1)
                    answered = closed_loop(server.port, [request], connections, seconds)
                    assert not answered.failed, name
                    found.setdefault((items, name), []).append(answered.per_s)
    print(f"{VALUES} numbers in, {VALUES} out, mnist-basic, {connections} connections, {processes} processes each")
    for items in COUNTS:
        print(f"{items} {'item' if items == 1 else 'items'} a request")
        for name in servers:
            print(f"  {name:20} {spread(found[items, name], '{:.0f}')} requests/s")
        ratios = {
            "own JSON is {} × plain FastAPI": _ratios(found, items, "own JSON", "plain FastAPI, JSON"),
            "binary tensors are {} × own JSON": _ratios(found, items, "own binary tensors", "own JSON"),
        }
        for (text, values), promise in zip(ratios.items(), (5, 2), strict=True):
            print(f"  {text.format(spread(values, '{:.1f}'))}" + (f" (promise: {promise})" if items == 1 else ""))


def _ratios(found: dict[tuple[int, str], list[float]], items: int, name: str, other: str) -> list[float]:
    """Within each round."""
    return [mine / its for mine, its in zip(found[items, name], found[items, other], strict=True)]


def _requests(items: int) -> dict[str, bytes]:
    """The request of each form for so many items."""
    rows = [numbers(index) for index in range(1, items + 1)]
    body = json.dumps({"instances": rows}).encode()
    tensor = np.asarray(rows, "<f4").tobytes()
    binary = {
        "inputs": [
            {
                "name": "input",
                "shape": [items, VALUES],
                "datatype": "FP32",
                "parameters": {"binary_data_size": len(tensor)},
            }
        ],
        "outputs": [{"name": "reconstruction", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(binary).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    infer = "/v2/models/mnist-basic/infer"
    return {
        "plain FastAPI, JSON": load.http_request("/reconstruct", body, "application/json"),
        "own JSON": load.http_request("/reconstruct?model=mnist-basic", body, "application/json"),
        "own binary tensors": load.http_request(infer, head + tensor, "application/octet-stream", [length]),
    }
