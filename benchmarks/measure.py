"""One run: starts each server by itself, checks its answers, loads it, round after round, and keeps what it found."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import numpy as np
import orjson
import torch

from benchmarks import bare_loop, load, probes, wrk
from benchmarks.artifact import Stores, interleaved_payloads, payload, stores_in
from benchmarks.jobs import JOBS, Model
from benchmarks.load import Load, http_request
from benchmarks.peers import PeerUnavailable, python_of, version_of
from benchmarks.processes import Server, ServerFailed, free_port, machine_busy_s, running
from benchmarks.results import HEAVY_CONNECTIONS, Cell, OpenCell, Results, per_s
from benchmarks.servers import BARE, CONTENDERS, HOURGLASS, MOSEC, NAIVE_DEF, Contender, Launch

TOLERANCE = 1e-5
"""Largest difference between a server's answer and the module's own."""

OPEN_SHARES = (0.5, 0.8, 0.95, 2.0)
OVERLOAD = 5.0
QUEUE_S = 0.05
"""For the overload each worker's queue is bounded to what it does in this time: what an operator would do who promises
answers within some tenth of a second. The default bound is for bursts and lets accepted requests wait for seconds."""
SETTLE_S = 0.5
"""How long a load is offered in the open loop before it counts."""
OVERLOAD_GATHER_S = 0.004
"""How close arrivals of the overload are to be sent together, where latencies are tens of milliseconds and more: what
the load generator takes is missing for the service, and at five times its capacity that is five times as much."""

ROUND_GROUPS = ("score", "reconstruct", "latent", "conv", "interleaved", "open", "overload")
ONCE_GROUPS = ("idle", "promptness")
GROUPS = (*ROUND_GROUPS, *ONCE_GROUPS)

_COMPARED: Mapping[str, Sequence[Contender]] = {
    "score": CONTENDERS,
    "reconstruct": (HOURGLASS, MOSEC, BARE),
    "latent": (HOURGLASS, MOSEC, BARE),
    "conv": (HOURGLASS, MOSEC, BARE, NAIVE_DEF),
}
_CONNECTIONS: Mapping[str, Sequence[int]] = {
    "score": (1, 16, 64, 256), "reconstruct": (64,), "latent": (64,), "conv": (HEAVY_CONNECTIONS,)
}  # fmt: skip


class PassedOver(Exception):
    """A server failed; it is in the results, and the run goes on with the next."""


@dataclass(frozen=True)
class Plan:
    """What to run and for how long."""

    groups: Sequence[str]
    rounds: int
    seconds: int
    workers: int
    folder: Path
    use_wrk: bool
    every_server: bool
    idle_s: float
    tries: int
    limit_s: float
    is_quick: bool = False


@dataclass
class Run:
    """Carries out a plan; `say` is told of every step."""

    plan: Plan
    say: Callable[[str], None]
    results: Results = field(default_factory=Results)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self._started = time.monotonic()
        self._pythons: dict[str, Path] = {}
        self._expected: dict[str, np.ndarray[Any, Any]] = {}
        self._stores: Stores | None = None

    @property
    def stores(self) -> Stores:
        """The artifacts, made at the first use."""
        if self._stores is None:
            self.say("making the artifacts, unless they are there")
            self._stores = stores_in(self.plan.folder / "store")
        return self._stores

    def carry_out(self) -> None:
        """Every round of the plan, then what is measured once; stops early when the time is up."""
        self.say(f"artifacts in {self.stores.small.parent}")
        for number in range(1, self.plan.rounds + 1):
            for group in [group for group in ROUND_GROUPS if group in self.plan.groups]:
                if not self._time_is_left(f"round {number}, {group}"):
                    return
                self.say(f"round {number} of {self.plan.rounds}: {group}")
                with contextlib.suppress(PassedOver):
                    getattr(self, f"_measure_{group}")(number)
        for group in [group for group in ONCE_GROUPS if group in self.plan.groups]:
            if not self._time_is_left(group):
                return
            self.say(group)
            with contextlib.suppress(PassedOver):
                getattr(self, f"_measure_{group}")()

    def _time_is_left(self, upcoming: str) -> bool:
        if time.monotonic() - self._started < self.plan.limit_s:
            return True
        self.results.notes.append(f"The time was up before: {upcoming}. What follows it is missing.")
        self.say(self.results.notes[-1])
        return False

    def _measure_score(self, number: int) -> None:
        model = Model(self.stores.small, JOBS["score"])
        forward_s = bare_loop.forward_s(model, "score", payload("score"))
        self.results.add_scalar("bare forward ms", number, forward_s * 1e3)
        self._compare("score", number)

    def _measure_reconstruct(self, number: int) -> None:
        self._compare("reconstruct", number)

    def _measure_latent(self, number: int) -> None:
        self._compare("latent", number)

    def _measure_conv(self, number: int) -> None:
        rate = bare_loop.rate_per_s(self.stores.conv, "conv", payload("conv"), self.plan.workers, self.plan.seconds)
        self.say(f"  bare loop: {rate:.0f}/s")
        self.results.add_scalar("bare loop per s", number, rate)
        self._compare("conv", number)

    def _compare(self, job: str, number: int) -> None:
        """Every server of a job, one after the other, in an order that changes from round to round."""
        contenders = list(CONTENDERS if self.plan.every_server else _COMPARED[job])
        turn = (number - 1) % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            if contender.name in self.results.failures:
                continue
            with contextlib.suppress(PassedOver), self._visit(contender, job) as server:
                self._measure_cells(contender, job, number, server)

    def _measure_cells(self, contender: Contender, job: str, number: int, server: Server) -> None:
        body, content_type = contender.body(job, payload(job))
        request = http_request(contender.path(job), body, content_type)
        load.closed_loop(server.port, [request], 16, self._warm_up_s)
        for connections in self._connections(job):
            cell = self._cell(server, [request], connections, counts_batches=contender is HOURGLASS)
            self.results.cells.setdefault((contender.name, job, connections), {})[number] = cell
            self.say(
                f"  {contender.name}, {connections}: {cell.load.per_s:.0f}/s, p50 {cell.load.p50_s * 1e3:.2f} ms, "
                f"p99 {cell.load.p99_s * 1e3:.2f} ms" + (f", {cell.load.failed} failed" if cell.load.failed else "")
            )
        if job == "score":
            self.results.memory_mib.setdefault(contender.name, []).append(server.memory_bytes() / 2**20)

    def _cell(self, server: Server, requests: Sequence[bytes], connections: int, *, counts_batches: bool) -> Cell:
        batches = _batches(server) if counts_batches else None
        started, busy_s, own_s, cpu_s = time.monotonic(), machine_busy_s(), _own_cpu_s(), server.cpu_s()
        closed_loop = wrk.closed_loop if self.plan.use_wrk else load.closed_loop
        found = closed_loop(server.port, requests, connections, self.plan.seconds)
        cpu_s = server.cpu_s() - cpu_s
        others_s = machine_busy_s() - busy_s - (_own_cpu_s() - own_s) - cpu_s
        self.results.other_load.append(max(0.0, others_s) / (time.monotonic() - started) / (os.cpu_count() or 1))
        mean = None
        if batches is not None:
            rows, count = (after - before for after, before in zip(_batches(server), batches, strict=True))
            mean = rows / count if count else None
        return Cell(found, cpu_s, mean)

    def _measure_interleaved(self, number: int) -> None:
        """Three kinds of requests in turn, against what the service does of each kind alone.

        At equal shares the mix takes, per request, the mean of the three kinds' times: the ratio to that is 1 where
        mixing costs nothing.
        """
        with self._visit(HOURGLASS, "score") as server:
            requests = [http_request(path, body, "application/json") for path, body in interleaved_payloads()]
            load.closed_loop(server.port, requests, 16, self._warm_up_s)
            alone = [self._cell(server, [request], 64, counts_batches=True) for request in requests]
            mixed = self._cell(server, requests, 64, counts_batches=True)
            ideal = len(alone) / sum(1 / max(cell.load.per_s, 1e-9) for cell in alone)
            self.results.add_scalar("interleaved share", number, mixed.load.per_s / ideal)
            for kind, cell in zip(("kind 1", "kind 2", "kind 3"), alone, strict=True):
                self.results.cells.setdefault(("hourglass", f"interleaved, {kind} alone", 64), {})[number] = cell
            self.results.cells.setdefault(("hourglass", "interleaved, all three", 64), {})[number] = mixed
            self.say(
                f"  alone {', '.join(f'{cell.load.per_s:.0f}' for cell in alone)}/s, mixed {mixed.load.per_s:.0f}/s"
            )

    def _measure_open(self, number: int) -> None:
        with self._visit(HOURGLASS, "score") as server:
            request = self._request("score")
            load.closed_loop(server.port, [request], 16, self._warm_up_s)
            capacity = load.closed_loop(server.port, [request], 64, self.plan.seconds).per_s
            for share in OPEN_SHARES:
                self._open(server, "score", request, share, capacity, number)

    def _measure_overload(self, number: int) -> None:
        request = self._request("conv")
        known = list(self.results.rounds_of("hourglass", "conv", HEAVY_CONNECTIONS, per_s).values())
        capacity = known[0] if known else self.results.scalars.get("conv capacity", {}).get(1)
        if capacity is None:
            with self._visit(HOURGLASS, "conv") as server:
                load.closed_loop(server.port, [request], 16, self._warm_up_s)
                capacity = load.closed_loop(server.port, [request], HEAVY_CONNECTIONS, self.plan.seconds).per_s
            self.results.add_scalar("conv capacity", 1, capacity)
        # At least what the closed loop has under way at once: its connections may all have come to one worker.
        rows = max(HEAVY_CONNECTIONS, round(capacity / self.plan.workers * QUEUE_S))
        with self._visit(HOURGLASS, "conv", environment={"HOURGLASS_MAX_QUEUE_ROWS": str(rows)}) as server:
            load.closed_loop(server.port, [request], 16, self._warm_up_s)
            peak = load.closed_loop(server.port, [request], HEAVY_CONNECTIONS, self.plan.seconds).per_s
            half = self._open(server, "conv", request, 0.5, peak, number, OVERLOAD_GATHER_S)
            five = self._open(server, "conv", request, OVERLOAD, peak, number, OVERLOAD_GATHER_S)
            # Before and after: the machine's own speed drifts within seconds.
            again = load.closed_loop(server.port, [request], HEAVY_CONNECTIONS, self.plan.seconds).per_s
            peak = (peak + again) / 2
        self.results.add_scalar("overload goodput share", number, five.per_s / peak)
        self.results.add_scalar("overload p99 ratio", number, five.p99_s / half.p99_s)

    def _open(
        self,
        server: Server,
        job: str,
        request: bytes,
        share: float,
        capacity: float,
        number: int,
        gather_s: float = load.GATHER_S,
    ) -> Load:
        found = load.open_loop(
            server.port,
            request,
            share * capacity,
            self.plan.seconds,
            seed=number,
            settle_s=SETTLE_S,
            gather_s=gather_s,
        )
        cells = self.results.open_cells.setdefault(job, {})
        cells.setdefault(share, []).append(OpenCell(share, share * capacity, found))
        self.say(
            f"  open loop, {job}, {share:.0%} of {capacity:.0f}/s: {found.per_s:.0f}/s, {found.shed} shed, "
            f"{found.failed} failed, p99 {found.p99_s * 1e3:.1f} ms, generator late {found.late_s * 1e3:.1f} ms"
        )
        return found

    def _measure_idle(self) -> None:
        with self._visit(HOURGLASS, "score") as server:
            time.sleep(1.0)
            before = server.cpu_s()
            time.sleep(self.plan.idle_s)
            self.results.add_scalar("idle cpu %", 1, (server.cpu_s() - before) / self.plan.idle_s * 100)

    def _measure_promptness(self) -> None:
        request = self._request("score", f"X-Request-Timeout-Ms: {probes.DEADLINE_MS}")
        # One process: what it says of another's queue is up to a heartbeat old.
        visit = self._visit(HOURGLASS, "score", self.stores.slow, {"HOURGLASS_WORKERS": "1"})
        with visit as server, probes.busy(server.port, 4):
            late, in_time = probes.deadline_lateness_ms(server.port, request, self.plan.tries, limit_s=60)
            self._keep_tries("deadline lateness", late, f"{in_time} more were answered otherwise than by 504")
            gone, unseen = probes.disconnect_ms(server.port, self.plan.tries, limit_s=60)
            self._keep_tries("disconnect", gone, f"{unseen} more never showed in the gauge")

    def _keep_tries(self, name: str, tries: list[float], remark: str) -> None:
        self.results.samples_ms[name] = tries
        note = f"{name}: {len(tries)} tries; {remark}"
        self.results.notes.append(f"{note}.")
        self.say(f"  {note}")

    @contextlib.contextmanager
    def _visit(
        self, contender: Contender, job: str, store: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Iterator[Server]:
        """A server that does the job and has answered it rightly.

        Raises PassedOver, and keeps why, if it does not, or if it fails later within the `with` block.
        """
        with contextlib.ExitStack() as stack:
            try:
                server = self._start(stack, contender, job, store or self.stores.of(job), environment or {})
                self._check_answer(contender, job, server)
                yield server
            except (ServerFailed, PeerUnavailable, OSError, HTTPException, SubprocessError) as error:
                self.results.failures[contender.name] = str(error)
                self.say(f"  {contender.name}: {error}")
                raise PassedOver from error

    def _start(
        self, stack: contextlib.ExitStack, contender: Contender, job: str, store: Path, more: Mapping[str, str]
    ) -> Server:
        python = Path(sys.executable) if contender.package is None else self._python(contender.package)
        launch = Launch(python, free_port(), store.resolve(), job, self.plan.workers)
        return stack.enter_context(
            running(
                contender.command(launch),
                {**contender.environment(launch), **more},
                port=launch.port,
                ready_path=contender.ready_path,
                log=self.plan.folder / "logs" / f"{contender.name.replace(' ', '-')}.log",
            )
        )

    def _python(self, package: str) -> Path:
        if package not in self._pythons:
            self.say(f"  {package}: making its environment, unless it is there")
            self._pythons[package] = python_of(package, (self.plan.folder / "venvs").resolve())
            self.versions[package] = version_of(package, self._pythons[package])
        return self._pythons[package]

    def _check_answer(self, contender: Contender, job: str, server: Server) -> None:
        """Raises ServerFailed unless the server's answer is the module's own, within TOLERANCE."""
        if job not in self._expected:
            model = Model(self.stores.of(job), JOBS[job])
            self._expected[job] = model.run([JOBS[job].decode(payload(job))])[0].reshape(-1)
        body, content_type = contender.body(job, payload(job))
        status, answer = server.post(contender.path(job), body, content_type)
        if status != 200:
            raise ServerFailed(f"{job}: expected status 200, found {status}: {answer[:200].decode(errors='replace')}")
        found = numbers_of(orjson.loads(answer))
        expected = self._expected[job]
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=TOLERANCE):
            raise ServerFailed(f"{job}: expected {expected[:3]}…, found {found[:3]}…")

    def _request(self, job: str, *headers: str) -> bytes:
        body, content_type = HOURGLASS.body(job, payload(job))
        return http_request(HOURGLASS.path(job), body, content_type, headers)

    def _connections(self, job: str) -> Sequence[int]:
        """How many connections load the job; in a smoke run only as many as a promise is about."""
        return [count for count in _CONNECTIONS[job] if not (self.plan.is_quick and job == "score" and count == 16)]

    @property
    def _warm_up_s(self) -> float:
        return min(1.5, self.plan.seconds / 2)


def numbers_of(answer: Any) -> np.ndarray[Any, Any]:
    """The numbers that a server's JSON answer is about, flat: its one result's score, latent or reconstruction."""
    if isinstance(answer, dict) and "results" in answer:
        answer = answer["results"]
    if isinstance(answer, list):
        answer = answer[0]
    named = next(answer[name] for name in ("score", "latent", "reconstruction", "reconstruct") if name in answer)
    return np.asarray(named, dtype=np.float64).reshape(-1)


def _own_cpu_s() -> float:
    """Processor seconds of this process and of the load generators it has waited for."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def _batches(server: Server) -> tuple[float, float]:
    """Rows and batches that this service has run so far."""
    text = server.get("/metrics")[1].decode()
    sums = re.findall(r"^hourglass_batch_rows_sum(?:\{[^}]*\})? (\S+)", text, re.MULTILINE)
    counts = re.findall(r"^hourglass_batch_rows_count(?:\{[^}]*\})? (\S+)", text, re.MULTILINE)
    return sum(map(float, sums)), sum(map(float, counts))
