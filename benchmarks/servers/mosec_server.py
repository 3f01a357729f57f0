"""mosec: a Rust front that batches, and worker processes in Python; a worker per core, as its guide advises."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mosec import Server, Worker

from benchmarks.jobs import Array, Model
from benchmarks.servers.options import Options

MAX_WAIT_MS = 1  # the shortest there is; longer waits cost latency and bring no throughput

given = Options.from_environment()


class JobWorker(Worker):
    """Decodes, runs and encodes one job."""

    def __init__(self) -> None:
        super().__init__()
        self._model = Model(given.store, given.job)

    def deserialize(self, data: bytes) -> Array:
        """The request's body as an item."""
        return given.job.decode(data)

    def forward(self, data: Sequence[Array]) -> Array:
        """A batch of items."""
        return self._model.run(data)

    def serialize(self, data: Array) -> bytes:
        """One item's output as the answer's body."""
        return given.job.encode(data)


if __name__ == "__main__":
    # mosec reads its settings from the command line.
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(given.port), "--log-level", "warning"]
    server = Server()
    server.append_worker(
        JobWorker,
        num=given.workers,
        max_batch_size=given.job.max_batch_size,
        max_wait_time=MAX_WAIT_MS,
        route=f"/{given.job.name}",
    )
    server.run()
