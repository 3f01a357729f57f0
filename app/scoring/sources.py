"""Paths → items: pictures, folders and globs of them, and tables, read piece by piece while others are scored."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.artifacts.manifest import InputSpec
from app.codecs.items import Entry, Limits, entry_from_file, entry_from_numbers
from app.codecs.streams import CsvReader, NdjsonReader, NpyReader, StreamItem, StreamReader, ZipReader
from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge, ServiceError
from app.scoring.errors import ScoringError, import_pyarrow
from app.settings import Settings

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
PARQUET = ".parquet"
_TABLE_SUFFIXES = frozenset({".npy", ".csv", PARQUET})
_PIECE_BYTES = 1024 * 1024
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class Found:
    """One item of a file.

    `row` counts the items of a file that may hold several and is None for a picture; `read_bytes` is how much of its
    file was read when it was found.
    """

    path: Path
    row: int | None
    item: StreamItem
    read_bytes: int


class Sources:
    """The files that some paths mean, in order: files as they are named, the contents of folders and globs sorted.

    Args:
        paths: files, folders (looked through at any depth, hidden files passed over), and globs (`**` too).

    Iterating walks through the folders anew, so that millions of names are never in memory together.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def files(self, spec: InputSpec) -> Iterator[Path]:
        """Every file. Of folders, the files that a model with that input can take: pictures, or tables of records.

        Raises ScoringError for a path where nothing is.
        """
        wanted = _TABLE_SUFFIXES if spec.picture is None else PICTURE_SUFFIXES
        for path in self._named():
            if path.is_dir():
                yield from _walk(path, wanted)
            else:
                yield path

    def total_bytes(self, spec: InputSpec) -> int:
        """Bytes of all files. Raises ScoringError if there is no file, or no pyarrow for one that needs it."""
        total, count = 0, 0
        for path in self.files(spec):
            if path.suffix.lower() == PARQUET:
                import_pyarrow(path)
            total += _size(path)
            count += 1
        if not count:
            kind = "tables (.npy, .csv, .parquet)" if spec.picture is None else "pictures"
            raise ScoringError(f"{' '.join(self._paths)}: expected {kind} for this model, found none")
        return total

    def _named(self) -> Iterator[Path]:
        for given in self._paths:
            if os.path.lexists(given):
                yield Path(given)
                continue
            matches = sorted(glob.iglob(given, recursive=True))
            if not matches:
                raise ScoringError(f"{given}: no such file or folder, and no glob that matches one")
            yield from map(Path, matches)


def read_items(path: Path, spec: InputSpec, settings: Settings) -> Iterator[Found]:
    """The items of one file; what is wrong with it, or with one of them, stands in their place."""
    reading = _pieces_of(path, spec, settings)
    row = 0
    try:
        for found in reading:
            yield found
            row += 1
    except (ServiceError, OSError) as error:
        problem = error if isinstance(error, ServiceError) else InvalidInput(f"cannot be read: {error.strerror}")
        yield Found(path, row or None, StreamItem(problem, 0), _size(path))


def _pieces_of(path: Path, spec: InputSpec, settings: Settings) -> Iterator[Found]:
    limits = Limits(max_rows=1, max_image_pixels=settings.max_image_pixels)
    most = settings.max_body_bytes
    suffix = path.suffix.lower()
    if suffix == PARQUET:
        return _parquet(path, spec, limits)
    streams: dict[str, Callable[[], StreamReader]] = {
        ".npy": lambda: NpyReader(spec),
        ".csv": lambda: CsvReader(spec, most),
        ".ndjson": lambda: NdjsonReader(spec, limits, most, masked=False),
        ".jsonl": lambda: NdjsonReader(spec, limits, most, masked=False),
        ".zip": lambda: ZipReader(spec, limits, most, settings.max_spool_bytes),
    }
    if suffix in streams:
        return _stream(path, streams[suffix]())
    return _picture(path, spec, limits, most)


def _stream(path: Path, reader: StreamReader) -> Iterator[Found]:
    row, read_bytes = 0, 0
    try:
        with path.open("rb") as file:
            while data := file.read(_PIECE_BYTES):
                read_bytes += len(data)
                for item in reader.feed(data):
                    yield Found(path, row, item, read_bytes)
                    row += 1
        for item in reader.end():
            yield Found(path, row, item, read_bytes)
            row += 1
    finally:
        reader.close()


def _picture(path: Path, spec: InputSpec, limits: Limits, max_bytes: int) -> Iterator[Found]:
    size = _size(path)
    if size > max_bytes:
        raise PayloadTooLarge(f"expected at most {max_bytes} bytes (HOURGLASS_MAX_BODY_BYTES), found {size}")
    data = path.read_bytes()
    yield Found(path, None, StreamItem(entry_from_file(data, 0, spec, limits), len(data)), size)


def _parquet(path: Path, spec: InputSpec, limits: Limits) -> Iterator[Found]:
    """Rows of records, a column each feature; or picture files in a column of binaries. A column `id` comes back."""
    import pyarrow as pa  # noqa: PLC0415  an extra, and slow to import
    import pyarrow.parquet as pq  # noqa: PLC0415  likewise

    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name != "id" or "id" in (spec.features or ())]
            rows = _files_of(file.schema_arrow, names) if spec.picture else _records_of(names, spec)
            has_ids = "id" in file.schema_arrow.names and "id" not in names
            size, row = _size(path), 0
            for batch in file.iter_batches(_PARQUET_ROWS):
                ids = batch.column("id").to_pylist() if has_ids else [None] * batch.num_rows
                read_bytes = size * (row + batch.num_rows) // max(1, file.metadata.num_rows)
                for value, identity in zip(rows(batch), ids, strict=True):
                    try:
                        entry: Entry | ServiceError = (
                            entry_from_file(value or b"", row, spec, limits)
                            if isinstance(value, bytes | None)
                            else entry_from_numbers(value.reshape(spec.shape), row, spec)
                        )
                    except ServiceError as error:
                        entry = error
                    name = identity if isinstance(identity, int | None) else str(identity)
                    held = len(value) if isinstance(value, bytes) else 4 * spec.size
                    yield Found(path, row, StreamItem(entry, held, name), read_bytes)
                    row += 1
    except pa.ArrowException as error:
        raise MalformedPayload(f"parquet: not readable: {error}") from error


def _records_of(names: list[str], spec: InputSpec) -> Callable[[Any], Iterator[Any]]:
    features = spec.features or tuple(names)
    unknown, missing = sorted(set(names) - set(features)), [name for name in features if name not in names]
    if unknown or missing or len(features) != spec.size:
        raise InvalidInput(
            f"parquet: expected {spec.size} columns of features; unknown columns {unknown[:8]}, missing {missing[:8]}"
        )

    def rows(batch: Any) -> Iterator[Any]:
        columns = []
        for name in features:
            try:
                # Nulls become NaN, which is refused as one.
                columns.append(batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64))
            except (TypeError, ValueError) as error:
                kind = batch.column(name).type
                raise InvalidInput(f"parquet: column {name}: expected numbers, found {kind}") from error
        return iter(np.stack(columns, axis=1))

    return rows


def _files_of(schema: Any, names: list[str]) -> Callable[[Any], Iterator[Any]]:
    """Picture files as bytes, or as the structs {bytes, path} that data sets of pictures are kept in."""
    import pyarrow.types as kinds  # noqa: PLC0415  as above

    for name in names:
        kind = schema.field(name).type
        if kinds.is_binary(kind) or kinds.is_large_binary(kind):
            return lambda batch: iter(batch.column(name).to_pylist())
        if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return lambda batch: ((value or {}).get("bytes") for value in batch.column(name).to_pylist())
    raise InvalidInput(f"parquet: this model takes pictures, expected a column of their files, found {names[:8]}")


def _walk(folder: Path, wanted: frozenset[str]) -> Iterator[Path]:
    """Files of the wanted kinds at any depth, sorted within their folder; a folder that leads back is not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ScoringError(f"{folder}: cannot be listed: {error.strerror}") from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, wanted)
        elif path.suffix.lower() in wanted and entry.is_file():
            yield path


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # gone, or not to be read, which its own row will tell
