"""POST /encode: items → latent vectors."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.responses import Pair
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.items import Items
from app.errors import CapabilityNotSupported

router = InferenceRouter(tags=["inference"])


class Encoded(BaseModel):
    """One item's latent vector."""

    latent: list[float] = Field(description="Latent vector, latent_dim values.")
    projection: Pair | None = Field(
        None, description="Where the latent vector lies on the model's map, [x, y]; with `project=true` alone."
    )


class EncodeQuery(ItemsQuery):
    """Query parameters of /encode."""

    project: bool = Field(
        False,
        description="`true` adds the place on the model's map, whose known points are in "
        "`GET /models/{name}/projection`.",
    )


@router.items("/encode", capability=Capability.ENCODE, answers=Encoded, query=EncodeQuery, shows_pictures=False)
async def encode(items: Items, model: Model, query: EncodeQuery) -> Results:
    """Map each item to its latent vector.

    A variational autoencoder answers the mean of the posterior, never a sample.
    """
    (latent,) = await model.run(Capability.ENCODE, items.values)  # (n, latent_dim)
    if not query.project:
        return Results({"latent": latent}, main=latent)
    if model.projection is None:
        raise CapabilityNotSupported(f"{model} has no map of its latent space, so nothing can be projected")
    return Results({"latent": latent, "projection": model.projection.project(latent)}, main=latent)
