"""The load generator counts what a server did, and does not forget what a slow one made late."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks import wrk
from benchmarks.load import AnswerReader, closed_loop, http_request, open_loop, poisson_schedule

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
SHED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"
REQUEST = http_request("/score", b"{}", "application/json")


@contextmanager
def answering(answer: Callable[[int], bytes | None]) -> Iterator[int]:
    """A server that gives `answer(how many requests came before)` to each request; None closes the connection."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    counted, lock = [0], threading.Lock()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # the generator hangs up when its time is over
            while connection.recv(1 << 16):
                with lock:
                    number, counted[0] = counted[0], counted[0] + 1
                reply = answer(number)
                if reply is None:
                    return
                connection.sendall(reply)

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.close()


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([OK], 200),
        ([SHED[:5], SHED[5:40], SHED[40:]], 429),
        ([b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"], 503),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", b"0\r\n\r\n"], 200),
    ],
)
def test_an_answer_ends_where_its_head_says(parts: list[bytes], status: int) -> None:
    """However an answer is cut into pieces, its status comes with the last one."""
    reader = AnswerReader()
    assert [reader.feed(part) for part in parts] == [None] * (len(parts) - 1) + [status]


def test_a_reader_is_ready_for_the_next_answer() -> None:
    """Answers that follow each other on one connection are told apart."""
    reader = AnswerReader()
    assert [reader.feed(OK), reader.feed(SHED)] == [200, 429]


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    """The schedule has the asked rate, exponential gaps, and is fixed before anything is sent."""
    due = poisson_schedule(1000, 20, seed=1)
    assert len(due) == pytest.approx(20_000, rel=0.05)
    gaps = np.diff(due)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.array_equal(due, poisson_schedule(1000, 20, seed=1))
    assert not np.array_equal(due[:100], poisson_schedule(1000, 20, seed=2)[:100])


def test_closed_loop_counts_every_kind_of_answer() -> None:
    """Answers, refusals and broken connections are counted apart, and a broken connection is opened anew."""
    with answering(lambda number: (OK, SHED, None)[number % 3]) as port:
        load = closed_loop(port, [REQUEST], 4, 0.3)
    assert load.ok > 0
    assert load.shed == pytest.approx(load.ok, abs=8)
    assert load.failed == pytest.approx(load.ok, abs=8)


def test_open_loop_blames_a_stall_on_every_request_that_was_due_in_it() -> None:
    """A server that stands still makes all requests of that time late: they are sent and timed all the same."""
    stalled = threading.Lock()

    def answer(number: int) -> bytes:
        if number == 20:
            with stalled:
                time.sleep(0.3)
        with stalled:
            return OK

    with answering(answer) as port:
        load = open_loop(port, REQUEST, 200, 1.0)
    assert load.ok + load.failed == len(poisson_schedule(200, 1.0, seed=0))
    assert load.failed == 0
    assert load.p99_s > 0.2


def test_open_loop_does_not_count_what_comes_before_it_has_settled() -> None:
    """Answers of the first moments are neither counted nor timed; the load after them is what it would be anyway."""

    def answer(number: int) -> bytes:
        if number < 20:
            time.sleep(0.2)
        return OK

    with answering(answer) as port:
        whole = open_loop(port, REQUEST, 100, 0.5)
    with answering(answer) as port:
        settled = open_loop(port, REQUEST, 100, 0.5, settle_s=0.5)
    assert whole.p99_s >= 0.2
    due = poisson_schedule(100, 1.0, seed=0)
    assert settled.ok == pytest.approx((due >= 0.5).sum(), abs=5)
    assert settled.p99_s < 0.2


def test_open_loop_counts_refusals_and_what_was_never_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 429 is no answer that counts, and neither is silence: it is a failure once the grace is over."""
    monkeypatch.setattr("benchmarks.load.GRACE_S", 0.1)
    with answering(lambda number: (SHED, b"")[number % 2]) as port:
        load = open_loop(port, REQUEST, 100, 0.5)
    assert load.ok == 0
    assert load.shed > 0
    assert load.failed > 0
    assert load.shed + load.failed == len(poisson_schedule(100, 0.5, seed=0))


def test_what_wrk_reports_is_read() -> None:
    """Statuses above 399 are no answers, and times are in seconds."""
    line = 'RESULT {"us": 2000000, "requests": 110, "status": 10, "broken": 3, "p50": 1500, "p99": 9000}'
    load = wrk.parse_result(f"Running 2s test\n\n{line}\n")
    assert (load.per_s, load.failed, load.p50_s, load.p99_s) == (50, 13, 0.0015, 0.009)
