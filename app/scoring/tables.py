"""Verdicts → a file or a terminal, row by row: JSON lines, CSV, Parquet, or a table for people.

A row is what JSON says of it, in every format: the digits are those that the service answers.
"""

from __future__ import annotations

import csv
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import orjson
from rich.console import Console
from typing_extensions import override

from app.artifacts.manifest import Manifest
from app.capabilities.anomaly_score import Verdict
from app.scoring.errors import ScoringError, import_pyarrow

SUFFIXES = (".parquet", ".csv", ".jsonl")
_KINDS: dict[Any, str] = {float: "float64", bool: "bool", str: "string", int: "int64"}
_PATH_WIDTH = 48


def columns_of(manifest: Manifest) -> dict[str, str]:
    """Name → type of the columns of a table of verdicts by that model; parts of the score have one each."""
    fields = {name: _KINDS[field.annotation] for name, field in Verdict.model_fields.items() if _is_plain(field)}
    parts = {f"components.{name}": "float64" for name in manifest.components}
    return {"path": "string", "row": "int64", "id": "string", **fields, **parts, "error": "string", "code": "string"}


class Table(ABC):
    """Takes rows in order; a context manager, whose file is there under its name only after all went well."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows: `path`, `row`, `id`, and the fields of a verdict or `error` and `code`."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _File(Table):
    """A file that is written under another name first. Raises ScoringError where it cannot be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")

    @override
    def __enter__(self) -> Self:
        try:
            self._file = self._part.open("wb")
        except OSError as error:
            raise ScoringError(f"{self._path}: cannot be written: {error.strerror}") from error
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            if kind is None:
                self._part.replace(self._path)
            else:
                self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Writes what ends the file."""


class _JsonLines(_File):
    @override
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        _write_lines(self._file, rows)


class _Csv(_File):
    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        super().__init__(path)
        self._columns = columns

    @override
    def __enter__(self) -> Self:
        super().__enter__()
        self._write([list(self._columns)])
        return self

    @override
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._write([[_cell(row.get(name)) for name in self._columns] for row in map(_flat, rows)])

    def _write(self, rows: list[list[str]]) -> None:
        lines: list[str] = []
        csv.writer(_Appending(lines), lineterminator="\n").writerows(rows)
        self._file.write("".join(lines).encode())


class _Parquet(_File):
    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        super().__init__(path)
        import_pyarrow(path)
        self._columns = columns
        self._rows: list[dict[str, Any]] = []

    @override
    def __enter__(self) -> Self:
        import pyarrow as pa  # noqa: PLC0415  an extra, and slow to import
        import pyarrow.parquet as pq  # noqa: PLC0415  likewise

        super().__enter__()
        types = {"float64": pa.float64(), "bool": pa.bool_(), "string": pa.string(), "int64": pa.int64()}
        self._schema = pa.schema([(name, types[kind]) for name, kind in self._columns.items()])
        self._writer = pq.ParquetWriter(self._file, self._schema)
        return self

    @override
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows += map(_flat, rows)
        if len(self._rows) >= _ROW_GROUP:
            self._write_group()

    @override
    def _finish(self) -> None:
        self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as pa  # noqa: PLC0415  as above

        rows = [row | {"id": None if row.get("id") is None else str(row["id"])} for row in self._rows]
        self._writer.write_table(pa.Table.from_pylist(rows, self._schema))
        self._rows.clear()


_ROW_GROUP = 65_536


class _Stdout(Table):
    """JSON lines for the next program of a pipe."""

    @override
    def __enter__(self) -> Self:
        return self

    @override
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        _write_lines(sys.stdout.buffer, rows)
        sys.stdout.buffer.flush()

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class _Terminal(Table):
    """A line an item, for people."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_head = False

    @override
    def __enter__(self) -> Self:
        return self

    @override
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        lines = [] if self._has_head else [f"{'':{_PATH_WIDTH}} {'score':>12} {'p-value':>9}"]
        self._has_head = True
        for row in rows:
            name = row["path"] + (
                f" [{row['id'] if row.get('id') is not None else row['row']}]" if "row" in row else ""
            )
            shown = name if len(name) <= _PATH_WIDTH else "…" + name[1 - _PATH_WIDTH :]
            if "error" in row:
                lines.append(f"{shown:{_PATH_WIDTH}} {row['code']}: {row['error']}")
            else:
                verdict = "  anomaly" if row["is_anomaly"] else ""
                lines.append(f"{shown:{_PATH_WIDTH}} {row['score']:12.6g} {row['p_value']:9.4g}{verdict}")
        self._console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


def table_for(out: Path | None, manifest: Manifest, console: Console | None) -> Table:
    """What writes the rows: the format is the file's suffix; without a file, lines on `console` or JSON on stdout.

    Raises ScoringError for another suffix, or where Parquet lacks pyarrow.
    """
    if out is None:
        return _Stdout() if console is None else _Terminal(console)
    suffix = out.suffix.lower()
    if suffix == ".jsonl":
        return _JsonLines(out)
    if suffix == ".csv":
        return _Csv(out, columns_of(manifest))
    return _Parquet(out, columns_of(manifest))


def check_out(out: Path | None) -> None:
    """Raises ScoringError, before anything is loaded, for a file that could not be written in the end."""
    if out is None:
        return
    if out.suffix.lower() not in SUFFIXES:
        raise ScoringError(f"--out {out}: expected a name that ends with {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise ScoringError(f"--out {out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise ScoringError(f"--out {out}: is a folder")
    if out.suffix.lower() == ".parquet":
        import_pyarrow(f"--out {out}")


class _Appending:
    """A list of strings as the file that `csv.writer` writes to."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append


def _write_lines(file: BinaryIO, rows: Sequence[dict[str, Any]]) -> None:
    file.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    parts = row.get("components") or {}
    return {**row, **{f"components.{name}": value for name, value in parts.items()}}


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


def _is_plain(field: Any) -> bool:
    with suppress(TypeError):  # some annotations cannot be looked up
        return field.annotation in _KINDS
    return False
