"""The bare app: what a careful author writes by hand for one model, without a framework.

Plain ASGI on uvicorn, orjson, a greedy micro-batcher on the event loop, the model in a worker thread, a process per
core. It validates nothing and answers one thing: what this service is measured against, not what anybody should run.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import queue
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
import uvloop

from benchmarks.jobs import Array, Job, Model, file_of_multipart
from benchmarks.servers.options import Options

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Waiter = tuple[Array, "asyncio.Future[Array]"]


class MicroBatcher:
    """A batch leaves the moment the thread is free; while it is busy, items gather."""

    def __init__(self, load: Callable[[], Model], max_batch_size: int) -> None:
        """Loads and warms the model in the thread that will run it, and waits for that."""
        self._max_batch_size = max_batch_size
        self._waiting: list[Waiter] = []
        self._busy = False
        self._batches: queue.SimpleQueue[list[Waiter]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        loaded = threading.Event()
        threading.Thread(target=self._work, args=(load, loaded), daemon=True).start()
        loaded.wait()

    def submit(self, item: Array) -> asyncio.Future[Array]:
        """The item's output, when its batch has run."""
        answer = self._loop.create_future()
        self._waiting.append((item, answer))
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._dispatch)  # not at once: what arrives in this turn of the loop comes along
        return answer

    def _dispatch(self) -> None:
        batch, self._waiting = self._waiting[: self._max_batch_size], self._waiting[self._max_batch_size :]
        self._batches.put(batch)

    def _work(self, load: Callable[[], Model], loaded: threading.Event) -> None:
        model = load()
        loaded.set()
        while True:
            batch = self._batches.get()
            outputs = model.run([item for item, _ in batch])
            self._loop.call_soon_threadsafe(self._finish, batch, outputs)

    def _finish(self, batch: list[Waiter], outputs: Array) -> None:
        for (_, answer), output in zip(batch, outputs, strict=True):
            if not answer.done():
                answer.set_result(output)
        if self._waiting:
            self._dispatch()
        else:
            self._busy = False


class App:
    """The ASGI application."""

    def __init__(self, job: Job, submit: Callable[[Array], asyncio.Future[Array]]) -> None:
        self._job = job
        self._path = f"/{job.name}"
        self._submit = submit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["path"] != self._path:
            await _answer(send, b"{}")
            return
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        if self._job.upload is not None:
            body = file_of_multipart(body, dict(scope["headers"])[b"content-type"].decode())
        output = await self._submit(self._job.decode(body))
        await _answer(send, self._job.encode(output))


async def _answer(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(options: Options) -> None:
    """One process: its own model, its own socket on the shared port, among which the kernel deals out connections."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", options.port))
    uvloop.run(_serve(options, listening))


async def _serve(options: Options, listening: socket.socket) -> None:
    batcher = MicroBatcher(lambda: Model(options.store, options.job), options.job.max_batch_size)
    app = App(options.job, batcher.submit)
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(app, http="httptools", lifespan="off", access_log=False, log_level="warning")
    await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    given = Options.from_environment()
    others = [multiprocessing.get_context("spawn").Process(target=serve, args=(given,), daemon=True)
              for _ in range(given.workers - 1)]  # fmt: skip
    for other in others:
        other.start()
    serve(given)
    sys.exit(0)
