"""Arrays → PNG, pixel for pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from app.codecs.images import GRID_GAP_PX, encode_png


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)


def test_one_picture_is_exact() -> None:
    """One grey array gives back its 256 pixel values."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (opened(encode_png((pixels.astype(np.float32) / 255)[np.newaxis, np.newaxis], (0, 1))) == pixels).all()


def test_colour_keeps_its_channels() -> None:
    """Three channels become RGB."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    array = pixels.transpose(2, 0, 1)[np.newaxis].astype(np.float32) / 255
    assert (opened(encode_png(array, (0, 1))) == pixels).all()


def test_values_beyond_the_range_are_clipped() -> None:
    """Below the range is black, above it white, in any range."""
    array = np.float32([-9, -1, 0, 1, 9]).reshape(1, 1, 1, 5)
    assert opened(encode_png(array, (-1, 1))).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (9, 3, 3), (10, 4, 3)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_several_pictures_make_one_grid(count: int, columns: int, rows: int, channels: int) -> None:
    """Several pictures stand left to right, then down, with a grey gap, in a grid as square as can be."""
    height, width = 4, 6
    arrays = np.stack([np.full((channels, height, width), index / 20, np.float32) for index in range(count)])
    grid = opened(encode_png(arrays, (0, 1)))
    step_y, step_x = height + GRID_GAP_PX, width + GRID_GAP_PX
    assert grid.shape[:2] == (rows * step_y - GRID_GAP_PX, columns * step_x - GRID_GAP_PX)
    expected = np.full_like(grid, 128)
    for index in range(count):
        y, x = index // columns * step_y, index % columns * step_x
        expected[y : y + height, x : x + width] = round(index / 20 * 255)
    assert (grid == expected).all()
