"""Ranges: the quick look says no at least wherever the plain comparison does, and no more than for −0.0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.codecs.ranges import are_within, pieces

RANGES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), None]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value_range", RANGES)
@given(
    value=st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 255.0, -1.0, 1.0000001192092896, -1e-45]),
    size=st.sampled_from([1, 3, 500, 501, 784, 1500, 5000]),
    place=st.integers(0, 4999),
)
def test_it_says_what_comparing_says(
    dtype: type[np.floating], value_range: tuple[float, float] | None, value: float, size: int, place: int
) -> None:
    """One number anywhere among good ones decides."""
    numbers = np.full(size, 0.5, dtype)
    numbers[place % size] = value
    low, high = value_range or (-np.inf, np.inf)
    expected = bool((np.isfinite(numbers) & (numbers >= low) & (numbers <= high)).all())
    is_minus_zero = value == 0 and bool(np.signbit(value))
    assert are_within(numbers, value_range) == expected or is_minus_zero


@given(st.integers(1, 10_000))
def test_pieces_are_the_whole(size: int) -> None:
    """Every element is in one piece, in order."""
    assert [index for piece in pieces(size) for index in range(size)[piece]] == list(range(size))
