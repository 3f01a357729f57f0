"""Arrays → PNG: one picture, or several in one grid."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID_GAP_PX = 2
_GRID_BACKGROUND = 128  # middle grey: neither dark nor light pictures run into each other


def array_to_image(array: NDArray[np.float32], value_range: tuple[float, float]) -> Image.Image:
    """A picture of (1 or 3, height, width) with values in `value_range`; beyond it they are clipped."""
    low, high = value_range
    unit = (array.astype(np.float32) - low) / (high - low)
    pixels = np.clip(np.rint(unit * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)  # (height, width, channels)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def encode_png(arrays: NDArray[np.float32], value_range: tuple[float, float]) -> bytes:
    """PNG of (n, channels, height, width): the picture itself if n is 1, else all of them in rows, left to right."""
    images = [array_to_image(array, value_range) for array in arrays]
    if len(images) == 1:
        return _png(images[0])
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    step_x, step_y = width + GRID_GAP_PX, height + GRID_GAP_PX
    background: int | tuple[int, int, int] = _GRID_BACKGROUND
    if images[0].mode == "RGB":
        background = (_GRID_BACKGROUND,) * 3
    grid = Image.new(images[0].mode, (columns * step_x - GRID_GAP_PX, rows * step_y - GRID_GAP_PX), background)
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * step_x, index // columns * step_y))
    return _png(grid)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=3)
    return stream.getvalue()
