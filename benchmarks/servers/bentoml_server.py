"""BentoML: a service whose method is batchable, with a worker per core. Started by `bentoml serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import orjson

from benchmarks.jobs import Model
from benchmarks.servers.options import Options

_GIVEN = Options.from_environment()
_JOB = _GIVEN.job
_BATCHING = {"batchable": True, "max_batch_size": _JOB.max_batch_size, "max_latency_ms": 10_000}


@bentoml.service(workers=_GIVEN.workers, traffic={"timeout": 30})
class Bench:
    """One job behind BentoML's adaptive batching."""

    def __init__(self) -> None:
        self._model = Model(_GIVEN.store, _JOB)

    if _JOB.upload is None:

        @bentoml.api(route=f"/{_JOB.name}", **_BATCHING)
        def numbers(self, instances: np.ndarray) -> list[Any]:
            """A batch of flat items."""
            rows = list(instances.astype(np.float32).reshape(-1, *_JOB.shape))
            return [orjson.loads(_JOB.encode(output)) for output in self._model.run(rows)]

    else:

        @bentoml.api(route=f"/{_JOB.name}", **_BATCHING)
        def pictures(self, file: list[Path]) -> list[Any]:
            """A batch of picture files."""
            rows = [_JOB.decode(path.read_bytes()) for path in file]
            return [orjson.loads(_JOB.encode(output)) for output in self._model.run(rows)]
