"""The jobs that every compared server does, and the one way from bytes to an item and back that all of them share.

Knows torch and NumPy, but no server and no package of the project: the peers import it in their own environments.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One kind of request: which artifact's method answers it, and how its bytes become an item and the answer bytes.

    `decode` takes the JSON document {"instances": [[…]]} or a picture file and gives one item in the model's shape;
    `encode` takes one item's output and gives the JSON answer.
    """

    name: str
    model: str
    method: str
    shape: tuple[int, ...]
    max_batch_size: int
    decode: Callable[[bytes], Array]
    encode: Callable[[Array], bytes]
    upload: str | None = None  # media type of the uploaded file; None: the body is JSON


def decode_digit(body: bytes) -> Array:
    """The 784 numbers of {"instances": [[…]]} as (1, 28, 28)."""
    return np.array(orjson.loads(body)["instances"][0], dtype=np.float32).reshape(1, 28, 28)


def decode_grey(body: bytes) -> Array:
    """A 28 × 28 picture file as (1, 28, 28), 0 to 1."""
    image = Image.open(io.BytesIO(body), formats=("PNG",))
    grey = image if image.mode == "L" else image.convert("L")
    return (np.asarray(grey, dtype=np.float32) / np.float32(255))[np.newaxis]


def decode_colour(body: bytes) -> Array:
    """A 224 × 224 picture file as (3, 224, 224), 0 to 1."""
    image = Image.open(io.BytesIO(body), formats=("JPEG",))
    colour = image if image.mode == "RGB" else image.convert("RGB")
    return np.ascontiguousarray(np.asarray(colour).transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def encode_score(output: Array) -> bytes:
    """{"score": number}."""
    return orjson.dumps({"score": float(output)})


def encode_reconstruction(output: Array) -> bytes:
    """{"reconstruction": [784 numbers]}."""
    return orjson.dumps({"reconstruction": output.reshape(-1)}, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_latent(output: Array) -> bytes:
    """{"latent": [32 numbers]}."""
    return orjson.dumps({"latent": output}, option=orjson.OPT_SERIALIZE_NUMPY)


DIGIT, COLOUR = (1, 28, 28), (3, 224, 224)

JOBS = {
    job.name: job
    for job in (
        Job("score", "bench-basic", "anomaly_score", DIGIT, 64, decode_digit, encode_score),
        Job("reconstruct", "bench-basic", "reconstruct", DIGIT, 64, decode_digit, encode_reconstruction),
        Job("latent", "bench-basic", "encode", DIGIT, 64, decode_grey, encode_latent, upload="image/png"),
        # On one thread larger batches of this model take longer for each row.
        Job("conv", "bench-conv", "anomaly_score", COLOUR, 4, decode_colour, encode_score, upload="image/jpeg"),
    )
}


class Model:
    """A job's method, loaded from the artifact's `model.pt` and frozen as the service does it, on one torch thread."""

    def __init__(self, store: Path, job: Job) -> None:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
            module = torch.jit.load(str(store / job.model / "1" / "model.pt")).eval()  # type: ignore[no-untyped-call]  # torch
            self._method: Callable[[torch.Tensor], Any] = getattr(
                torch.jit.freeze(module, preserved_attrs=[job.method]), job.method
            )
        # TorchScript compiles at a shape's second call: what the load will bring is brought here first.
        for batch_size in (1, 2, job.max_batch_size):
            for _ in range(3):
                self.run([np.zeros(job.shape, np.float32)] * batch_size)

    def run(self, rows: Sequence[Array]) -> Array:
        """The method's outputs for these items, (batch, …)."""
        with torch.inference_mode():
            output = self._method(torch.from_numpy(np.stack(rows)))
            array: Array = (output[0] if isinstance(output, tuple) else output).numpy()
            return array


def file_of_multipart(body: bytes, content_type: str) -> bytes:
    """The bytes of the first part of a multipart body."""
    boundary = b"\r\n--" + content_type.partition("boundary=")[2].strip('"').encode()
    start = body.index(b"\r\n\r\n") + 4
    return body[start : body.index(boundary, start)]
