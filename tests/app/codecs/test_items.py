"""A request's items: every form that is read, and every way in which one can be wrong."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.artifacts.manifest import InputSpec, PictureSpec
from app.codecs.bodies import Body, parse_json
from app.codecs.items import Items, Limits, bring_to_input, ids_from_json, read_items, rows_from_json, rows_from_npy
from app.codecs.npy import encode_npy
from app.errors import (
    ImageNotDecodable,
    InvalidInput,
    MalformedPayload,
    PayloadTooLarge,
    ServiceError,
    ShapeMismatch,
    UnsupportedMediaType,
)

SPEC = InputSpec(shape=(1, 8, 8), range=(0, 1), picture=PictureSpec(polarity="light_on_dark"))
RECORD = InputSpec(shape=(3,), features=("age", "height", "weight"))
LIMITS = Limits(max_rows=10, max_image_pixels=10_000)
ITEM = (np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)).astype(np.float32)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def read(
    data: bytes | dict[str, Any],
    media_type: str = "",
    spec: InputSpec = SPEC,
    invert: bool | None = None,
    **parameters: str,
) -> Items:
    body = Body(data if isinstance(data, bytes) else json.dumps(data).encode(), media_type, parameters)
    return bring_to_input(read_items(body, spec, LIMITS), spec, invert=invert)


def flat(**changes: object) -> list[Any]:
    """64 good numbers, some replaced: `flat(at3="x")`."""
    numbers: list[Any] = [0.5] * 64
    for place, value in changes.items():
        numbers[int(place[2:])] = value
    return numbers


def nested(row: list[Any]) -> list[Any]:
    return [[row[start : start + 8] for start in range(0, 64, 8)]]


@pytest.mark.parametrize("media_type", ["", "application/json", "text/json", "application/x-www-form-urlencoded"])
def test_nested_and_flat_numbers_are_equal(media_type: str) -> None:
    """The same numbers nested in the input's shape and flat are the same item, exactly."""
    found = read({"instances": [ITEM.tolist(), ITEM.ravel().tolist()]}, media_type)
    assert (found.values == ITEM).all()
    assert found.values.dtype == np.float32


def test_integers_are_numbers() -> None:
    """0 and 1 without a point are numbers like others."""
    assert read({"instances": [flat(at0=1, at1=0)]}).values[0, 0, 0, :3].tolist() == [1, 0, 0.5]


def test_pictures_and_numbers_may_be_mixed() -> None:
    """Pictures and numbers in one request keep their places."""
    dark = np.zeros((8, 8), np.uint8)
    found = read({"instances": [flat(), b64(png(dark)), flat(at0=1)]})
    assert (found.values[1] == 0).all()
    assert [found.values[0, 0, 0, 0], found.values[2, 0, 0, 0]] == [0.5, 1]


def test_records_come_by_name_or_by_place() -> None:
    """An object by feature name, in any order, is the same as its numbers in order; there is no range."""
    found = read({"instances": [{"weight": 3e9, "age": -1, "height": 2.5}, [-1, 2.5, 3e9]]}, spec=RECORD)
    assert (found.values[0] == np.float32([-1, 2.5, 3e9])).all()
    assert (found.values[0] == found.values[1]).all()


BAD_ITEMS: dict[str, tuple[object, type[ServiceError], str]] = {
    # what stands at index 1, the exception and what its message says
    "string": ("0.5", InvalidInput, r"expected numbers of shape \(1, 8, 8\), found a string"),
    "null": (None, InvalidInput, "found null"),
    "true": (True, InvalidInput, "found a boolean"),
    "number": (0.5, InvalidInput, "found a number"),
    "empty list": ([], ShapeMismatch, r"expected \(1, 8, 8\) or a flat \(64,\), found \(0,\)"),
    "one short": ([0.5] * 63, ShapeMismatch, r"found \(63,\)"),
    "one more": ([0.5] * 65, ShapeMismatch, r"found \(65,\)"),
    "no channel": (nested(flat())[0], ShapeMismatch, r"found \(8, 8\)"),
    "three channels": (nested(flat()) * 3, ShapeMismatch, r"found \(3, 8, 8\)"),
    "ragged": ([[*nested(flat())[0][:7], [0.5] * 7]], ShapeMismatch, "ragged"),
    "a row is a number": ([[*nested(flat())[0][:7], 0.5]], ShapeMismatch, "ragged"),
    "too deep": ([[[[0.5]] * 8] * 8], ShapeMismatch, r"found \(1, 8, 8, 1\)"),
    "list among numbers": (flat(at5=[0.5]), ShapeMismatch, "ragged"),
    "empty inside": ([[[]] * 8], ShapeMismatch, r"found \(1, 8, 0\)"),
    "string inside": (flat(at3="0.5"), InvalidInput, "expected numbers, found a string"),
    "true inside": (flat(at63=True), InvalidInput, "expected numbers, found a boolean"),
    "null inside": (flat(at0=None), InvalidInput, "expected numbers, found null"),
    "null inside nested": (nested(flat(at9=None)), InvalidInput, "expected numbers, found null"),
    "object inside": (flat(at1={}), InvalidInput, "expected numbers, found an object"),
    "above the range": (flat(at7=1.5), InvalidInput, "expected numbers from 0 to 1, found 1.5"),
    "below the range": (nested(flat(at7=-0.25)), InvalidInput, "expected numbers from 0 to 1, found -0.25"),
    "beyond float32": (
        flat(at7=1e39),
        InvalidInput,
        "expected finite numbers, found an infinity, or a number too large",
    ),
    "beyond any float": (flat(at7=10**400), InvalidInput, "expected numbers that fit a float|expected finite numbers"),
    "no members": ({}, InvalidInput, "found an object with no members"),
    "other members": ({"b64": "", "x": 1}, InvalidInput, "found an object with 'b64', 'x'"),
    "b64 is a number": ({"b64": 5}, InvalidInput, "found an object with 'b64'"),
    "b64 of a text": (b64(b"no picture"), ImageNotDecodable, "picture: expected one of PNG"),
    "b64 of nothing": ({"b64": ""}, ImageNotDecodable, "found 0 bytes"),
    "b64 of a broken picture": (b64(png(np.zeros((8, 8), np.uint8))[:-24]), ImageNotDecodable, "damaged PNG"),
    "b64 with spaces": ({"b64": "iVBO Rw0K"}, MalformedPayload, "b64: not base64"),
    "b64 cut short": ({"b64": "iVBORw0KG"}, MalformedPayload, "b64: not base64"),
    "b64 beyond ASCII": ({"b64": "é"}, MalformedPayload, "b64: not base64"),
    "b64 of a large picture": (b64(png(np.zeros((101, 100), np.uint8))), PayloadTooLarge, "100 × 101 pixels"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
@pytest.mark.parametrize("beside", [[], [b64(png(np.zeros((8, 8), np.uint8)))]], ids=["numbers", "and a picture"])
def test_bad_item_is_refused_by_its_index(name: str, beside: list[Any]) -> None:
    """A bad item refuses the request with the exception for it, its index, the found and the expected."""
    value, kind, message = BAD_ITEMS[name]
    with pytest.raises(kind, match=f"^item 1: .*({message})") as refused:
        read({"instances": [flat(), value, flat(), *beside]})
    assert type(refused.value) is kind


@pytest.mark.parametrize(
    ("word", "found"),
    [("NaN", "NaN"), ("Infinity", "an infinity"), ("-Infinity", "an infinity"), ("1e400", "an infinity"),
     ("9" * 350, "larger integer"), ("9" * 5000, "an infinity")],
)  # fmt: skip
def test_words_and_numbers_beyond_json_are_refused_by_index(word: str, found: str) -> None:
    """NaN, Infinity and 1e400 as bare words are bad numbers, not bad JSON."""
    text = json.dumps({"instances": [flat(), flat(at5="WORD")]}).replace('"WORD"', word)
    with pytest.raises(InvalidInput, match=f"^item 1: expected .*{found}"):
        read(text.encode())


BAD_DOCUMENTS: dict[str, tuple[object, str]] = {
    "a list": ([flat()], "body: expected an object .*found a list"),
    "a string": ("instances", "body: expected an object .*found a string"),
    "null": (None, "body: expected an object .*found null"),
    "nothing in it": ({}, "instances: missing; expected a list of items"),
    "ids alone": ({"ids": []}, "instances: missing"),
    "no items": ({"instances": []}, "instances: expected at least one item, found an empty list"),
    "instances is an object": ({"instances": {}}, "instances: expected a list, found an object"),
    "instances is null": ({"instances": None}, "instances: expected a list, found null"),
    "instances is a string": ({"instances": "x"}, "instances: expected a list, found a string"),
    "unknown members": (
        {"instances": [flat()], "masks": [], "idz": 1},
        "body: expected the members instances and ids, found 'masks', 'idz'",
    ),
    "too few ids": ({"instances": [flat()] * 2, "ids": ["a"]}, "ids: expected a list of 2, one per item, found 1 ids"),
    "too many ids": ({"instances": [flat()], "ids": [1, 2]}, "ids: expected a list of 1, one per item, found 2 ids"),
    "ids no list": ({"instances": [flat()], "ids": "a"}, "ids: expected a list of 1, one per item, found str"),
    "ids null inside": ({"instances": [flat()], "ids": [None]}, "ids: expected strings or integers"),
    "ids boolean": ({"instances": [flat()], "ids": [True]}, "ids: expected strings or integers"),
    "ids float": ({"instances": [flat()], "ids": [1.5]}, "ids: expected strings or integers"),
    "ids list": ({"instances": [flat()], "ids": [[]]}, "ids: expected strings or integers"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_document_is_refused_by_field(name: str) -> None:
    """A document of another form is refused, naming the member, the found and the expected."""
    document, message = BAD_DOCUMENTS[name]
    with pytest.raises(InvalidInput, match=message):
        read(json.dumps(document).encode())


def test_only_some_of_many_names_are_told() -> None:
    """Of members without number the first few are named."""
    many = {f"m{index}": 1 for index in range(100_000)}
    told = "'m0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', …$"
    with pytest.raises(InvalidInput, match=f"instances and ids, found {told}"):
        read(many)
    with pytest.raises(InvalidInput, match=f"found an object with {told}"):
        read({"instances": [many]})
    with pytest.raises(InvalidInput, match=r"unknown features 'm0', .*'m7', …; missing features 'age'"):
        read({"instances": [many]}, spec=RECORD)


def test_too_many_items_are_too_large() -> None:
    """More items than may wait are refused in every form."""
    items = np.zeros((11, 64), np.float32)
    with pytest.raises(PayloadTooLarge, match="items: expected at most 10, found 11"):
        read({"instances": items.tolist()})
    with pytest.raises(PayloadTooLarge, match="items: expected at most 10, found 11"):
        read(encode_npy(items), "application/x-npy")


def test_ids_are_echoed_as_they_are() -> None:
    """Strings and integers come back unchanged; without ids there are none."""
    assert read({"instances": [flat()] * 3, "ids": ["", 2**53, "é"]}).ids == ["", 2**53, "é"]
    assert read({"instances": [flat()], "ids": None}).ids is None
    assert ids_from_json({}, 3) is None


def test_last_instances_win() -> None:
    """Of duplicate members the last counts."""
    first, last = json.dumps([flat()] * 2), json.dumps([flat(at0=1)])
    assert len(read(f'{{"instances": {first}, "instances": {last}}}'.encode())) == 1


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"age": 1, "height": 2}, "item 0: missing features 'weight'"),
        ({"age": 1, "height": 2, "weight": 3, "b64": ""}, "item 0: unknown features 'b64'"),
        ({"Age": 1, "height": 2, "weight": 3}, "item 0: unknown features 'Age'; missing features 'age'"),
        ({"age": None, "height": 2, "weight": 3}, "item 0: no value for features 'age'"),
        ({"age": [1], "height": 2, "weight": 3}, "item 0: expected"),
        ([1, 2], r"item 0: expected \(3,\) or a flat \(3,\), found \(2,\)"),
    ],
)
def test_bad_record_is_refused_by_feature(instance: object, message: str) -> None:
    """A record's missing, unknown and bad features are named."""
    with pytest.raises(InvalidInput, match=message):
        read({"instances": [instance]}, spec=RECORD)


@pytest.mark.parametrize("media_type", ["image/png", "multipart/form-data"])
def test_a_picture_is_no_record(media_type: str) -> None:
    """A model of records takes no pictures."""
    data = png(np.zeros((8, 8), np.uint8))
    if media_type.startswith("multipart"):
        data = b'--B\r\nContent-Disposition: form-data; filename="x"\r\n\r\n' + data + b"\r\n--B--\r\n"
    with pytest.raises(InvalidInput, match=r"item 0: this model takes records of shape \(3,\), found a picture"):
        read(data, media_type, spec=RECORD, boundary="B")


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/x-png", "image/jpg"])
def test_a_picture_is_read_whatever_its_type_says(media_type: str) -> None:
    """Any image/* body is a picture of the format that its bytes have."""
    pixels = np.random.default_rng(1).integers(0, 100, (8, 8), dtype=np.uint8)
    found = read(png(pixels), media_type)
    assert (found.values == pixels.astype(np.float32) / 255).all()


def test_multipart_files_are_items_in_order() -> None:
    """Each file of a form is an item; a broken one is named by its index."""
    parts = [png(np.full((8, 8), value, np.uint8)) for value in (10, 20, 30)]
    head = b'--B\r\nContent-Disposition: form-data; name="any"; filename="x"\r\n\r\n'
    whole = b"".join(head + part + b"\r\n" for part in parts) + b"--B--\r\n"
    found = read(whole, "multipart/form-data", boundary="B")
    assert np.rint(found.values[:, 0, 0, 0] * 255).tolist() == [10, 20, 30]
    with pytest.raises(ImageNotDecodable, match="item 1: picture"):
        read(head + parts[0] + b"\r\n" + head + b"text\r\n--B--\r\n", "multipart/form-data", boundary="B")
    with pytest.raises(ImageNotDecodable, match=r"item 0: picture: expected .*, found 0 bytes"):
        read(head + b"\r\n--B--\r\n", "multipart/form-data", boundary="B")
    with pytest.raises(InvalidInput, match="expected at least one picture file, found no part"):
        read(b"--B--\r\n", "multipart/form-data", boundary="B")


@pytest.mark.parametrize("media_type", ["text/plain", "application/octet-stream", "application/xml", "video/mp4", "x"])
def test_other_media_types_are_unsupported(media_type: str) -> None:
    """A body of another type is refused, naming the types that are read."""
    with pytest.raises(UnsupportedMediaType, match=f"content-type: expected application/json.*found '{media_type}'"):
        read(b"{}", media_type)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 1, 8, 8), (3, 64)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_floats_are_taken_as_they_are(dtype: str, shape: tuple[int, ...], order: Any) -> None:
    """Floats of any width, byte order, memory order and accepted shape give their values in float32."""
    array = np.asarray(np.random.default_rng(0).random(shape)).astype(dtype)
    stream = io.BytesIO()
    np.save(stream, np.asarray(array, order=order))
    found = read(stream.getvalue(), "application/x-npy")
    assert (found.values == array.astype(np.float32).reshape(-1, 1, 8, 8)).all()


def test_npy_bytes_are_pixels() -> None:
    """uint8 is divided by 255 in float32."""
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 64)
    expected = (pixels.astype(np.float32) / np.float32(255)).reshape(2, 1, 8, 8)
    assert (read(encode_npy(pixels), "application/x-npy").values == expected).all()


@pytest.mark.parametrize("shape", [(), (64,), (8, 8), (2, 8, 8), (1, 1, 1, 8, 8), (2, 63), (2, 8, 8, 1)])
def test_npy_of_another_shape_is_a_mismatch(shape: tuple[int, ...]) -> None:
    """Other shapes are refused, naming the found and the expected."""
    with pytest.raises(ShapeMismatch, match=r"npy: expected \(1, 8, 8\), \(n, 1, 8, 8\) or \(n, 64\), found "):
        read(encode_npy(np.zeros(shape, np.float32)), "application/x-npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, 1.5, -0.5])
def test_bad_npy_numbers_are_refused_by_index(value: float) -> None:
    """NaN, infinities, what overflows float32 and what is out of range name the item."""
    rows = np.full((3, 64), 0.5)
    rows[2, 5] = value
    with pytest.raises(InvalidInput, match="item 2: expected "):
        read(encode_npy(rows), "application/x-npy")


def test_npy_of_no_rows_is_refused() -> None:
    """An array without rows has no items."""
    with pytest.raises(InvalidInput, match="npy: expected at least one item"):
        read(encode_npy(np.zeros((0, 64), np.float32)), "application/x-npy")


def test_inversion_is_the_callers_for_arrays_and_the_models_for_pictures() -> None:
    """Numbers are inverted only on request; a light picture by the polarity rule, unless the caller forbids it."""
    light = png(np.full((8, 8), 204, np.uint8))
    document = {"instances": [[0.25] * 64, b64(light)]}
    for invert, number, picture in ((None, 0.25, 0.2), (True, 0.75, 0.2), (False, 0.25, 0.8)):
        found = read(document, invert=invert).values[:, 0, 0, 0]
        np.testing.assert_allclose(found, [number, picture], atol=1e-6)


def test_latents_are_rows_of_any_finite_numbers() -> None:
    """Rows beside items follow the same rules, from JSON and npy, and overflow without a warning."""
    assert rows_from_json([[1, -2.5]], "latents", (2,), LIMITS).tolist() == [[1, -2.5]]
    with pytest.raises(InvalidInput, match="latents: expected a list, found null"):
        rows_from_json(None, "latents", (2,), LIMITS)
    with pytest.raises(ShapeMismatch, match=r"item 1: expected \(2,\)"):
        rows_from_json([[1, 2], [1]], "latents", (2,), LIMITS)
    assert np.isinf(rows_from_npy(encode_npy(np.array([[1e300, 0]])), (2,), LIMITS)[0, 0])


def test_decoded_pictures_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's pixels are freed once it is an item: many small files may be gigabytes decoded."""
    document = {"instances": [b64(png(np.zeros((50, 50), np.uint8)))] * 3}
    opened = read_items(Body(json.dumps(document).encode(), "", {}), SPEC, LIMITS)
    assert opened.pixels == 7500
    bring_to_input(opened, SPEC, invert=None)
    for entry in opened.entries:
        with pytest.raises(ValueError, match="closed image"):
            entry.getpixel((0, 0))  # type: ignore[union-attr]


def test_deep_nesting_is_described_in_bounded_space() -> None:
    """An item nested hundreds of levels deep is a shape mismatch, not a crash."""
    deep = parse_json(b"[" * 900 + b"1" + b"]" * 900)
    with pytest.raises(ShapeMismatch, match="item 0: expected"):
        read({"instances": [deep]})
