"""A JSON body of numbers and nothing else, straight into an array: no Python object for any of them."""

from __future__ import annotations

import math
import re
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

_BEGINNING = re.compile(rb'\s*\{\s*"instances"\s*:\s*\[')
_LARGEST = float(np.finfo(np.float32).max)
_KEPT_BYTES = 256 * 1024
# numpy lets go of the interpreter for more elements than that, and waits for it to come back. For a small body both
# cost more than the work: the thread of the device is woken for each, and then keeps the event loop from going on.
_KEEPS_LOCK, _SMALL = 500, 4000
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
    values = np.empty(numbers.size, np.float32)
    step = _KEEPS_LOCK if numbers.size <= _SMALL else numbers.size
    for start in range(0, numbers.size, step):
        piece = numbers[start : start + step]
        if not _are_within(piece, value_range):
            return None
        values[start : start + step] = piece
    return values.reshape(rows, *shape)


def _are_within(numbers: NDArray[np.float64], value_range: tuple[float, float] | None) -> bool:
    """Whether all numbers lie in the range; of −0.0 it may say no."""
    low, high = value_range or (-_LARGEST, _LARGEST)
    if low == 0:
        # One look instead of two: as integers, the bits of floats from 0 on rise as they do, below those of negative
        # ones and NaN.
        return int(np.maximum.reduce(numbers.view(np.uint64))) <= _bits(high)
    return bool(low <= np.minimum.reduce(numbers) and np.maximum.reduce(numbers) <= high)


@lru_cache(maxsize=64)
def _bits(number: float) -> int:
    return int(np.float64(number).view(np.uint64))


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
