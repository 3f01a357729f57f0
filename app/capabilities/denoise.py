"""POST /denoise: noisy items → clean ones."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items

router = InferenceRouter(tags=["inference"])


class Denoised(BaseModel):
    """One item without its noise."""

    denoised: list[Any] | str = Field(
        description="Nested numbers in the model's input shape, or a base64 PNG file with `images=png`."
    )


@router.items("/denoise", capability=Capability.DENOISE, answers=Denoised, query=ItemsQuery)
async def denoise(items: Items, model: Model, query: ItemsQuery) -> Results:
    """Remove the noise from each item.

    Only models that were measured to improve noisy items have this; the others are refused with the figure.
    """
    (denoised,) = await model.run(Capability.DENOISE, items.values)  # (n, *shape)
    return Results({"denoised": denoised}, main=denoised, pictures="denoised")
