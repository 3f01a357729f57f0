"""Sends requests over many keep-alive connections and times the answers: closed loop or open loop, one thread, epoll.

Own, because no widely installed tool sends on a schedule that was fixed beforehand: one that waits for an answer
before it sends the next request does not see the requests that a slow server made it leave out.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIRST_CONNECTIONS, MAX_CONNECTIONS = 64, 1024
GRACE_S = 3.0  # how long open loop waits for the last answers
GATHER_S = 0.0005
"""Arrivals that are closer are sent together: each look at the clock takes from the server."""


@dataclass(frozen=True)
class Load:
    """What came of a load: counts, and the latencies of the answers with status 200, in seconds.

    `failed` are other statuses than 200 and 429, broken connections and requests that got no answer; `late_s` is how
    far the generator itself lagged behind its schedule at worst but one in a hundred.
    """

    seconds: float
    ok: int
    shed: int
    failed: int
    p50_s: float
    p99_s: float
    late_s: float = 0.0

    @property
    def per_s(self) -> float:
        """Answers with status 200 a second."""
        return self.ok / self.seconds


def http_request(path: str, body: bytes, content_type: str, headers: Sequence[str] = ()) -> bytes:
    """A POST as it goes over the wire."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def poisson_schedule(rate_per_s: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """When to send, in seconds from the start, ascending: independent arrivals of that rate."""
    drawn = np.random.default_rng(seed).exponential(1 / rate_per_s, size=int(rate_per_s * seconds * 1.5) + 100)
    due: NDArray[np.float64] = np.cumsum(drawn)
    return due[due < seconds]


class AnswerReader:
    """Finds the end of one HTTP/1.1 answer in the bytes that arrive; `feed` gives its status once it is whole."""

    def __init__(self) -> None:
        self._data = b""
        self._length = -1  # of the whole answer; -1: the head is not whole yet; -2: chunked

    def feed(self, data: bytes) -> int | None:
        """The answer's status, or None while bytes are missing."""
        self._data = self._data + data if self._data else data
        if self._length == -1:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = self._data[:end].lower()
            at = head.find(b"\r\ncontent-length:")
            if at >= 0:
                self._length = end + 4 + int(head[at + 17 :].split(b"\r\n", 1)[0])
            else:
                self._length = -2
        whole = self._data.endswith(b"0\r\n\r\n") if self._length == -2 else len(self._data) >= self._length
        if not whole:
            return None
        status = int(self._data[9:12])
        self._data, self._length = b"", -1
        return status


class _Connections:
    """Keep-alive connections to one port, at most one request under way on each; owns their sockets."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._epoll = select.epoll()
        self._open: dict[int, tuple[socket.socket, AnswerReader]] = {}
        self._idle: list[int] = []
        self._since: dict[int, float] = {}  # of the requests under way

    def close(self) -> None:
        for connection, _ in self._open.values():
            connection.close()
        self._epoll.close()

    @property
    def under_way(self) -> int:
        """Requests without an answer."""
        return len(self._since)

    @property
    def has_room(self) -> bool:
        """Whether one more request can be sent."""
        return bool(self._idle) or len(self._open) < MAX_CONNECTIONS

    def open(self) -> None:
        """Opens one more connection, idle."""
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        connection.setblocking(False)
        self._open[connection.fileno()] = (connection, AnswerReader())
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        self._idle.append(connection.fileno())

    def send(self, request: bytes, since: float) -> None:
        """Sends a request, which waits since then, over an idle connection, or over a new one."""
        if not self._idle:
            self.open()
        number = self._idle.pop()
        self._since[number] = since
        try:
            sent = self._open[number][0].send(request)
        except OSError:
            return  # broken: the poll tells
        if sent != len(request):
            raise RuntimeError(f"request: expected room for {len(request)} bytes in the socket, found {sent}")

    def answers(self, timeout_s: float) -> Iterator[tuple[float, int]]:
        """Since when the request waited, and the answer's status; 0 where the connection broke instead."""
        if timeout_s > 0:
            # Epoll's own timeout counts in milliseconds; an epoll descriptor can itself be waited for.
            select.select([self._epoll], [], [], timeout_s)
        for number, _ in self._epoll.poll(0, MAX_CONNECTIONS):
            connection, reader = self._open[number]
            try:
                data = connection.recv(1 << 18)
            except OSError:
                data = b""
            status = reader.feed(data) if data else 0
            if status is None:
                continue
            since = self._since.pop(number, None)
            if status:
                self._idle.append(number)
            else:
                self._drop(number)
            if since is not None:
                yield since, status

    def _drop(self, number: int) -> None:
        connection, _ = self._open.pop(number)
        if number in self._idle:
            self._idle.remove(number)
        self._epoll.unregister(number)
        connection.close()


@contextlib.contextmanager
def _connections(port: int) -> Iterator[_Connections]:
    connections = _Connections(port)
    gc.disable()  # a collection here would be a pause that the server is blamed for
    try:
        yield connections
    finally:
        gc.enable()
        connections.close()


def closed_loop(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """As many requests as the server answers: each connection sends its next one when it has its answer.

    The requests are sent in turn, over whatever connection is free.
    """
    latencies: list[float] = []
    shed = failed = 0
    in_turn = itertools.cycle(requests)
    with _connections(port) as pool:
        start = time.perf_counter()
        end = start + seconds
        for _ in range(connections):
            pool.send(next(in_turn), time.perf_counter())
        while (now := time.perf_counter()) < end:
            for since, status in pool.answers(end - now):
                done = time.perf_counter()
                if status == 200:
                    latencies.append(done - since)
                elif status == 429:
                    shed += 1
                else:
                    failed += 1
                pool.send(next(in_turn), done)
        took = time.perf_counter() - start
    return _load(took, latencies, shed, failed)


def open_loop(
    port: int,
    request: bytes,
    rate_per_s: float,
    seconds: float,
    seed: int = 0,
    *,
    settle_s: float = 0.0,
    gather_s: float = GATHER_S,
) -> Load:
    """Poisson arrivals at `rate_per_s`, whatever the server does; latencies count from when a request was due.

    Args:
        port: where to send.
        request: what to send.
        rate_per_s: arrivals a second.
        seconds: how long the load is counted.
        seed: of the arrivals.
        settle_s: how long the load lasts before it is counted: until the connections are made and the queue is as full
            as it will be. Failures count from the beginning.
        gather_s: arrivals that are closer are sent together.
    """
    due = poisson_schedule(rate_per_s, settle_s + seconds, seed).tolist()
    latencies: list[float] = []
    lags: list[float] = []
    shed = failed = in_time = upcoming = 0
    waiting: deque[float] = deque()  # due, but every connection is taken
    with _connections(port) as pool:
        for _ in range(FIRST_CONNECTIONS):
            pool.open()
        start = time.perf_counter()
        settled = start + settle_s
        end = settled + seconds
        while True:
            now = time.perf_counter()
            while upcoming < len(due) and start + due[upcoming] <= now:
                waiting.append(start + due[upcoming])
                lags.append(now - waiting[-1])
                upcoming += 1
            while waiting and pool.has_room:
                pool.send(request, waiting.popleft())
            if upcoming == len(due) and not waiting and not pool.under_way:
                break
            if now > end + GRACE_S:
                failed += len(waiting) + pool.under_way
                break
            next_due = start + due[upcoming] if upcoming < len(due) else end + GRACE_S
            wait_s = next_due - time.perf_counter()
            if wait_s < gather_s:
                time.sleep(gather_s)  # what comes meanwhile is sent, and what is answered read, all at once
                wait_s = 0
            for since, status in pool.answers(wait_s):
                done = time.perf_counter()
                if status == 200:
                    if since >= settled:
                        latencies.append(done - since)
                    in_time += settled <= done <= end
                elif status == 429:
                    shed += settled <= done
                else:
                    failed += 1
    load = _load(seconds, latencies, shed, failed)
    late = float(np.percentile(lags, 99)) if lags else 0.0
    # What was answered after the end was not answered within these seconds.
    return Load(seconds, in_time, load.shed, load.failed, load.p50_s, load.p99_s, late)


def _load(seconds: float, latencies: list[float], shed: int, failed: int) -> Load:
    p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (float("nan"), float("nan"))
    return Load(seconds, len(latencies), shed, failed, p50, p99)
