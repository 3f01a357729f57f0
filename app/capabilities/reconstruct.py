"""POST /reconstruct: items → what the autoencoder makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items

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
    (reconstruction,) = await model.run(Capability.RECONSTRUCT, items.values)  # (n, *shape)
    # In float64, where no square of a float32 overflows.
    off = np.subtract(items.values, reconstruction, dtype=np.float64).reshape(len(items), -1)
    return Results(
        {"reconstruction": reconstruction, "reconstruction_error": np.vecdot(off, off) / off.shape[1]},
        main=reconstruction,
        pictures="reconstruction",
    )
