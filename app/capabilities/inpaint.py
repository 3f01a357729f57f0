"""POST /inpaint: items with holes → whole ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items

router = InferenceRouter(tags=["inference"])


class Inpainted(BaseModel):
    """One item with its holes filled."""

    inpainted: list[Any] | str = Field(
        description="Nested numbers in the model's input shape, or a base64 PNG file with `images=png`."
    )


@router.items("/inpaint", capability=Capability.INPAINT, answers=Inpainted, query=ItemsQuery, masked=True)
async def inpaint(items: Items, model: Model, query: ItemsQuery) -> Results:
    """Fill what is missing in each item; what is known comes back exactly as it was sent."""
    if items.masks is None:
        raise RuntimeError("inpaint: items without masks got past the codec")
    (filled,) = await model.run(Capability.INPAINT, items.values, items.masks)  # (n, *shape)
    inpainted = np.where(items.masks == 1, filled, items.values)  # (n, 1, h, w) broadcasts over channels
    return Results({"inpainted": inpainted}, main=inpainted, pictures="inpainted")
