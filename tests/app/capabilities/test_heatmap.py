"""Heat-maps as rectangles and overlays."""

from __future__ import annotations

import numpy as np
import pytest

from app.capabilities.heatmap import boxes_above, overlays


def drawn(*lines: str) -> np.ndarray:
    """A map of 2 where there is a #, 1 elsewhere."""
    return np.array([[2.0 if mark == "#" else 1.0 for mark in line] for line in lines], dtype=np.float32)


@pytest.mark.parametrize(
    ("lines", "boxes"),
    [
        (["...", "...", "..."], []),
        (["###", "###", "###"], [[0, 0, 3, 3]]),
        (["#..", ".#.", "..#"], [[0, 0, 3, 3]]),  # corners touch
        (["#.#", "#.#", "###"], [[0, 0, 3, 3]]),  # joined further down
        (["#.#.#", ".....", "#####"], [[0, 2, 5, 3], [0, 0, 1, 1], [2, 0, 3, 1], [4, 0, 5, 1]]),
        (["..#", "##.", "..#"], [[0, 0, 3, 3]]),
        (["#..#", "#..#"], [[0, 0, 1, 2], [3, 0, 4, 2]]),
    ],
)
def test_boxes_are_those_of_connected_places(lines: list[str], boxes: list[list[int]]) -> None:
    """What touches is one box, at corners too; the largest comes first. A place at the level is not above it."""
    assert boxes_above(drawn(*lines), 1.0) == boxes


def test_boxes_equal_those_of_a_flood() -> None:
    """On random maps the boxes are those that filling from each place finds."""
    random = np.random.default_rng(0)
    for _ in range(50):
        above = random.random((12, 15)) < 0.4
        expected = []
        left = {(int(y), int(x)) for y, x in np.argwhere(above)}
        while left:
            todo, region = [left.pop()], []
            while todo:
                y, x = todo.pop()
                region.append((y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                todo += near
            ys, xs = zip(*region, strict=True)
            expected.append([min(xs), min(ys), max(xs) + 1, max(ys) + 1])
        assert sorted(boxes_above(above.astype(np.float32), 0.5)) == sorted(expected)


def test_overlays_leave_typical_places_alone() -> None:
    """At 0 and below the picture shows as it is; above 1 it turns red, and no hotter than the scale's end."""
    picture = np.full((1, 1, 1, 5), 0.5, dtype=np.float32)
    maps = np.array([[[-3, 0, 0.5, 1.5, 99]]], dtype=np.float32)
    (shown,) = overlays(picture, maps, (0.0, 1.0))
    assert shown.shape == (3, 1, 5)
    np.testing.assert_array_equal(shown[:, 0, :2], 0.5)
    red, green, blue = shown[:, 0]
    assert red[2] < red[3]
    assert (green[3], blue[3]) < (green[2], 0.5)
    (hottest,) = overlays(picture[..., :1], np.array([[[2.0]]], dtype=np.float32), (0.0, 1.0))
    np.testing.assert_array_equal(shown[:, 0, 4], hottest[:, 0, 0])
    assert 0 <= shown.min() <= shown.max() <= 1
