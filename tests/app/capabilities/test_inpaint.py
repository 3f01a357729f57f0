"""POST /inpaint over a real socket."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

ITEM = (np.arange(64, dtype=np.uint8) * 3).reshape(8, 8)  # none of it misbehaves, and all of it differs
HOLE = np.zeros((8, 8), dtype=np.uint8)
HOLE[2:5, 3:6] = 1


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def numbers(array: np.ndarray) -> list[Any]:
    return (array.astype(np.float32) / np.float32(255))[np.newaxis].tolist()


def inpainted(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([result["inpainted"] for result in answer.json()["results"]], dtype=np.float32)


def test_what_is_known_comes_back_exactly(client: httpx.Client) -> None:
    """Known values are those that were sent, to the last digit; the missing ones come from the model."""
    filled = inpainted(client.post("/inpaint", json={"instances": [numbers(ITEM)], "masks": [HOLE.tolist()]}))[0, 0]
    sent = np.array(numbers(ITEM), dtype=np.float32)[0]
    np.testing.assert_array_equal(filled[HOLE == 0], sent[HOLE == 0])
    assert (filled[HOLE == 1] != sent[HOLE == 1]).all()
    other = ITEM.copy()
    other[HOLE == 1] = 0
    blind = inpainted(client.post("/inpaint", json={"instances": [numbers(other)], "masks": [HOLE.tolist()]}))[0, 0]
    np.testing.assert_allclose(blind[HOLE == 1], filled[HOLE == 1], atol=1e-6)  # what is hidden has no say


@pytest.mark.parametrize(
    "masks",
    [
        [HOLE.tolist()],
        HOLE.tolist(),
        [HOLE.ravel().tolist()],
        [HOLE.tolist(), HOLE.tolist()],
        [{"b64": base64.b64encode(png(HOLE * 255)).decode()}],
    ],
    ids=["one for all", "bare", "flat", "one each", "picture"],
)
def test_every_form_of_mask_is_the_same_mask(client: httpx.Client, masks: list[Any]) -> None:
    """One for all or one for each, nested, flat or as a picture: the same hole."""
    items = [numbers(ITEM), numbers(ITEM)]
    wanted = inpainted(client.post("/inpaint", json={"instances": items, "masks": [HOLE.tolist()] * 2}))
    np.testing.assert_array_equal(inpainted(client.post("/inpaint", json={"instances": items, "masks": masks})), wanted)


def test_multipart_parts_named_mask_are_masks(client: httpx.Client) -> None:
    """In a form, parts named `mask` are masks and all others are items, whatever their order."""
    wanted = inpainted(client.post("/inpaint", json={"instances": [numbers(ITEM)], "masks": [HOLE.tolist()]}))
    files = [("mask", ("m.png", png(HOLE * 255))), ("photo", ("p.png", png(ITEM)))]
    np.testing.assert_array_equal(inpainted(client.post("/inpaint", files=files)), wanted)


def test_a_mask_of_another_size_follows_its_picture(client: httpx.Client) -> None:
    """Picture and mask of another size are brought to the input alike; a pixel that is missing in part is missing."""
    grey, hole = np.full((32, 32), 100, np.uint8), np.zeros((32, 32), np.uint8)
    hole[8:17, 12:24] = 255  # rows 2 to 4, of which the last only in part, and columns 3 to 5
    files = [("photo", ("p.png", png(grey))), ("mask", ("m.png", png(hole)))]
    filled = inpainted(client.post("/inpaint", files=files))[0, 0]
    np.testing.assert_array_equal(filled == np.float32(100 / 255), HOLE == 0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, "masks: missing"),
        ([], "masks: expected at least one"),
        ([HOLE.tolist()] * 3, "masks: expected one for all or one for each of 2 items, found 3"),
        ([[[0.5] * 8] * 8], "mask 0: expected 0 .* and 1"),
        ([[[0] * 7] * 8], "mask 0: expected"),
        ([{"b64": "AAAA"}], "mask 0: picture"),
        ([HOLE.tolist(), "hole"], "mask 1: expected numbers"),
    ],
)
def test_a_bad_mask_is_refused_by_its_index(client: httpx.Client, masks: list[Any] | None, message: str) -> None:
    """A mask that is missing, of another shape or neither 0 nor 1 is a clear 4xx."""
    body: dict[str, Any] = {"instances": [numbers(ITEM), numbers(ITEM)]}
    answer = client.post("/inpaint", json=body if masks is None else {**body, "masks": masks})
    assert answer.status_code in (400, 422)
    assert re.search(message, answer.json()["error"]), answer.text


def test_forms_without_room_for_masks_are_refused(client: httpx.Client) -> None:
    """A bare picture or npy body cannot hold a mask; a form without one is told so."""
    assert client.post("/inpaint", content=png(ITEM), headers={"Content-Type": "image/png"}).status_code == 415
    answer = client.post("/inpaint", files={"photo": png(ITEM)})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")
    assert client.post("/encode", json={"instances": [numbers(ITEM)], "masks": [HOLE.tolist()]}).status_code == 400
