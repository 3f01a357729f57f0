"""Heat-maps as pictures and rectangles. A map's scale is fixed: 0 is typical, above 1 is what few normal items show."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HOTTEST = 2.0  # beyond it, everything is shown alike
_MOST_OPAQUE = 0.75
# Places of the scale, and their colours: faint yellow up to 1, red above it, nearly white where it is hottest.
_STOPS = np.array([0.0, 1.0, 1.001, HOTTEST])
_COLOURS = np.array([[1.0, 0.9, 0.2], [1.0, 0.7, 0.0], [1.0, 0.2, 0.0], [1.0, 0.0, 0.5]])
_OPACITIES = np.array([0.0, 0.35, 0.6, _MOST_OPAQUE])


def overlays(
    pictures: NDArray[np.float32], maps: NDArray[np.float32], value_range: tuple[float, float]
) -> NDArray[np.float32]:
    """Pictures, (n, 1 or 3, height, width), in colour with their maps, (n, height, width), laid over them.

    Returns (n, 3, height, width) in `value_range`.
    """
    low, high = value_range
    heat = np.clip(maps, 0.0, HOTTEST)
    colour = np.stack([np.interp(heat, _STOPS, _COLOURS[:, channel]) for channel in range(3)], axis=1)
    opacity = np.interp(heat, _STOPS, _OPACITIES)[:, np.newaxis]
    ground = np.broadcast_to(pictures, (len(pictures), 3, *pictures.shape[2:]))
    return np.asarray(ground * (1 - opacity) + (low + (high - low) * colour) * opacity, dtype=np.float32)


def boxes_above(values: NDArray[np.float32], level: float) -> list[list[int]]:
    """Rectangles around the connected places, corners counting as neighbours, of (height, width) above `level`.

    [x0, y0, x1, y1] each, x1 and y1 just outside; largest first, then from the top left.
    """
    boxes: list[list[int]] = []  # of every run of places, merged into the first of its connected ones
    parents: list[int] = []

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    above: list[tuple[int, int, int]] = []  # runs of the line before: first, just after the last, index
    for y, line in enumerate(values > level):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        runs: list[tuple[int, int, int]] = []
        for x0, x1 in edges.reshape(-1, 2).tolist():
            index = len(boxes)
            boxes.append([x0, y, x1, y + 1])
            parents.append(index)
            for other_x0, other_x1, other in above:
                if other_x0 <= x1 and x0 <= other_x1:
                    first, second = sorted((root(other), root(index)))
                    if first != second:
                        parents[second] = first
                        a, b = boxes[first], boxes[second]
                        boxes[first] = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
            runs.append((x0, x1, index))
        above = runs
    found = [boxes[index] for index in range(len(boxes)) if parents[index] == index]
    return sorted(found, key=lambda box: (-(box[2] - box[0]) * (box[3] - box[1]), box[1], box[0]))
