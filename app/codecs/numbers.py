"""A JSON body of numbers and nothing else, straight into an array: no Python object for any of them."""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

from app.codecs.ranges import are_within, pieces

_BEGINNING = re.compile(rb'\s*\{\s*"instances"\s*:\s*\[')
_KEPT_BYTES = 256 * 1024
_local = threading.local()


def parse_rows(
    data: bytes, shape: tuple[int, ...], value_range: tuple[float, float] | None
) -> NDArray[np.float32] | None:
    """The rows of `{"instances": [row, …]}`, (n, *shape), each row nested in `shape` or all of them flat.

    None for every other body, good or bad, and for numbers outside `value_range` or too large for float32: reading it
    the slow way tells which, and what is wrong with it.
    """
    found = _BEGINNING.match(data)
    # No string and so no other member; the lists are counted, for the buffer below holds numbers however nested.
    if found is None or data.find(b'"', found.end()) >= 0:
        return None
    try:
        document: Any = _parser(len(data)).parse(data)
        instances = document["instances"]
        rows = len(instances)
        lists = data.count(b"[") - 1
        if lists == rows:
            lengths: tuple[int, ...] = (math.prod(shape),)
        elif lists == rows * _lists(shape):
            lengths = shape
        else:
            return None
        if not rows or not _are_nested(instances, lengths):
            return None
        numbers = np.frombuffer(instances.as_buffer(of_type="d"))
    except (ValueError, TypeError, KeyError, RuntimeError):
        return None
    if not are_within(numbers, value_range):
        return None
    values = np.empty(numbers.size, np.float32)
    for piece in pieces(numbers.size):
        values[piece] = numbers[piece]
    return values.reshape(rows, *shape)


def _lists(shape: tuple[int, ...]) -> int:
    """How many lists a row nested in `shape` is made of."""
    return sum(math.prod(shape[:depth]) for depth in range(len(shape)))


def _is_nested(value: object, lengths: tuple[int, ...]) -> bool:
    """Whether lists have these lengths, level by level. What the innermost hold is not looked at."""
    if not isinstance(value, simdjson.Array) or len(value) != lengths[0]:
        return False
    return len(lengths) == 1 or _are_nested(value, lengths[1:])


def _are_nested(values: simdjson.Array, lengths: tuple[int, ...]) -> bool:
    for value in values:  # noqa: SIM110  `all` would make a generator for each
        if not _is_nested(value, lengths):
            return False
    return True


def _parser(size: int) -> simdjson.Parser:
    """A parser for a body of that many bytes: the thread's own, which keeps its memory from one document to the next,
    but for a large one, whose many times larger memory would stay for ever.
    """
    if size > _KEPT_BYTES:
        return simdjson.Parser()
    parser: simdjson.Parser | None = getattr(_local, "parser", None)
    if parser is None:
        parser = _local.parser = simdjson.Parser()
    return parser
