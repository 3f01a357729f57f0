"""A plain FastAPI app: numbers as JSON validated by pydantic, a `def` endpoint, a forward pass per request."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

torch.set_num_threads(1)
module = torch.jit.load(str(Path("models_store/mnist-basic/1/model.pt"))).eval()  # type: ignore[no-untyped-call]  # torch
app = FastAPI()


class Instances(BaseModel):
    """The items, flat."""

    instances: list[list[float]]


class Results(BaseModel):
    """Their reconstructions, flat."""

    results: list[list[float]]


@app.post("/reconstruct")
def reconstruct(given: Instances) -> Results:
    """Reconstruct every item."""
    with torch.inference_mode():
        output = module.reconstruct(torch.tensor(given.instances).reshape(-1, 1, 28, 28))
    return Results(results=output.flatten(1).tolist())


@app.get("/readyz")
def ready() -> dict[str, bool]:
    """Whether it answers."""
    return {"ready": True}


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.servers.plain:app",
        host="127.0.0.1",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        log_level="warning",
        access_log=False,
    )
