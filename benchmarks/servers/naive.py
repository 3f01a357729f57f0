"""The naive app: FastAPI as its tutorial shows it, pydantic in, a dict out, a forward pass per request."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, File, UploadFile
from pydantic import BaseModel

from benchmarks.jobs import Array, Model
from benchmarks.servers.options import Options


class Instances(BaseModel):
    """The request: one item, flat."""

    instances: list[list[float]]


def create_app(options: Options, style: str) -> FastAPI:
    """An application with one endpoint for the job, written as `def` or as `async def`."""
    app, job = FastAPI(), options.job
    model = Model(options.store, job)

    def answer(item: Array) -> dict[str, Any]:
        output = model.run([item])[0]
        if job.method == "anomaly_score":
            return {"score": float(output)}
        return {job.name: output.reshape(-1).tolist()}

    def item_of(instances: Instances) -> Array:
        return np.array(instances.instances[0], dtype=np.float32).reshape(job.shape)

    def numbers(instances: Instances) -> dict[str, Any]:
        return answer(item_of(instances))

    async def numbers_async(instances: Instances) -> dict[str, Any]:
        return answer(item_of(instances))

    def picture(file: Annotated[UploadFile, File()]) -> dict[str, Any]:
        return answer(job.decode(file.file.read()))

    async def picture_async(file: Annotated[UploadFile, File()]) -> dict[str, Any]:
        return answer(job.decode(await file.read()))

    endpoints = {"def": (numbers, picture), "async": (numbers_async, picture_async)}
    app.post(f"/{job.name}")(endpoints[style][job.upload is not None])

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        return {}

    return app


if __name__ == "__main__":
    given = Options.from_environment()
    uvicorn.run(
        create_app(given, sys.argv[1]), host="127.0.0.1", port=given.port, log_level="warning", access_log=False
    )
