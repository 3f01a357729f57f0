"""One thread that runs jobs in order, can be watched from outside and replaced when it dies. Knows nothing of torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThreadDied(RuntimeError):
    """The thread ended in the middle of a job."""


@dataclass(eq=False, slots=True)
class _Job:
    number: int
    future: Future[Any]
    call: Callable[[], Any]
    has_started: bool = False


class WorkerThread(Executor):
    """An executor of one daemon thread. Whoever made it calls `shutdown`.

    Args:
        name: the thread's.
        initialize: called on the thread before any job.

    concurrent.futures' own neither tells which job runs nor replaces a thread that died: whoever waits, waits forever.
    """

    def __init__(self, name: str, initialize: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self._initialize = initialize
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._unfinished: dict[int, _Job] = {}  # in the order of submission
        self._is_shut = False
        self._current: int | None = None
        self._thread = self._start()

    def __repr__(self) -> str:
        state = "dead" if not self.is_alive else "idle" if self._current is None else f"in job {self._current}"
        return f"<WorkerThread {self.name} {state}, {len(self._unfinished)} jobs>"

    @property
    def current(self) -> int | None:
        """Number of the job that runs now; None while there is none."""
        return self._current

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, or was asked to end."""
        return self._is_shut or self._thread.is_alive()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queues a call; raises RuntimeError after `shutdown`."""
        job = _Job(next(self._numbers), Future(), lambda: fn(*args, **kwargs))
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"{self.name}: was shut down")
            self._unfinished[job.number] = job
            self._jobs.put(job)
        return job.future

    def revive(self) -> None:
        """Replaces a thread that died: the job that it was in fails with ThreadDied, those behind it still run."""
        with self._lock:
            if self.is_alive:
                return
            left = list(self._unfinished.values())
            lost = [job for job in left if job.has_started]
            for job in lost:
                del self._unfinished[job.number]
            self._current = None
            self._jobs = SimpleQueue()
            for job in left:
                if not job.has_started:
                    self._jobs.put(job)
            self._thread = self._start()
        for job in lost:
            job.future.set_exception(ThreadDied(f"{self.name}: the thread died"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the thread after what was submitted, or, with `cancel_futures`, after what runs."""
        with self._lock:
            self._is_shut = True
            if cancel_futures:
                for job in list(self._unfinished.values()):
                    job.future.cancel()
            self._jobs.put(None)
        if wait:
            self._thread.join()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(self._jobs,), name=self.name, daemon=True)
        thread.start()
        return thread

    def _run(self, jobs: SimpleQueue[_Job | None]) -> None:
        self._initialize()
        while (job := jobs.get()) is not None:
            self._run_one(job)
            del job  # or what it holds, a model perhaps, would live until the next one comes

    def _run_one(self, job: _Job) -> None:
        future = job.future
        job.has_started = True
        self._current = job.number
        result, failure = None, None
        try:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = job.call()
            except BaseException as error:  # noqa: BLE001  it belongs to whoever waits for the job
                failure = error
            # Before anybody is told: the thread that is woken by it would have to wait until this one is done.
            self._forget(job)
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
        finally:
            if not future.done():  # killed on the way
                future.set_exception(ThreadDied(f"{self.name}: the thread died"))
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        if self._current is not None:
            self._current = None
            with self._lock:
                self._unfinished.pop(job.number, None)
