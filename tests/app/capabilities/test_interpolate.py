"""POST /interpolate over a real socket, and the ways through the latent space."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from app.capabilities.interpolate import linear, spherical

ITEMS = (np.random.default_rng(5).random((2, 1, 8, 8)) * 0.9).astype(np.float32)


def test_the_ends_are_the_items_reconstructions(client: httpx.Client) -> None:
    """The way begins at the first item's reconstruction and ends at the second's, in as many steps as asked for."""
    answer = client.post("/interpolate?steps=5", json={"instances": ITEMS.tolist()})
    steps = np.array([result["reconstruction"] for result in answer.json()["results"]])
    assert steps.shape == (5, 1, 8, 8)
    ends = client.post("/reconstruct", json={"instances": ITEMS.tolist()}).json()["results"]
    np.testing.assert_allclose(steps[[0, -1]], [end["reconstruction"] for end in ends], atol=1e-5)
    assert len(client.post("/interpolate", json={"instances": ITEMS.tolist()}).json()["results"]) == 8


@pytest.mark.parametrize(
    ("query", "count", "code"),
    [
        ("", 1, "invalid_input"),
        ("", 3, "invalid_input"),
        ("?steps=1", 2, "invalid_parameter"),
        ("?steps=65", 2, "invalid_parameter"),
    ],
)
def test_other_than_two_items_or_2_to_64_steps_is_refused(
    client: httpx.Client, query: str, count: int, code: str
) -> None:
    """Exactly two items, and 2 to 64 steps."""
    items = np.repeat(ITEMS[:1], count, axis=0)
    answer = client.post(f"/interpolate{query}", json={"instances": items.tolist()})
    assert (answer.status_code, answer.json()["code"]) == (400, code)


def test_the_spherical_way_keeps_the_length() -> None:
    """Between vectors of equal length every step has it; the linear way cuts the corner; both keep the ends."""
    start, end = np.array([3, 0, 0], np.float32), np.array([0, 3, 0], np.float32)
    at = np.linspace(0, 1, 7, dtype=np.float32)
    arc, line = spherical(start, end, at), linear(start, end, at)
    np.testing.assert_allclose(np.linalg.norm(arc, axis=1), 3, rtol=1e-5)
    assert np.linalg.norm(line[3]) < 2.2
    for way in (arc, line):
        np.testing.assert_allclose(way[[0, -1]], [start, end], atol=1e-6)


@pytest.mark.parametrize("end", [[3, 0, 0], [-3, 0, 0], [0, 0, 0]])
def test_the_spherical_way_is_finite_where_there_is_no_arc(end: list[float]) -> None:
    """The same direction, the opposite one and no direction at all give finite steps with the right ends."""
    start, stop = np.array([3, 0, 0], np.float32), np.array(end, np.float32)
    way = spherical(start, stop, np.linspace(0, 1, 5, dtype=np.float32))
    assert np.isfinite(way).all()
    np.testing.assert_allclose(way[[0, -1]], [start, stop], atol=1e-6)
