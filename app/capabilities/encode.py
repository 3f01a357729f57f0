"""POST /encode: items → latent vectors."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items

router = InferenceRouter(tags=["inference"])


class Encoded(BaseModel):
    """One item's latent vector."""

    latent: list[float] = Field(description="Latent vector, latent_dim values.")


@router.items("/encode", capability=Capability.ENCODE, answers=Encoded, query=ItemsQuery)
async def encode(items: Items, model: Model, query: ItemsQuery) -> Results:
    """Map each item to its latent vector.

    A variational autoencoder answers the mean of the posterior, never a sample.
    """
    (latent,) = await model.run(Capability.ENCODE, items.values)  # (n, latent_dim)
    return Results({"latent": latent}, main=latent)
