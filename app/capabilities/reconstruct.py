"""POST /reconstruct: items → what the autoencoder makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items
from app.codecs.ranges import pieces

router = InferenceRouter(tags=["inference"])


class Reconstructed(BaseModel):
    """One item's reconstruction."""

    reconstruction: list[Any] | str = Field(
        description="Nested numbers in the model's input shape, or a base64 PNG file with `images=png`."
    )
    reconstruction_error: float = Field(description="Mean squared error per value against the item.")


@router.items("/reconstruct", capability=Capability.RECONSTRUCT, answers=Reconstructed, query=ItemsQuery)
async def reconstruct(items: Items, model: Model, query: ItemsQuery) -> Results:
    """Encode each item and decode it again."""
    reconstruction = await reconstructions(items, model)
    return Results(
        {"reconstruction": reconstruction, "reconstruction_error": _mean_squares(items.values, reconstruction)},
        main=reconstruction,
        pictures="reconstruction",
    )


async def reconstructions(items: Items, model: Model) -> NDArray[np.float32]:
    """Each item's reconstruction alone, (n, *shape)."""
    (reconstruction,) = await model.run(Capability.RECONSTRUCT, items.values)
    return reconstruction


def _mean_squares(items: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the differences, (n,), in float64, where no square of a float32 overflows."""
    count = len(items)
    left, right = items.reshape(count, -1), others.reshape(count, -1)
    size = left.shape[1]
    sums = np.zeros(count)
    for piece in pieces(size) if count == 1 else [slice(0, size)]:
        off = np.subtract(left[:, piece], right[:, piece], dtype=np.float64)
        sums += np.vecdot(off, off)
    return sums / size
