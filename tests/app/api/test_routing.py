"""What all inference endpoints share: negotiation, pictures in JSON, repeats, numbers."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from app.codecs.images import Grid
from app.codecs.npy import encode_npy

if TYPE_CHECKING:
    from conftest import Service

PICTURES = {"/reconstruct": "reconstruction", "/denoise": "denoised", "/decode": "reconstruction", "/sample": "sample"}
BODIES: dict[str, dict[str, Any]] = {
    "/encode": {"instances": [[0.5] * 64, [0.25] * 64]},
    "/decode": {"latents": [[0.5, -1, 0, 2], [1, 2, 3, 4]]},
    "/reconstruct": {"instances": [[0.5] * 64, [0.25] * 64]},
    "/denoise": {"instances": [[0.5] * 64, [0.25] * 64]},
    "/anomaly-score": {"instances": [[0.5] * 64, [0.25] * 64]},
    "/sample": {"count": 2, "seed": 1},
}


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html", "application/json"),
        ("Text/HTML;q=0.9", "application/json"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/png,*/*;q=0.8", "application/json"),
        ("application/*", "application/json"),
        ("application/json", "application/json"),
        ("image/png", "image/png"),
        ("IMAGE/PNG", "image/png"),
        ("image/*", "image/png"),
        ("application/x-npy", "application/x-npy"),
        ("image/png, application/json", "application/json"),
        ("image/png, application/json;q=0.5", "image/png"),
        ("image/png;q=0.2, application/x-npy;q=0.8, application/json;q=0.5", "application/x-npy"),
        ("*/*;q=0.1, image/png", "image/png"),
        ("application/json;q=0, text/html;q=0, */*", "image/png"),
        ("application/json;q=0, image/png;q=0, text/html;q=0, */*", "application/x-npy"),
        ("application/xml, */*;q=0.01", "application/json"),
        ("application/json;q=x, image/png;q=0.1", "image/png"),
        ("application/json;charset=utf-8;q=0.7, image/png;q=0.6", "application/json"),
    ],
)
def test_accept_decides_the_media_type(service: Service, accept: str | None, media_type: str) -> None:
    """The media type that the caller likes best is answered; of equals, and for browsers, JSON."""
    service.client.headers.pop("accept", None)
    headers = {} if accept is None else {"accept": accept}
    answer = service.client.post("/reconstruct", json=BODIES["/reconstruct"], headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)


@pytest.mark.parametrize("route", PICTURES)
def test_pictures_in_every_form_are_the_same(service: Service, route: str) -> None:
    """Numbers, npy, base64 PNG in JSON and one PNG hold the same pictures."""
    numbers = service.client.post(route, json=BODIES[route]).json()["results"]
    arrays = np.array([result[PICTURES[route]] for result in numbers], dtype=np.float32)
    npy = service.client.post(route, json=BODIES[route], headers={"accept": "application/x-npy"})
    assert (np.load(io.BytesIO(npy.content)) == arrays).all()
    inside = service.client.post(f"{route}?images=png", json=BODIES[route]).json()["results"]
    for result, array in zip(inside, arrays, strict=True):
        assert (pixels(base64.b64decode(result[PICTURES[route]])) == np.rint(array[0] * 255)).all()
        assert result.keys() == numbers[0].keys()
    together = service.client.post(route, json=BODIES[route], headers={"accept": "image/png"}).content
    grid = Grid(2, 8, 8)
    for index, array in enumerate(arrays):
        x, y = grid.place(index)
        there = pixels(together)[y : y + 8 * grid.scale : grid.scale, x : x + 8 * grid.scale : grid.scale]
        assert (there == np.rint(array[0] * 255)).all()


def test_a_grids_labels_are_the_ids(service: Service, items: np.ndarray) -> None:
    """In a grid of pictures the caller's ids stand where the indexes would; a picture alone has neither."""
    found = []
    for ids in (None, ["a", "b"], [0, 1]):
        body = {"instances": items[:2].tolist()} | ({} if ids is None else {"ids": ids})
        found.append(service.client.post("/reconstruct", json=body, headers={"accept": "image/png"}).content)
    assert found[0] == found[2] != found[1]
    alone = service.client.post("/reconstruct", json={"instances": items[:1].tolist()}, headers={"accept": "image/png"})
    assert pixels(alone.content).shape == (8, 8)


def test_images_png_where_there_are_none_changes_nothing(service: Service) -> None:
    """images=png on a route without pictures is JSON as ever."""
    plain = service.client.post("/encode", json=BODIES["/encode"]).content
    assert service.client.post("/encode?images=png", json=BODIES["/encode"]).content == plain


@pytest.mark.parametrize("route", BODIES)
def test_same_request_gives_the_same_bytes(service: Service, route: str) -> None:
    """On an idle service a request repeated gives the same body; what differs is in the headers."""
    first, second = (service.client.post(route, json=BODIES[route]) for _ in range(2))
    assert first.status_code == 200
    assert first.content == second.content
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert set(first.json()) == {"model", "version", "results"} | ({"seed"} if route == "/sample" else set())
    assert first.headers["x-model"] == f"{first.json()['model']}:{first.json()['version']}"
    assert [entry.split(";")[0].strip() for entry in first.headers["server-timing"].split(",")] == [
        "decode", "queue", "run", "encode"
    ]  # fmt: skip


@pytest.mark.parametrize("route", BODIES)
def test_json_has_no_numbers_beyond_json(service: Service, route: str) -> None:
    """No NaN, no Infinity and no null stands where a number should, for the most extreme input too."""
    extreme = {
        "/decode": {"latents": [[3e38, -3e38, 3e38, -3e38], [1e-45, 0, -0.0, 1e30]]},
        "/sample": {"seed": 1, "temperature": 1e6},
    }.get(route, {"instances": [[0] * 64, [1] * 64, [1e-45] * 64]})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    answer = service.client.post(route, json=extreme)
    if answer.status_code == 200:
        json.loads(answer.text, parse_constant=refuse)
        assert "null" not in answer.text
    else:
        assert answer.json()["code"] == "inference_failed"


def test_ids_come_back_beside_their_items(service: Service, items: np.ndarray) -> None:
    """Each result carries its item's id, strings and integers as they were sent."""
    ids = ["a", 7, "ü\u2028", 2**53]
    answer = service.client.post("/encode", json={"instances": items[:4].tolist(), "ids": ids}).json()
    assert [result["id"] for result in answer["results"]] == ids
    assert all(list(result) == ["id", "latent"] for result in answer["results"])


def test_every_way_of_sending_an_item_has_the_same_answer(service: Service) -> None:
    """A picture raw, in a form, in base64, as npy bytes, as numbers, and any of it compressed, is one item."""
    picture = np.random.default_rng(3).integers(0, 100, (8, 8), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    png, npy = stream.getvalue(), encode_npy(picture.reshape(1, 8, 8))
    numbers = json.dumps({"instances": [(picture.astype(np.float32) / np.float32(255)).ravel().tolist()]}).encode()

    def picture_file(kind: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, kind, **options)
        return stream.getvalue()

    ways: list[dict[str, Any]] = [
        {"content": png, "headers": {"content-type": "image/png"}},
        {"content": png, "headers": {"content-type": "image/jpeg"}},
        {"files": {"anything": ("x.png", png)}},
        {"json": {"instances": [{"b64": base64.b64encode(png).decode()}]}},
        {"content": npy, "headers": {"content-type": "application/x-npy"}},
        {"content": numbers},
        {"content": numbers, "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"content": gzip.compress(numbers), "headers": {"content-encoding": "gzip"}},
        {"content": iter([numbers[:50], numbers[50:]])},
        {
            "content": zlib.compress(npy),
            "headers": {"content-type": "application/x-npy", "content-encoding": "deflate"},
        },
        *({"content": picture_file(kind), "headers": {"content-type": f"image/{kind}"}} for kind in ("bmp", "tiff")),
        {"content": picture_file("webp", lossless=True), "headers": {"content-type": "image/webp"}},
    ]
    answers = [service.client.post("/encode", **way) for way in ways]
    assert [answer.status_code for answer in answers] == [200] * len(ways)
    assert len({answer.content for answer in answers}) == 1
    latent = answers[0].json()["results"][0]["latent"]
    line = service.client.post("/bulk/encode", content=png, headers={"content-type": "text/plain"})
    assert line.json()["code"] == "unsupported_media_type"
    form = service.client.post("/bulk/encode", files={"anything": ("x.png", png)})
    assert json.loads(form.text.splitlines()[0])["latent"] == latent
    model = answers[0].headers["x-model"].replace(":", "/versions/")
    tensors = {
        "inputs": [{"name": "input", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": picture.ravel().tolist()}]
    }
    asked = {**tensors, "outputs": [{"name": "latent"}]}
    outputs = service.client.post(f"/v2/models/{model}/infer", json=asked).json()["outputs"]
    assert outputs[0]["data"] == latent


def test_invert_is_for_dark_on_light(service: Service) -> None:
    """invert=true scores 1 − x, and invert=false leaves a light picture as it is."""
    light = {"instances": [[0.8] * 64]}
    dark = service.client.post("/encode", json={"instances": [[float(np.float32(1) - np.float32(0.8))] * 64]}).json()
    assert service.client.post("/encode?invert=true", json=light).json() == dark
    plain = service.client.post("/encode", json=light).json()
    assert service.client.post("/encode?invert=false", json=light).json() == plain
    assert plain != dark


@pytest.mark.parametrize("timeout", ["1000", "600000", "030000"])
def test_a_timeout_within_bounds_is_accepted(service: Service, timeout: str) -> None:
    """Any whole number of milliseconds from 1 to 600000 is a time limit."""
    answer = service.client.post("/encode", json=BODIES["/encode"], headers={"x-request-timeout-ms": timeout})
    assert answer.status_code == 200


@pytest.mark.parametrize(("priority", "status"), [("0", 200), ("9", 200), ("10", 400), ("-1", 400), ("high", 400)])
def test_priority_is_a_digit(service: Service, priority: str, status: int) -> None:
    """X-Request-Priority is 0 to 9."""
    answer = service.client.post("/encode", json=BODIES["/encode"], headers={"x-request-priority": priority})
    assert answer.status_code == status


def test_concurrent_requests_share_batches(service: Service, items: np.ndarray) -> None:
    """Requests that wait together run together, and each gets its own rows."""
    singles = [service.client.post("/encode", json={"instances": [item.tolist()]}).json() for item in items]
    labels = {"model": "tiny", "version": "2", "capability": "encode"}
    batches = service.metric("hourglass_batch_rows_count", **labels)
    with service.held_device():
        first = service.post_aside("/encode", json={"instances": [items[0].tolist()]})
        service.until(lambda: "running" in repr(service.app.state.catalog.batcher))
        asides = [service.post_aside("/encode", json={"instances": [item.tolist()]}) for item in items]
        service.until(lambda: service.app.state.catalog.batcher.waiting_rows == len(items))
    assert first().status_code == 200
    for answer, single in zip(asides, singles, strict=True):
        np.testing.assert_allclose(answer().json()["results"][0]["latent"], single["results"][0]["latent"], atol=1e-5)
    assert service.metric("hourglass_batch_rows_count", **labels) == batches + 2
