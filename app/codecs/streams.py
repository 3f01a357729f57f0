"""Bodies of any length as the items in them, while they arrive: NDJSON, CSV, npy, multipart, zip.

Each reader holds no more than one item and what the network gave last; a zip lies on disk. What is wrong with one item
stands in its place; what is wrong with the framing is raised, since nothing behind it can be read.
"""

from __future__ import annotations

import csv
import math
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from typing_extensions import override

from app.artifacts.manifest import InputSpec
from app.codecs.bodies import parse_json
from app.codecs.items import (
    Entry,
    Limits,
    entry_from_file,
    entry_from_json,
    entry_from_numbers,
    mask_from_json,
)
from app.codecs.multipart import MultipartReader, Part
from app.codecs.npy import npy_header_size, read_npy_header
from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge, ServiceError, ShapeMismatch

MAX_DIRECTORY_BYTES = 32 * 1024 * 1024
"""Largest list of contents of a zip, which has to be held in memory: some hundred thousand files."""

_ZIP_DAMAGE = (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError, ArithmeticError)


@dataclass(frozen=True)
class StreamItem:
    """One item of a stream: what it is or what is wrong with it, whose it is, and about how many bytes it holds."""

    entry: Entry | ServiceError
    held_bytes: int
    id: str | int | None = None
    name: str | None = None
    mask: Entry | None = None


class StreamReader(ABC):
    """Bytes in, items out. Close it in the end."""

    @abstractmethod
    def feed(self, data: bytes) -> Iterator[StreamItem]:
        """The items that end in these bytes. Raises ServiceError where the framing is damaged."""

    @abstractmethod
    def end(self) -> Iterator[StreamItem]:
        """The items that are left when there are no more bytes. Raises ServiceError likewise."""

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Frees what the reader holds."""


class _Lines:
    """Lines as they arrive; None in place of one that is longer than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        first, *rest = data.split(b"\n")
        self._add(first)
        for line in rest:
            yield self._take()
            self._add(line)

    def end(self) -> Iterator[bytes | None]:
        if self._size:
            yield self._take()

    def _add(self, part: bytes) -> None:
        if part:
            self._size += len(part)
            if self._size <= self._max_bytes:
                self._parts.append(part)
            else:
                self._parts.clear()

    def _take(self) -> bytes | None:
        line = b"".join(self._parts) if self._size <= self._max_bytes else None
        self._parts.clear()
        self._size = 0
        return line


class _LineReader(StreamReader):
    """Items of a line each; blank lines are none."""

    def __init__(self, max_item_bytes: int) -> None:
        self._max_item_bytes = max_item_bytes
        self._lines = _Lines(max_item_bytes)
        self._count = 0

    @override
    def feed(self, data: bytes) -> Iterator[StreamItem]:
        for line in self._lines.feed(data):
            if line is None or line.strip():
                yield from self._read(line)

    @override
    def end(self) -> Iterator[StreamItem]:
        for line in self._lines.end():
            if line is None or line.strip():
                yield from self._read(line)

    @abstractmethod
    def _read(self, line: bytes | None) -> Iterator[StreamItem]:
        """The item in a line, if it is one of items; None is one that is too long."""


class NdjsonReader(_LineReader):
    """One JSON value a line: an instance, or an object with `instance` and, if wanted, `id` and `mask`."""

    def __init__(self, spec: InputSpec, limits: Limits, max_item_bytes: int, *, masked: bool) -> None:
        super().__init__(max_item_bytes)
        self._spec = spec
        self._limits = limits
        self._masked = masked

    @override
    def _read(self, line: bytes | None) -> Iterator[StreamItem]:
        index = self._count
        self._count += 1
        if line is None:
            problem = f"item {index}: expected at most {self._max_item_bytes} bytes a line, found more"
            yield StreamItem(PayloadTooLarge(problem), 0)
            return
        try:
            value = parse_json(line)
        except ServiceError as error:
            yield StreamItem(type(error)(f"item {index}: {str(error).removeprefix('body: ')}"), 0)
            return
        identity, instance, mask = None, value, None
        try:
            if isinstance(value, dict) and "instance" in value and "instance" not in (self._spec.features or ()):
                known = {"id", "instance", "mask"} if self._masked else {"id", "instance"}
                identity = _identity(value.get("id"), index)
                instance = value["instance"]
                if unknown := value.keys() - known:
                    raise InvalidInput(f"item {index}: expected {' and '.join(sorted(known))}, found {min(unknown)!r}")
            if self._masked:
                if not isinstance(value, dict) or "mask" not in value:
                    raise InvalidInput(f'item {index}: expected {{"instance", "mask"}}, found no mask')
                mask = mask_from_json(value["mask"], index, self._spec, self._limits)
            entry: Entry | ServiceError = entry_from_json(instance, index, self._spec, self._limits)
        except ServiceError as error:
            entry = error
        yield StreamItem(entry, len(line), identity, mask=mask)


class CsvReader(_LineReader):
    """Records, one a line below a line of feature names; a column `id` that is no feature comes back in the answer."""

    def __init__(self, spec: InputSpec, max_item_bytes: int) -> None:
        if spec.picture is not None or len(spec.shape) != 1:
            raise InvalidInput("csv: this model takes no records, which are what a line of CSV can hold")
        super().__init__(max_item_bytes)
        self._spec = spec
        self._columns: list[int] | None = None
        self._id_column: int | None = None
        self._width = 0

    @override
    def end(self) -> Iterator[StreamItem]:
        yield from super().end()
        if self._columns is None:
            raise MalformedPayload("csv: expected a line of feature names, found none")

    @override
    def _read(self, line: bytes | None) -> Iterator[StreamItem]:
        if self._columns is None:
            self._read_head(_cells(line, "csv: the first line"))
            return
        index = self._count
        self._count += 1
        identity = None
        try:
            cells = _cells(line, f"item {index}")
            if len(cells) != self._width:
                raise ShapeMismatch(f"item {index}: expected {self._width} cells, found {len(cells)}")
            if self._id_column is not None:
                identity = cells[self._id_column]
            values = [_number(cells[column], index) for column in self._columns]
            entry: Entry | ServiceError = entry_from_json(values, index, self._spec, _NO_LIMITS)
        except ServiceError as error:
            entry = error
        yield StreamItem(entry, 4 * self._spec.size, identity)

    def _read_head(self, cells: list[str]) -> None:
        names = [cell.strip() for cell in cells]
        if len(set(names)) != len(names):
            raise InvalidInput("csv: a name is given to more than one column")
        features = self._spec.features
        if "id" in names and "id" not in (features or ()):
            self._id_column = names.index("id")
        given = [name for index, name in enumerate(names) if index != self._id_column]
        if features is None:
            if len(given) != self._spec.size:
                raise ShapeMismatch(f"csv: expected {self._spec.size} columns, found {len(given)}")
            features = tuple(given)
        unknown, missing = sorted(set(given) - set(features)), [name for name in features if name not in given]
        if unknown or missing:
            raise InvalidInput(f"csv: unknown columns {unknown[:8]}, missing columns {missing[:8]}")
        self._width = len(names)
        self._columns = [names.index(name) for name in features]


class NpyReader(StreamReader):
    """The rows of one npy file, (shape), (n, *shape) or (n, flat), in C's order."""

    def __init__(self, spec: InputSpec) -> None:
        self._spec = spec
        self._buffer = b""
        self._dtype: np.dtype[Any] | None = None
        self._rows = 0
        self._row_bytes = 0
        self._count = 0

    @override
    def feed(self, data: bytes) -> Iterator[StreamItem]:
        self._buffer += data
        if self._dtype is None:
            size = npy_header_size(self._buffer)
            if size is None or len(self._buffer) < size:
                return
            self._read_header(self._buffer)
        assert self._dtype is not None
        there = min(len(self._buffer) // self._row_bytes, self._rows - self._count)
        for position in range(there):
            flat = np.frombuffer(self._buffer, self._dtype, self._spec.size, position * self._row_bytes)
            index = self._count
            self._count += 1
            try:
                entry: Entry | ServiceError = entry_from_numbers(flat.reshape(self._spec.shape), index, self._spec)
            except ServiceError as error:
                entry = error
            yield StreamItem(entry, 4 * self._spec.size)
        self._buffer = self._buffer[there * self._row_bytes :]
        if self._count == self._rows and self._buffer:
            raise MalformedPayload(f"npy: the header promises {self._rows} rows, found bytes behind them")

    @override
    def end(self) -> Iterator[StreamItem]:
        if self._dtype is None:
            self._read_header(self._buffer)
        if self._count < self._rows:
            raise MalformedPayload(f"npy: the header promises {self._rows} rows, found {self._count}")
        yield from ()

    def _read_header(self, data: bytes) -> None:
        shape, fortran_order, dtype, start = read_npy_header(data)
        item = self._spec.shape
        if shape == item:
            shape = (1, *item)
        if len(shape) < 2 or shape[1:] not in (item, (self._spec.size,)):
            raise ShapeMismatch(f"npy: expected {item}, (n, *{item}) or (n, {self._spec.size}), found {shape}")
        if shape[0] < 0:
            raise MalformedPayload(f"npy: expected a shape of lengths ≥ 0, found {shape}")
        if fortran_order and shape[0] > 1 and math.prod(shape[1:]) > 1:
            raise InvalidInput("npy: expected rows in C's order, found Fortran's, whose rows end with the file")
        self._dtype, self._rows = dtype, shape[0]
        self._row_bytes = self._spec.size * dtype.itemsize
        self._buffer = data[start:]


class FormReader(StreamReader):
    """Picture files in the parts of a form; each answer has its file's name."""

    def __init__(self, spec: InputSpec, limits: Limits, parameters: dict[str, str], max_item_bytes: int) -> None:
        self._spec = spec
        self._limits = limits
        self._parts = MultipartReader(parameters, max_part_bytes=max_item_bytes)
        self._count = 0

    @override
    def feed(self, data: bytes) -> Iterator[StreamItem]:
        for part in self._parts.feed(data):
            index = self._count
            self._count += 1
            if isinstance(part, Part):
                yield _picture(part.data, index, part.file_name or None, self._spec, self._limits)
            else:
                yield StreamItem(type(part)(f"item {index}: {part}"), 0)

    @override
    def end(self) -> Iterator[StreamItem]:
        self._parts.end()
        yield from ()


class ZipReader(StreamReader):
    """Picture files in a zip, which is spooled to disk first: its contents are listed at its end.

    Folders, hidden files and what macOS adds are passed over.

    Args:
        max_item_bytes: most bytes of one file, unpacked.
        max_bytes: most bytes of the zip.
    """

    def __init__(self, spec: InputSpec, limits: Limits, max_item_bytes: int, max_bytes: int) -> None:
        self._spec = spec
        self._limits = limits
        self._max_item_bytes = max_item_bytes
        self._max_bytes = max_bytes
        self._file = tempfile.TemporaryFile(prefix="hourglass-")  # noqa: SIM115  closed by `close`
        self._size = 0

    @override
    def feed(self, data: bytes) -> Iterator[StreamItem]:
        self._size += len(data)
        if self._size > self._max_bytes:
            raise PayloadTooLarge(f"zip: expected at most {self._max_bytes} bytes, found more")
        self._file.write(data)
        yield from ()

    @override
    def end(self) -> Iterator[StreamItem]:
        self._check_directory()
        try:
            archive = zipfile.ZipFile(self._file)
        except _ZIP_DAMAGE as error:
            raise MalformedPayload(f"zip: {error}") from error
        with archive:
            for index, info in enumerate(info for info in archive.infolist() if _is_wanted(info)):
                yield self._read(archive, info, index)

    @override
    def close(self) -> None:
        self._file.close()

    def _read(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, index: int) -> StreamItem:
        try:
            with archive.open(info) as stream:
                data = stream.read(self._max_item_bytes + 1)
        except Exception as error:  # noqa: BLE001  zlib, bz2 and lzma each raise their own for hostile bytes
            problem = f"item {index}: zip: {info.filename!r} is damaged or encrypted: {error}"
            return StreamItem(MalformedPayload(problem), 0, name=info.filename)
        if len(data) > self._max_item_bytes:
            problem = f"item {index}: expected at most {self._max_item_bytes} bytes unpacked, found more"
            return StreamItem(PayloadTooLarge(problem), 0, name=info.filename)
        return _picture(data, index, info.filename, self._spec, self._limits)

    def _check_directory(self) -> None:
        """Raises PayloadTooLarge where the list of contents is too large to be held in memory."""
        tail_bytes = min(self._size, 65_557 + 20)
        self._file.seek(self._size - tail_bytes)
        tail = self._file.read(tail_bytes)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) < at + 22:
            raise MalformedPayload("zip: its list of contents is missing: truncated, or no zip")
        directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
        if directory_bytes == 0xFFFFFFFF:
            raise PayloadTooLarge("zip: its list of contents is larger than 4 GiB, or written as if it were")
        if directory_bytes > MAX_DIRECTORY_BYTES:
            raise PayloadTooLarge(
                f"zip: expected a list of contents of at most {MAX_DIRECTORY_BYTES} bytes, found {directory_bytes}"
            )


_NO_LIMITS = Limits(max_rows=1, max_image_pixels=1)  # of numbers, which cannot exceed any


def _identity(value: object, index: int) -> str | int | None:
    if isinstance(value, str | int | None) and not isinstance(value, bool):
        return value
    raise InvalidInput(f"item {index}: id: expected a string or an integer")


def _cells(line: bytes | None, where: str) -> list[str]:
    if line is None:
        raise PayloadTooLarge(f"{where}: longer than a line may be")
    try:
        return next(csv.reader([line.decode("utf-8-sig")], strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise MalformedPayload(f"{where}: not CSV in UTF-8: {error}") from error


def _number(cell: str, index: int) -> float:
    try:
        if "_" in cell:  # Python reads 1_000
            raise ValueError  # noqa: TRY301  as float would
        return float(cell)
    except ValueError as error:
        raise InvalidInput(f"item {index}: expected numbers, found {cell[:40]!r}") from error


def _picture(data: bytes, index: int, name: str | None, spec: InputSpec, limits: Limits) -> StreamItem:
    try:
        entry: Entry | ServiceError = entry_from_file(data, index, spec, limits)
    except ServiceError as error:
        entry = error
    return StreamItem(entry, len(data), name=name)


def _is_wanted(info: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(info.filename)
    return not info.is_dir() and not path.name.startswith(".") and "__MACOSX" not in path.parts
