"""Whether numbers lie in a range, at the least cost to whoever else runs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = float(np.finfo(np.float32).max)

# numpy lets go of the interpreter for more elements than that, and waits for it to come back. For a small array both
# cost more than the work: the thread of the device is woken for each, and then keeps the event loop from going on.
_KEEPS_LOCK, _SMALL = 500, 4000


def pieces(size: int) -> list[slice]:
    """What a flat array of that many elements is best worked on in: all of it, unless it is small."""
    if not _KEEPS_LOCK < size <= _SMALL:
        return [slice(0, size)]
    return [slice(start, start + _KEEPS_LOCK) for start in range(0, size, _KEEPS_LOCK)]


def are_within(numbers: NDArray[np.floating[Any]], value_range: tuple[float, float] | None) -> bool:
    """Whether all of a flat array's numbers are finite and lie in the range; of −0.0 it may say no."""
    low, high = value_range or (-LARGEST, LARGEST)
    for piece in map(numbers.__getitem__, pieces(numbers.size)):
        if low == 0:
            # One look instead of two: as integers, the bits of floats from 0 on rise as they do, below those of
            # negative ones and NaN.
            bits = np.uint64 if piece.dtype == np.float64 else np.uint32
            if int(np.maximum.reduce(piece.view(bits))) > _bits(high, bits):
                return False
        elif not (low <= np.minimum.reduce(piece) and np.maximum.reduce(piece) <= high):
            return False
    return True


@lru_cache(maxsize=64)
def _bits(number: float, bits: type[np.uint64 | np.uint32]) -> int:
    floats = np.float64 if bits is np.uint64 else np.float32
    return int(floats(number).view(bits))
