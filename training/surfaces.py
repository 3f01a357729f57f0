"""Synthetic pictures of textured surfaces, good ones and defective ones with masks: for trying inspection out.

Everything is decided by the seed. A defect's contrast is in units of the texture's standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

AREAS = (0.002, 0.03)  # of the picture
CONTRASTS = (0.5, 3.0)
KINDS = ("scratch", "blob", "patch")
_TEXTURE_DEVIATION = 0.06  # of the range of grey levels


@dataclass(frozen=True)
class Surface:
    """One picture; `mask` is True where it is defective, `kind` empty if it is nowhere."""

    pixels: NDArray[np.uint8]  # (height, width, 3)
    mask: NDArray[np.bool_]  # (height, width)
    kind: str = ""
    contrast: float = 0.0


def good_surface(side: int, seed: int) -> Surface:
    """A brushed, coloured texture: long grain across, fine grain all over, light that falls off a little."""
    colour = _texture(side, np.random.default_rng([seed, 0]))
    return Surface(_pixels(colour), np.zeros((side, side), dtype=bool))


def defective_surface(side: int, seed: int) -> Surface:
    """The same with a scratch, a blob or a patch of turned texture."""
    random = np.random.default_rng([seed, 1])
    colour = _texture(side, random)
    kind = KINDS[int(random.integers(len(KINDS)))]
    area, contrast = random.uniform(*AREAS), random.uniform(*CONTRASTS)
    mask = _region(side, kind, area, random)
    if kind == "patch":
        other = _texture(side, random).transpose(1, 0, 2)
        changed = np.where(mask[..., None], other + contrast * _TEXTURE_DEVIATION * _direction(random), colour)
    else:
        changed = colour + mask[..., None] * contrast * _TEXTURE_DEVIATION * _direction(random)
    return Surface(_pixels(changed), mask, kind, contrast)


def write_surfaces(folder: Path, good: int, defective: int, side: int, seed: int) -> None:
    """Pictures under `good/` and `defective/`, and the defects' masks, light where defective, under `masks/`."""
    for name in ("good", "defective", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(good):
        surface = good_surface(side, seed * 1_000_000 + index)
        Image.fromarray(surface.pixels).save(folder / "good" / f"{index:04}.png")
    for index in range(defective):
        surface = defective_surface(side, seed * 1_000_000 + index)
        Image.fromarray(surface.pixels).save(folder / "defective" / f"{index:04}.png")
        Image.fromarray(surface.mask.astype(np.uint8) * 255).save(folder / "masks" / f"{index:04}.png")


def _texture(side: int, random: np.random.Generator) -> NDArray[np.float64]:
    """(side, side, 3), mean colour and light included."""
    frequency_y, frequency_x = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    grains = []
    for across, along in ((0.03, 0.15), (0.12, 0.12)):  # how fast the spectrum falls, in cycles per pixel
        spectrum = np.exp(-((frequency_x / across) ** 2) - (frequency_y / along) ** 2)
        grain = np.fft.ifft2(np.fft.fft2(random.standard_normal((side, side))) * spectrum).real
        grains.append(grain / grain.std())
    grain = 0.8 * grains[0] + 0.6 * grains[1]
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    light = random.uniform(-0.05, 0.05) * x + random.uniform(-0.05, 0.05) * y
    colour = np.array([0.55, 0.5, 0.42]) + random.normal(0, 0.01, 3)
    return np.asarray(colour + (_TEXTURE_DEVIATION * grain + light)[..., None] * np.array([1.0, 0.95, 0.85]))


def _region(side: int, kind: str, area: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Where the defect is: an ellipse of that area, long and thin for a scratch, well inside the picture."""
    longer = {"scratch": 15.0, "blob": random.uniform(1, 2), "patch": random.uniform(1, 1.5)}[kind]
    short = side * np.sqrt(area / (np.pi * longer))
    long_ = min(longer * short, 0.45 * side)
    short = max(0.7, area * side * side / (np.pi * long_))
    angle = random.uniform(0, np.pi)
    reach = np.abs([np.sin(angle) * long_, np.cos(angle) * long_]) + short
    centre = [random.uniform(min(r, side / 2), max(side - r, side / 2)) for r in reach]
    y, x = np.mgrid[0:side, 0:side]
    along = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
    across = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle)
    mask = (along / long_) ** 2 + (across / short) ** 2 <= 1
    mask[int(centre[0]), int(centre[1])] = True
    return np.asarray(mask)


def _direction(random: np.random.Generator) -> NDArray[np.float64]:
    """Lighter or darker, of a slight colour."""
    sign = 1.0 if random.random() < 0.5 else -1.0
    return np.asarray(sign * (1 + random.normal(0, 0.2, 3)))


def _pixels(colour: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(colour * 255), 0, 255).astype(np.uint8)
