"""LitServe: FastAPI processes in front of worker processes, ZeroMQ between them (`fast_queue`), batching on.

No postponed annotations: LitServe looks at `decode_request`'s to see what the endpoint takes.
"""

from typing import Any

import litserve
import numpy as np
import orjson
from fastapi import Request

from benchmarks.jobs import Array, Model
from benchmarks.servers.options import Options

MAX_WAIT_S = 0.003


class JobAPI(litserve.LitAPI):
    """Decodes, runs and encodes one job."""

    def __init__(self, options: Options) -> None:
        batch = options.job.max_batch_size
        super().__init__(max_batch_size=batch, batch_timeout=MAX_WAIT_S, api_path=f"/{options.job.name}")
        self._options = options

    def setup(self, device: str) -> None:
        """Loads the model in the worker's process."""
        del device
        self._model = Model(self._options.store, self._options.job)

    def decode_request(self, request: Request) -> Array:
        """The item in what LitServe made of the request: the parsed JSON document, or the form."""
        job = self._options.job
        if job.upload is not None:
            return job.decode(request["file"].file.read())
        return np.array(request["instances"][0], dtype=np.float32).reshape(job.shape)

    def batch(self, inputs: list[Array]) -> list[Array]:
        """The items as they are: the model stacks them."""
        return inputs

    def predict(self, x: list[Array]) -> Array:
        """A batch of items."""
        return self._model.run(x)

    def unbatch(self, output: Array) -> list[Array]:
        """One output per item."""
        return list(output)

    def encode_response(self, output: Array) -> Any:
        """One item's output as a document."""
        return orjson.loads(self._options.job.encode(output))


if __name__ == "__main__":
    given = Options.from_environment()
    server = litserve.LitServer(JobAPI(given), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=given.port,
        num_api_servers=given.workers,
        generate_client_file=False,
        log_level="warning",
    )
