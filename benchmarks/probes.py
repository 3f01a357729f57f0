"""What no load generator measures: how late deadlines expire, how soon a disconnected caller's rows leave the queue."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

from benchmarks.artifact import SLOW_FEATURES, npy_rows
from benchmarks.load import AnswerReader, http_request

DEADLINE_MS = 50
ABANDONED_ROWS = 200
"""Rows of the request that is left alone: far more than all else that waits, so the gauge shows when they go."""

_PATIENCE_S = 3.0


@contextlib.contextmanager
def busy(port: int, callers: int) -> Iterator[None]:
    """Keeps the executor busy: that many callers, each with one request for bench-slow under way at any time."""
    request = http_request(
        "/encode?model=bench-slow",
        b'{"instances": [[' + b",".join([b"0.5"] * SLOW_FEATURES) + b"]]}",
        "application/json",
    )
    stop = threading.Event()

    def call() -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            while not stop.is_set():
                ask(connection, request)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # until every executor has work
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=30)


def deadline_lateness_ms(port: int, request: bytes, tries: int, limit_s: float) -> tuple[list[float], int]:
    """How long after their deadline requests were answered 504, in ms; and how many were answered in time instead.

    `request` carries a deadline of DEADLINE_MS. Every try has a connection of its own, so all workers get some.
    """
    late: list[float] = []
    in_time = 0
    drawn = random.Random(0)
    end = time.monotonic() + limit_s
    while len(late) < tries and time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            start = time.perf_counter()
            status = ask(connection, request)
            took_ms = (time.perf_counter() - start) * 1e3
        if status == 504:
            late.append(took_ms - DEADLINE_MS)
        else:
            in_time += 1
        time.sleep(drawn.uniform(0, 0.01))  # tries must not march in step with the executor
    return late, in_time


def disconnect_ms(port: int, tries: int, limit_s: float) -> tuple[list[float], int]:
    """How long after a caller hung up its rows had left the queue, in ms; and how many tries never showed in it.

    Told by the gauge of waiting rows, so the time of asking for it is included.
    """
    gone: list[float] = []
    unseen = 0
    request = http_request("/encode?model=bench-slow", npy_rows(ABANDONED_ROWS), "application/x-npy")
    end = time.monotonic() + limit_s
    while len(gone) + unseen < tries and time.monotonic() < end:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(request)
        seen = _until_queue(port, lambda rows: rows >= ABANDONED_ROWS / 2)
        closed = time.perf_counter()
        connection.close()
        if not seen:
            unseen += 1
            continue
        _until_queue(port, lambda rows: rows < ABANDONED_ROWS / 2)
        gone.append((time.perf_counter() - closed) * 1e3)
    return gone, unseen


def ask(connection: socket.socket, request: bytes) -> int:
    """Sends a request and gives the answer's status. Raises OSError if the connection ends instead."""
    connection.sendall(request)
    reader = AnswerReader()
    while True:
        data = connection.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        if (status := reader.feed(data)) is not None:
            return status


def _until_queue(port: int, is_so: Callable[[float], bool]) -> bool:
    """Asks for the number of waiting rows again and again until it is so; False after the patience."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    end = time.monotonic() + _PATIENCE_S
    try:
        while time.monotonic() < end:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            found = re.findall(r"^hourglass_queue_rows(?:\{[^}]*\})? (\S+)", text, re.MULTILINE)
            if found and is_so(sum(map(float, found))):
                return True
    finally:
        connection.close()
    return False
