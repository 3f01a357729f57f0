"""Arrays → PNG: one picture, or several in one labelled grid."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_GAP_PX = 8
_LABEL_PX = 16  # a line of text and a little air
_FONT_PX = 12
_LEGIBLE_PX = 84  # tiles smaller than this are drawn larger, pixel by pixel, if the grid stays below the next
_WIDEST_GRID_PX = 1536
_PAPER, _FRAME, _INK = 255, 160, 48  # white, a grey that neither dark nor light pictures run into, and nearly black


def array_to_image(array: NDArray[np.float32], value_range: tuple[float, float]) -> Image.Image:
    """A picture of (1 or 3, height, width) with values in `value_range`; beyond it they are clipped."""
    low, high = value_range
    unit = (array.astype(np.float32) - low) / (high - low)
    pixels = np.clip(np.rint(unit * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)  # (height, width, channels)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


@dataclass(frozen=True)
class Grid:
    """Where each of `count` pictures of width × height pixels stands: left to right, then down, as square as can be.

    Small pictures are drawn `scale` times as large: what has 28 pixels is no more than a stamp on a screen.
    """

    count: int
    width: int
    height: int

    @property
    def columns(self) -> int:
        """How many stand in a row."""
        return math.ceil(math.sqrt(self.count))

    @property
    def scale(self) -> int:
        """Pixels of the grid for each pixel of a picture, in width and height."""
        larger = max(self.width, self.height)
        return max(1, min(math.ceil(_LEGIBLE_PX / larger), _WIDEST_GRID_PX // (self.columns * larger)))

    @property
    def step(self) -> tuple[int, int]:
        """From a picture to its right and its lower neighbour."""
        return self.width * self.scale + _GAP_PX, self.height * self.scale + _GAP_PX + _LABEL_PX

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole."""
        (right, down), rows = self.step, math.ceil(self.count / self.columns)
        return self.columns * right + _GAP_PX, rows * down + _GAP_PX

    def place(self, index: int) -> tuple[int, int]:
        """The left upper corner of a picture, (x, y); its label is below it."""
        (right, down), (row, column) = self.step, divmod(index, self.columns)
        return _GAP_PX + column * right, _GAP_PX + row * down


def encode_png(
    arrays: NDArray[np.float32], value_range: tuple[float, float], labels: Sequence[object] | None = None
) -> bytes:
    """PNG of (n, channels, height, width): the picture itself if n is 1, else a grid with a label below each.

    Labels are the indexes, counted from 0, unless others are given.
    """
    images = [array_to_image(array, value_range) for array in arrays]
    if len(images) == 1:
        return _png(images[0])
    grid = Grid(len(images), *images[0].size)
    paper = Image.new(images[0].mode, grid.size, _shade(images[0].mode, _PAPER))
    draw = ImageDraw.Draw(paper)
    width, height = grid.width * grid.scale, grid.height * grid.scale
    for index, image in enumerate(images):
        x, y = grid.place(index)
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_shade(image.mode, _FRAME))
        paper.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        text = _fitting(str(index if labels is None else labels[index]), width + _GAP_PX - 2)
        middle = (x + width / 2, y + height + _LABEL_PX / 2 + 1)
        draw.text(middle, text, fill=_shade(image.mode, _INK), font=_font(), anchor="mm")
    return _png(paper)


def _shade(mode: str, grey: int) -> int | tuple[int, ...]:
    return grey if mode == "L" else (grey,) * 3


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_PX)


def _fitting(label: str, width_px: float) -> str:
    """The label in one line, its end cut off where it is wider than that."""
    text = " ".join(label[:256].split())
    if _font().getlength(text) <= width_px:
        return text
    while text and _font().getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…" if text else ""


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=3)
    return stream.getvalue()
