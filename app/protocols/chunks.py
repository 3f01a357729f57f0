"""Consecutive items answered together, each by itself: what is wrong with one stands in its place.

Streams over HTTP and scoring from the command line both work in these, so that both say the same of the same items.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app import errors
from app.api.decoding import Check, decode
from app.api.dependencies import Model, Terms
from app.api.routing import INLINE_PIXELS, ItemsRoute, ModelQuery, query_invert, result_rows
from app.artifacts.manifest import Capability, InputSpec, Manifest
from app.codecs.items import Items, entry_to_input, mask_entry_to_input
from app.codecs.streams import StreamItem
from app.served_model import ServedModel

CHUNK_BYTES = 8 * 1024 * 1024
"""A chunk ends with the item whose weight reaches this, however few there are."""
_PIXELS_PER_BYTE = 4  # a file of some kilobytes may take a second to decode

_RETRY_S = 0.02
# What concerns the items of a chunk and not the stream; anything else ends it.
_BY_ITEM = (errors.InferenceFailed, errors.DeadlineExceeded, errors.QueueFull)

Answer = dict[str, Any] | errors.ServiceError
"""What the route answers for one item, or what is wrong with that item."""

_Decoded = tuple[NDArray[np.float32], NDArray[np.float32] | None]
"""An item as the model takes it, and its mask."""


@dataclass
class Summary:
    """What the answers of a stream come to."""

    items: int = 0
    ok: int = 0
    failed: int = 0
    anomalies: int = 0

    def count(self, answer: Answer) -> None:
        """Counts one item's answer."""
        self.items += 1
        if isinstance(answer, errors.ServiceError):
            self.failed += 1
        else:
            self.ok += 1
            self.anomalies += bool(answer.get("is_anomaly"))

    def add(self, other: Summary) -> None:
        """Counts what another one counted."""
        self.items += other.items
        self.ok += other.ok
        self.failed += other.failed
        self.anomalies += other.anomalies


def spec_of(route: ItemsRoute, manifest: Manifest) -> InputSpec:
    """What one item of the route looks like: the model's input, or a latent vector."""
    if route.capability is Capability.DECODE:
        return InputSpec(shape=manifest.capabilities[Capability.DECODE].inputs[0].shape)
    return manifest.input


def chunk_rows(served: ServedModel, max_queue_rows: int) -> int:
    """How many items of a stream are answered together: a batch, if as many may wait."""
    return max(1, min(served.manifest.max_batch_size, max_queue_rows))


def weight_of(item: StreamItem) -> int:
    """What an item adds to its chunk, in bytes: those that it holds, and some for the pixels still to be decoded."""
    return item.held_bytes + _pixels(item) // _PIXELS_PER_BYTE


@dataclass(frozen=True)
class ChunkAnswerer:
    """Answers chunks of items as one route of one model does; each chunk has `timeout_ms` from its beginning on."""

    route: ItemsRoute
    query: ModelQuery
    served: ServedModel
    timeout_ms: int
    caller: str = ""
    priority: int = 0

    async def answer(self, items: Sequence[StreamItem], start: int) -> list[Answer]:
        """One answer for each item, in order; the first has the index `start`. Raises what concerns them all."""
        decoded = await self._decode(items, start, self._terms())
        good = [(index, found) for index, found in enumerate(decoded) if not isinstance(found, errors.ServiceError)]
        answers: dict[int, Answer] = {
            index: found for index, found in enumerate(decoded) if isinstance(found, errors.ServiceError)
        }
        if good:
            values = np.stack([values for _, (values, _) in good])
            masks = [mask for _, (_, mask) in good if mask is not None]
            together = Items(values, masks=np.stack(masks) if masks else None)
            rows = await self._rows(together, [start + index for index, _ in good])
            answers |= {index: row for (index, _), row in zip(good, rows, strict=True)}
        return [answers[index] for index in range(len(items))]

    def _terms(self) -> Terms:
        """Terms whose time begins now."""
        loop = asyncio.get_running_loop()
        return Terms(loop, self.timeout_ms, loop.time() + self.timeout_ms / 1000, self.caller, self.priority)

    async def _decode(
        self, items: Sequence[StreamItem], start: int, terms: Terms
    ) -> list[_Decoded | errors.ServiceError]:
        """Each item as the model takes it; an error in place of one that cannot be, or of all if they take too long."""
        spec, invert = spec_of(self.route, self.served.manifest), query_invert(self.query)

        def work(check: Check) -> list[_Decoded | errors.ServiceError]:
            found: list[_Decoded | errors.ServiceError] = []
            for index, item in enumerate(items, start):
                if isinstance(item.entry, errors.ServiceError):
                    found.append(item.entry)
                    continue
                check()
                try:
                    mask = None if item.mask is None else mask_entry_to_input(item.mask, index, spec)
                    found.append((entry_to_input(item.entry, index, spec, invert=invert), mask))
                except errors.ServiceError as error:
                    found.append(error)
            return found

        if sum(map(_pixels, items)) <= INLINE_PIXELS:
            return work(lambda: None)  # is done before anybody's time could be up
        try:
            return await decode(work, terms)
        except errors.DeadlineExceeded as error:
            return [errors.DeadlineExceeded(f"item {start + index}: {error}") for index in range(len(items))]

    async def _rows(self, items: Items, indexes: list[int]) -> list[Answer]:
        """Each item's answer, or the error that is its own; a chunk that fails is halved until it stands alone."""
        terms = self._terms()
        while True:
            try:
                results = await self.route.endpoint(items, Model(self.served, terms), self.query)
                return [*result_rows(results, self.served.manifest.input, as_png=self.query.images == "png")]
            except errors.QueueFull as error:
                if terms.loop.time() + error.retry_after_s >= terms.deadline:
                    return [errors.QueueFull(f"item {index}: {error}") for index in indexes]
                await asyncio.sleep(_RETRY_S)
            except _BY_ITEM as error:
                if len(indexes) == 1 or isinstance(error, errors.DeadlineExceeded):
                    text = re.sub(r"^item \d+: ", "", str(error))
                    return [type(error)(f"item {index}: {text}") for index in indexes]
                middle = len(indexes) // 2
                halves = (slice(None, middle), slice(middle, None))
                return [row for half in halves for row in await self._rows(_part(items, half), indexes[half])]


def _pixels(item: StreamItem) -> int:
    pictures = [entry for entry in (item.entry, item.mask) if isinstance(entry, Image.Image)]
    return sum(picture.width * picture.height for picture in pictures)


def _part(items: Items, which: slice) -> Items:
    return Items(items.values[which], masks=None if items.masks is None else items.masks[which])
