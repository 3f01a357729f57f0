"""POST /decode: latent vectors → items."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import JSON, NPY, Content, InferenceRouter, ModelQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.bodies import parse_json
from app.codecs.items import check_rows, rows_from_json, rows_from_npy
from app.errors import InvalidInput, UnsupportedMediaType

router = InferenceRouter(tags=["inference"])


class Decoded(BaseModel):
    """What one latent vector stands for."""

    reconstruction: list[Any] | str = Field(
        description="Nested numbers in the model's input shape, or a base64 PNG file with `images=png`."
    )


_LATENTS_BODY: dict[str, Any] = {
    JSON: {
        "examples": {"of 16 numbers, as mnist-variational takes": {"value": {"latents": [[0.5, -0.5] * 8]}}},
        "schema": {
            "type": "object",
            "required": ["latents"],
            "additionalProperties": False,
            "properties": {
                "latents": {
                    "type": "array",
                    "minItems": 1,
                    "description": "Latent vectors, latent_dim numbers each.",
                    "items": {"type": "array", "items": {"type": "number"}},
                }
            },
        },
    },
    NPY: {"schema": {"type": "string", "format": "binary", "description": "(n, latent_dim) float array."}},
}


@router.body("/decode", capability=Capability.DECODE, answers=Decoded, request_body=_LATENTS_BODY)
async def decode(content: Content, model: Model, query: ModelQuery) -> Results:
    """Map each latent vector back to an item."""
    body, limits = content.body, content.limits
    shape = model.manifest.capabilities[Capability.DECODE].inputs[0].shape
    if body.is_json:
        document = parse_json(body.data)
        if not isinstance(document, dict) or document.keys() != {"latents"}:
            raise InvalidInput('body: expected an object with exactly one member, {"latents": [[…], …]}')
        latents = rows_from_json(document["latents"], "latents", shape, limits)
    elif body.media_type == NPY:
        latents = rows_from_npy(body.data, shape, limits)
    else:
        raise UnsupportedMediaType(f"content-type: expected {JSON} or {NPY}, found {body.media_type!r}")
    check_rows(latents, None)
    return await decode_latents(latents, model)


async def decode_latents(latents: NDArray[np.float32], model: Model) -> Results:
    """The items that finite latent vectors, (n, latent_dim), stand for."""
    (reconstruction,) = await model.run(Capability.DECODE, latents)  # (n, *shape)
    return Results({"reconstruction": reconstruction}, main=reconstruction, pictures="reconstruction")
