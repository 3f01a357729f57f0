"""POST /interpolate: the way from one item to another, through the latent space."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items
from app.errors import InvalidInput

router = InferenceRouter(tags=["inference"])


class InterpolateQuery(ItemsQuery):
    """Query parameters of /interpolate."""

    steps: int = Field(8, ge=2, le=64, description="How many items to answer, both ends included.")


class Interpolated(BaseModel):
    """One step of the way."""

    reconstruction: list[Any] | str = Field(
        description="Nested numbers in the model's input shape, or a base64 PNG file with `images=png`."
    )


@router.items(
    "/interpolate",
    capability=Capability.ENCODE,
    also=(Capability.DECODE,),
    answers=Interpolated,
    query=InterpolateQuery,
    by_item=False,
)
async def interpolate(items: Items, model: Model, query: InterpolateQuery) -> Results:
    """Walk from the first item to the second through the latent space, ends included."""
    if len(items) != 2:
        raise InvalidInput(f"items: expected exactly two, the ends of the way, found {len(items)}")
    if items.ids is not None:
        raise InvalidInput("ids: expected none, since the results are steps and not items")
    (latents,) = await model.run(Capability.ENCODE, items.values)  # (2, latent_dim)
    way = spherical if model.manifest.interpolation == "spherical" else linear
    between = way(latents[0], latents[1], np.linspace(0, 1, query.steps, dtype=np.float32))
    (steps,) = await model.run(Capability.DECODE, between)  # (steps, *shape)
    return Results({"reconstruction": steps}, main=steps, pictures="reconstruction")


def linear(start: NDArray[np.float32], end: NDArray[np.float32], at: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points on the straight line from start to end, (len(at), latent_dim), for `at` from 0 to 1."""
    fraction = at[:, np.newaxis]
    return start * (1 - fraction) + end * fraction


def spherical(start: NDArray[np.float32], end: NDArray[np.float32], at: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points on the arc from start to end, (len(at), latent_dim): of lengths between theirs, as a Gaussian prior's are.

    Source: Shoemake 1985; White 2016, arXiv:1609.04468.
    """
    lengths = np.linalg.norm(start), np.linalg.norm(end)
    if min(lengths) == 0:
        return linear(start, end, at)
    cosine = float(np.clip(start @ end / (lengths[0] * lengths[1]), -1, 1))
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-4:  # no arc between the same or opposite directions
        return linear(start, end, at)
    fraction = at[:, np.newaxis]
    points = (np.sin((1 - fraction) * angle) * start + np.sin(fraction * angle) * end) / np.sin(angle)
    return np.asarray(points, dtype=np.float32)
