"""Scores every item of some files: the catalog, the decoding and the endpoint are those of the service."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from app import errors
from app.api.errors import code_of
from app.api.routing import ItemsRoute
from app.artifacts.manifest import Capability, InputSpec
from app.capabilities import anomaly_score
from app.catalog import Catalog, Wish
from app.inference.loaded_model import select_devices
from app.protocols.chunks import CHUNK_BYTES, Answer, ChunkAnswerer, Summary, chunk_rows, weight_of
from app.scoring.sources import Found, Sources, read_items
from app.scoring.tables import Table
from app.served_model import ServedModel
from app.settings import Settings

_CHUNKS_AT_ONCE = 3  # one is read, one decoded, one on the device
_CHUNK_MS = 600_000
_ROUTE: ItemsRoute = next(
    route for route in anomaly_score.router.item_routes if route.capability is Capability.ANOMALY_SCORE
)


@dataclass(frozen=True)
class Wanted:
    """What a caller of the command line asks for."""

    paths: tuple[str, ...]
    model: str | None = None
    target_fpr: float | None = None
    invert: bool | None = None


@dataclass(frozen=True)
class Scored:
    """What came of it."""

    model: str
    summary: Summary
    seconds: float


async def score(
    wanted: Wanted,
    settings: Settings,
    open_table: Callable[[ServedModel], Table],
    show: Callable[[int, int, Summary], None] = lambda *_: None,
) -> Scored:
    """Scores all items in order, a few chunks of them in memory at a time.

    Args:
        wanted: what to score, and how.
        settings: the service's own: store, device, limits.
        open_table: what takes the rows, once it is known who scores.
        show: told after every chunk how many bytes were read, of how many, and what has come of them.

    Raises ScoringError, or a ServiceError that concerns more than one item: no such model, a rate too fine.
    """
    values = {"model": wanted.model, "target_fpr": wanted.target_fpr, "invert": wanted.invert}
    query = anomaly_score.AnomalyQuery(**{name: value for name, value in values.items() if value is not None})
    catalog = Catalog(
        settings.models_store,
        select_devices(settings.device),
        max_queue_rows=settings.max_queue_rows,
        max_queue_bytes=settings.max_queue_bytes,
        torch_threads=settings.torch_threads or len(os.sched_getaffinity(0)),
        max_batch_size=settings.max_batch_size,
        default_model=settings.default_model,
        memory_bytes=settings.model_memory_bytes,
        keep_versions=settings.keep_versions,
        load_s=settings.load_seconds,
    )
    name, _, version = (wanted.model or "").partition(":")
    if version.isascii() and version.isdigit():
        catalog.start_with({name: Wish(kept_versions=frozenset({int(version[:20])}))})
    async with catalog:
        await catalog.loaded()
        served = catalog.find(wanted.model, Capability.ANOMALY_SCORE)
        spec, sources, summary = served.manifest.input, Sources(wanted.paths), Summary()
        if wanted.invert is not None and spec.range is None:
            raise errors.InvalidParameter("invert: this model takes records, which have no dark and light")
        total_bytes = await asyncio.to_thread(sources.total_bytes, spec)
        answerer = ChunkAnswerer(_ROUTE, query, served, _CHUNK_MS)
        chunks = _chunks(sources, spec, settings, chunk_rows(served, settings.max_queue_rows))
        waiting: deque[tuple[_Chunk, asyncio.Task[list[Answer]]]] = deque()
        begun, started = 0, time.perf_counter()
        try:
            with open_table(served) as table:
                while True:
                    chunk = await asyncio.to_thread(next, chunks, None)
                    if chunk is not None:
                        items = [found.item for found in chunk.found]
                        waiting.append((chunk, asyncio.create_task(answerer.answer(items, begun))))
                        begun += len(items)
                    elif not waiting:
                        break
                    if chunk is None or len(waiting) >= _CHUNKS_AT_ONCE:
                        done, answering = waiting.popleft()
                        answers = await answering
                        rows = [_row(found, answer) for found, answer in zip(done.found, answers, strict=True)]
                        await asyncio.to_thread(table.write, rows)
                        for answer in answers:
                            summary.count(answer)
                        show(done.read_bytes, total_bytes, summary)
        finally:
            for _, answering in waiting:
                answering.cancel()
        return Scored(str(served), summary, time.perf_counter() - started)


@dataclass(frozen=True)
class _Chunk:
    """Consecutive items, and how much of all files was read with the last of them."""

    found: list[Found]
    read_bytes: int


def _chunks(sources: Sources, spec: InputSpec, settings: Settings, most_rows: int) -> Iterator[_Chunk]:
    found: list[Found] = []
    held_bytes, before = 0, 0
    for path in sources.files(spec):
        read_bytes = 0
        for one in read_items(path, spec, settings):
            found.append(one)
            held_bytes += weight_of(one.item)
            read_bytes = one.read_bytes
            if len(found) >= most_rows or held_bytes >= CHUNK_BYTES:
                yield _Chunk(found, before + read_bytes)
                found, held_bytes = [], 0
        before += read_bytes
    if found:
        yield _Chunk(found, before)


def _row(found: Found, answer: Answer) -> dict[str, Any]:
    """One item's row: what JSON says of its verdict, beside where it comes from."""
    row: dict[str, Any] = {"path": str(found.path)}
    if found.row is not None:
        row["row"] = found.row
    identity = found.item.name if found.item.id is None else found.item.id
    if identity is not None:
        row["id"] = identity
    if isinstance(answer, errors.ServiceError):
        # Which item it is stands beside it.
        return row | {"error": re.sub(r"^item \d+: ", "", str(answer)), "code": code_of(answer)}
    verdict: dict[str, Any] = orjson.loads(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))
    return row | verdict
