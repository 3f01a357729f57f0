"""Arrays → PNG, pixel for pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from app.codecs.images import Grid, encode_png


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
    """Several pictures stand left to right, then down, each pixel as a square of its value, in a grid as square as can
    be; what is between them is white, but for a frame around each and ink below it.
    """
    height, width = 4, 6
    arrays = np.random.default_rng(0).random((count, channels, height, width)).astype(np.float32)
    grid, found = Grid(count, width, height), opened(encode_png(arrays, (0, 1)))
    assert (grid.columns, grid.scale) == (columns, 14)
    assert found.shape[:2] == grid.size[::-1]
    assert grid.place(count - 1)[1] // grid.step[1] == rows - 1
    for index, array in enumerate(arrays):
        x, y = grid.place(index)
        there = found[y : y + 14 * height, x : x + 14 * width].reshape(14 * height, 14 * width, channels)
        expected = np.rint(array * 255).repeat(14, axis=1).repeat(14, axis=2).transpose(1, 2, 0)
        assert (there == expected).all()
        assert set(found[y - 1, x : x + 14 * width].ravel()) == {160}
        assert (found[y + 14 * height + 1 : y + 14 * height + 16, x : x + 14 * width] < 100).any()
    assert set(found[:7].ravel()) == {255}


def ink(label: str | None) -> bytes:
    """What is written below the second of two pictures."""
    labels = None if label is None else ["", label]
    found = opened(encode_png(np.zeros((2, 1, 28, 28), np.float32), (0, 1), labels))
    grid = Grid(2, 28, 28)
    x, y = grid.place(1)
    return found[y + 28 * grid.scale + 1 :, x - 4 : x + 28 * grid.scale + 4].tobytes()


def test_labels_are_the_indexes_or_those_given() -> None:
    """Below a picture stands its index, or the label that was given, in one line and cut where it is too wide."""
    assert ink(None) == ink("1") != ink("2")
    assert ink("two\nlines \t here") == ink("two lines here")
    assert ink("long " * 500) != ink("long") != ink("")
    assert ink("Größe 猫 \x00 🐈") != ink("")


def test_large_grids_stay_small() -> None:
    """Thousands of pictures are not drawn larger than they are."""
    assert Grid(4096, 28, 28).scale == 1
    assert Grid(2, 512, 300).scale == 1
    assert max(Grid(256, 28, 28).size) < 2048
