"""POST /sample: new items from noise."""

from __future__ import annotations

import secrets
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.api.dependencies import Model
from app.api.routing import JSON, Content, InferenceRouter, ModelQuery, Results
from app.artifacts.manifest import Capability
from app.codecs.bodies import Body, parse_json
from app.errors import InvalidInput, InvalidParameter, UnsupportedMediaType

router = InferenceRouter(tags=["inference"])

MAX_COUNT = 256
MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps


class SampleRequest(BaseModel):
    """What to draw; every member may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    count: int = Field(1, ge=1, le=MAX_COUNT, description="How many samples.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed gives the same samples; else drawn.")
    temperature: float = Field(
        1.0, ge=0, le=1e6, allow_inf_nan=False, description="Scales the noise: 0 is the mode, 1 the learnt spread."
    )
    label: int | str | None = Field(
        None, description="Class to draw from, one of the model's `labels`; unset: any, as often as it was learnt."
    )

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Self:
        """The request in an object. Raises InvalidParameter."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            found = "" if first["type"] == "extra_forbidden" else f", found {first['input']!r}"
            raise InvalidParameter(f"{name}: {first['msg']}{found}") from error


class Sampled(BaseModel):
    """One new item."""

    sample: list[Any] | str = Field(
        description="Nested numbers in the model's input shape, or a base64 PNG file with `images=png`."
    )


@router.body(
    "/sample",
    capability=Capability.SAMPLE,
    answers=Sampled,
    request_body={
        JSON: {
            "schema": SampleRequest.model_json_schema(),
            "examples": {"four": {"value": {"count": 4, "seed": 7, "temperature": 0.8}}},
        }
    },
    body_required=False,
    beside={"seed": (int, Field(description="The seed that was used."))},
)
async def sample(content: Content, model: Model, query: ModelQuery) -> Results:
    """Draw new items; the same seed on the same model gives the same items."""
    return await draw(_parse(content.body), model)


async def draw(wanted: SampleRequest, model: Model) -> Results:
    """The samples that are asked for, and the seed that they were drawn with."""
    seed = secrets.randbelow(MAX_SEED + 1) if wanted.seed is None else wanted.seed
    # Drawn before batching: a seed must not depend on who shares the batch.
    generator = np.random.Generator(np.random.PCG64(seed))
    noise_spec = model.manifest.capabilities[Capability.SAMPLE].inputs[1]
    u = generator.random(wanted.count, dtype=np.float32)  # (count,), chooses a mixture's component
    eps = generator.standard_normal((wanted.count, *noise_spec.shape), dtype=np.float32)
    arguments = [u, eps * np.float32(wanted.temperature)]
    label = _label_index(wanted.label, model)
    if model.manifest.labels is not None:
        arguments.append(np.full(wanted.count, label, dtype=np.float32))
    (samples,) = await model.run(Capability.SAMPLE, *arguments)  # (count, *shape)
    return Results({"sample": samples}, main=samples, pictures="sample", beside={"seed": seed})


def _label_index(label: int | str | None, model: Model) -> int:
    """The index of a class among the model's labels; -1 for any. Raises InvalidParameter."""
    if label is None:
        return -1
    labels = model.manifest.labels
    if labels is None:
        raise InvalidParameter(f"label: {model} was made without classes, found {label!r}")
    if str(label) not in labels:
        raise InvalidParameter(f"label: expected one of {', '.join(labels)}; found {label!r}")
    return labels.index(str(label))


def _parse(body: Body) -> SampleRequest:
    if not body.data:
        return SampleRequest()
    if not body.is_json:
        raise UnsupportedMediaType(f"content-type: expected {JSON}, found {body.media_type!r}")
    document = parse_json(body.data)
    if not isinstance(document, dict):
        raise InvalidInput('body: expected an object such as {"count": 4, "seed": 7}')
    return SampleRequest.parse(document)
