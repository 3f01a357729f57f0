"""Whether the devices still do what they are asked: canaries, a watchdog, and the end where nothing else helps."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from app.catalog import Catalog
from app.errors import DeviceLost, ServiceError
from app.served_model import ServedModel

logger = logging.getLogger(__name__)

# Seldom, for an idle service should cost nothing; more often where what is promised is shorter.
_LOOK_EVERY_S, _TEND_EVERY_S = 0.25, 0.5
_LOOKS_PER_LIMIT = 4
_LONGEST_PAUSE_LOOKS = 3  # what counts of a pause of the whole process, which is nobody's stall
_STUCK_LOOKS = 25
_ANSWERS_S = 0.5
_CANARIES_PER_WINDOW = 4


@dataclass
class _Stall:
    """How long something was seen to be stuck at the same place."""

    place: object = None
    seen_s: float = 0.0

    def look(self, place: object, passed_s: float) -> float:
        """Adds the time since the last look if nothing has moved since then; None as place means nothing to do."""
        self.seen_s = self.seen_s + passed_s if place is not None and place == self.place else 0.0
        self.place = place
        return self.seen_s


class Health:
    """Watches the catalog's threads and models, and knows why the service is not ready. Open it with `async with`.

    Where nobody asks a needed model, a canary does, through the same queue and on the same device. A thread of its own
    looks at the devices' threads and at the event loop: one that died is replaced; a forward pass, or the event loop
    itself, that is stuck for `stall_s` ends the process, as a lost device does, after everyone was answered.

    Args:
        catalog: what is watched.
        within_s: how long ago a needed model may have run.
        stall_s: how long a forward pass may take.
        end: ends the process.
    """

    def __init__(self, catalog: Catalog, *, within_s: float, stall_s: float, end: Callable[[], None]) -> None:
        self._catalog = catalog
        self._within_s = within_s
        self._stall_s = stall_s
        self._end = end
        self._look_every_s = min(_LOOK_EVERY_S, stall_s / _LOOKS_PER_LIMIT)
        self._tend_every_s = min(_TEND_EVERY_S, stall_s / _LOOKS_PER_LIMIT, within_s / (2 * _CANARIES_PER_WINDOW))
        self._lost: str | None = None
        self._turns = 0
        self._looked_at_s = time.monotonic()
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._tending: asyncio.Task[None] | None = None
        self._canaries: dict[ServedModel, asyncio.Task[None]] = {}
        self._failures: dict[ServedModel, str] = {}

    def __repr__(self) -> str:
        return f"<Health of {self._catalog!r}: {self._lost or 'watching'}>"

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._tending = asyncio.create_task(self._tend(), name="canaries")
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        tasks = [*self._canaries.values(), *([self._tending] if self._tending else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.join)

    @property
    def reasons_not_live(self) -> list[str]:
        """Why the process should be started anew; empty while it is well."""
        reasons = [self._lost] if self._lost else []
        if not self._thread.is_alive() and not self._closing.is_set():
            reasons.append("the watchdog's thread died")
        elif self._loop is not None and time.monotonic() - self._looked_at_s > _STUCK_LOOKS * _LOOK_EVERY_S:
            reasons.append("the watchdog's thread is stuck")
        if not self._catalog.loader.is_alive:
            reasons.append("the loader's thread died")
        return reasons

    def reasons_not_ready(self) -> list[str]:
        """Why requests would not be answered, as far as devices and threads go; from what is known already."""
        reasons = [self._lost] if self._lost else []
        reasons += [f"{thread!r}: its thread died" for thread in self._catalog.threads if not thread.is_alive]
        now = time.monotonic()
        device_ran = now - self._catalog.ran_at_s <= self._within_s
        for served in self._needed():
            silent_s = now - served.pulse.succeeded_at_s
            if served in self._failures:
                reasons.append(f"{served}: its last forward pass failed: {self._failures[served]}")
            elif silent_s > self._within_s and not device_ran:
                # Where the device ran others meanwhile, the canary only waits its turn: overload is no illness.
                reasons.append(f"{served}: no forward pass for {silent_s:.1f} s")
        return reasons

    def lose(self, reason: str) -> None:
        """The device is lost: answers everyone, and ends the process."""
        if self._lost is None:
            self._lost = reason
            logger.critical("ending: %s", reason)
            threading.Thread(target=self._finish, args=(reason,), name="ending", daemon=True).start()

    def _needed(self) -> list[ServedModel]:
        """Default versions of the required models; without any, the first that is in memory stands for all."""
        names = self._catalog.required_models or sorted(self._catalog.models)
        served = [self._catalog.default_version(name) for name in names]
        found = [model for model in served if model is not None and model.in_memory]
        return found if self._catalog.required_models else found[:1]

    async def _tend(self) -> None:
        """Sends canaries where nobody else asks; runs on the event loop."""
        while True:
            self._turns += 1
            needed = self._needed()
            for served in [served for served in self._failures if served not in needed]:
                del self._failures[served]
            for served in needed:
                silent_s = time.monotonic() - served.pulse.succeeded_at_s
                if not served.pulse.has_failed and silent_s < self._within_s / _CANARIES_PER_WINDOW:
                    self._failures.pop(served, None)
                elif served not in self._canaries:
                    self._canaries[served] = asyncio.create_task(self._try(served), name=f"canary {served}")
            del needed
            await asyncio.sleep(self._tend_every_s)

    async def _try(self, served: ServedModel) -> None:
        try:
            await served.try_canary(self._within_s)
            self._failures.pop(served, None)
        except ServiceError as error:
            if self._failures.get(served) != str(error):
                logger.error("canary of %s failed: %s", served, error)  # noqa: TRY400  the batcher told the rest
            self._failures[served] = str(error)
        finally:
            del self._canaries[served]

    def _watch(self) -> None:
        """Runs on the watchdog's thread."""
        threads: dict[str, _Stall] = {}
        loop_stall = _Stall()
        while not self._closing.wait(self._look_every_s):
            now = time.monotonic()
            passed_s = min(now - self._looked_at_s, _LONGEST_PAUSE_LOOKS * self._look_every_s)
            self._looked_at_s = now
            for thread in self._catalog.threads:
                if not thread.is_alive:
                    logger.critical("%r: its thread died; another one takes its place", thread)
                    thread.revive()
                stalled_s = threads.setdefault(thread.name, _Stall()).look(thread.current, passed_s)
                if stalled_s > self._stall_s:
                    self.lose(f"{thread.name}: a forward pass is not over after {self._stall_s:g} s")
            if not self._catalog.loader.is_alive:
                logger.critical("the loader's thread died; another one takes its place")
                self._catalog.loader.revive()
            if loop_stall.look(self._turns, passed_s) > self._stall_s:
                self.lose(f"the event loop is stuck for {self._stall_s:g} s")

    def _finish(self, reason: str) -> None:
        """Answers everyone, then ends the process; runs on a thread of its own."""
        answered = threading.Event()
        if self._loop is not None and not self._loop.is_closed():

            def answer(loop: asyncio.AbstractEventLoop) -> None:
                self._catalog.batcher.give_up(DeviceLost(reason))
                loop.call_later(_ANSWERS_S, answered.set)

            self._loop.call_soon_threadsafe(answer, self._loop)
            answered.wait(2 * _ANSWERS_S)
        self._end()
