"""The bare app with one owner of the device: HTTP processes without a model, one process that runs all their batches.

Items and answers lie in memory that all of them share, and eventfds wake whoever has something to do; nothing is
pickled. What a replica of the model in every process, the bare app's way, is measured against.
"""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass

import numpy as np
import torch
import uvicorn
import uvloop
from numpy.typing import NDArray

from benchmarks.jobs import Array, Job, Model
from benchmarks.servers.bare import App
from benchmarks.servers.options import Options

SLOTS = 256
"""Items of one HTTP process under way at the same time."""

FREE, WAITING, RUNNING, DONE = range(4)


@dataclass(frozen=True)
class Shared:
    """What all processes see. A slot belongs to the HTTP process while it is free or done, to the owner otherwise."""

    states: NDArray[np.uint8]  # (processes, SLOTS)
    items: Array  # (processes, SLOTS, *shape)
    answers: Array  # (processes, SLOTS, largest answer)
    wake_owner: int  # eventfds
    wake_process: tuple[int, ...]

    @classmethod
    def make(cls, job: Job, answer_size: int, processes: int) -> Shared:
        """Anonymous memory, which processes forked from here on share."""
        shape = (processes, SLOTS)
        return cls(
            np.frombuffer(mmap.mmap(-1, processes * SLOTS), np.uint8).reshape(shape),
            _floats((*shape, *job.shape)),
            _floats((*shape, answer_size)),
            os.eventfd(0),
            tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(processes)),
        )


def _floats(shape: tuple[int, ...]) -> Array:
    return np.frombuffer(mmap.mmap(-1, 4 * int(np.prod(shape))), np.float32).reshape(shape)


class Client:
    """An HTTP process's way to the owner."""

    def __init__(self, shared: Shared, index: int, answer_shape: tuple[int, ...]) -> None:
        self._states, self._items, self._answers = shared.states[index], shared.items[index], shared.answers[index]
        self._answer_shape = answer_shape
        self._size = int(np.prod(answer_shape))
        self._wake_owner, self._woken = shared.wake_owner, shared.wake_process[index]
        self._free = list(range(SLOTS))
        self._under_way: dict[int, asyncio.Future[Array]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._woken, self._collect)
        self._is_scheduled = False

    def submit(self, item: Array) -> asyncio.Future[Array]:
        """The item's output, when the owner has run it."""
        slot = self._free.pop()
        self._items[slot] = item
        self._states[slot] = WAITING
        answer = self._under_way[slot] = self._loop.create_future()
        if not self._is_scheduled:  # once for all that arrived in this turn of the loop
            self._is_scheduled = True
            self._loop.call_soon(self._wake)
        return answer

    def _wake(self) -> None:
        self._is_scheduled = False
        os.eventfd_write(self._wake_owner, 1)

    def _collect(self) -> None:
        os.eventfd_read(self._woken)
        for slot in np.flatnonzero(self._states == DONE).tolist():
            answer = self._under_way.pop(slot)
            if not answer.done():
                answer.set_result(self._answers[slot, : self._size].reshape(self._answer_shape).copy())
            self._states[slot] = FREE
            self._free.append(slot)


def own(options: Options, shared: Shared) -> None:
    """Runs whatever waits, in batches, for ever."""
    model = Model(options.store, options.job)
    torch.set_num_threads(options.workers)  # one forward pass at a time: it may have all cores
    while True:
        os.eventfd_read(shared.wake_owner)
        while len(waiting := np.argwhere(shared.states == WAITING)[: options.job.max_batch_size]):
            processes, slots = waiting[:, 0], waiting[:, 1]
            shared.states[processes, slots] = RUNNING
            outputs = model.run(list(shared.items[processes, slots]))
            flat = outputs.reshape(len(waiting), -1)
            shared.answers[processes, slots, : flat.shape[1]] = flat
            shared.states[processes, slots] = DONE
            for process in set(processes.tolist()):
                os.eventfd_write(shared.wake_process[process], 1)


def serve(options: Options, shared: Shared, index: int, answer_shape: tuple[int, ...]) -> None:
    """One HTTP process."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", options.port))

    async def run() -> None:
        app = App(options.job, Client(shared, index, answer_shape).submit)
        config = uvicorn.Config(app, http="httptools", lifespan="off", access_log=False, log_level="warning")
        await uvicorn.Server(config).serve(sockets=[listening])

    uvloop.run(run())


def main() -> None:
    """Starts the owner and the HTTP processes, which end with this one."""
    options = Options.from_environment()
    answer_shape = Model(options.store, options.job).run([np.zeros(options.job.shape, np.float32)]).shape[1:]
    shared = Shared.make(options.job, max(1, int(np.prod(answer_shape))), options.workers)
    forked = multiprocessing.get_context("fork")
    for index in range(1, options.workers):
        forked.Process(target=serve, args=(options, shared, index, answer_shape), daemon=True).start()
    forked.Process(target=own, args=(options, shared), daemon=True).start()
    serve(options, shared, 0, answer_shape)
    sys.exit(0)


if __name__ == "__main__":
    main()
