"""A request's body as items: JSON, pictures, multipart or npy → one float32 array per item.

Reading is in two steps: `read_items` is cheap and finds everything that is wrong with the form; `bring_to_input`
decodes and scales pictures, which for large ones does not belong on the event loop.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.artifacts.manifest import InputSpec
from app.artifacts.pictures import mask_to_input, open_picture, picture_to_input, pixels_to_range
from app.codecs.bodies import Body, parse_json
from app.codecs.multipart import Part, parse_multipart
from app.codecs.npy import decode_npy
from app.codecs.numbers import parse_rows
from app.codecs.ranges import are_within
from app.errors import (
    ImageNotDecodable,
    InvalidInput,
    MalformedPayload,
    PayloadTooLarge,
    ServiceError,
    ShapeMismatch,
    UnsupportedMediaType,
)

Entry = NDArray[np.float32] | Image.Image
"""One item whose form is right: numbers in the item's shape, or a picture that is not decoded yet."""


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    max_rows: int
    max_image_pixels: int


@dataclass(slots=True)
class ReadItems:
    """Items whose form is right: float32 arrays in the item's shape, or pictures that are not decoded yet."""

    entries: Sequence[Entry] | NDArray[np.float32]
    ids: list[Any] | None = None
    masks: Sequence[Entry] = ()

    @property
    def pixels(self) -> int:
        """How many pixels are still to be decoded."""
        if isinstance(self.entries, np.ndarray):
            return 0
        pictures = [entry for entry in (*self.entries, *self.masks) if isinstance(entry, Image.Image)]
        return sum(picture.width * picture.height for picture in pictures)


@dataclass(slots=True)
class Items:
    """A request's items: `values` (n, *shape) float32 in the manifest's range, and the caller's ids, if any.

    `masks` (n, *mask_shape), 1 where a value is missing, where the route takes them.
    """

    values: NDArray[np.float32]
    ids: list[Any] | None = None
    masks: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.values)


def read_items(body: Body, spec: InputSpec, limits: Limits, *, masked: bool = False) -> ReadItems:
    """The items of a request's body, by its media type; no media type means JSON.

    `masked` wants masks beside them: a member `masks` in JSON, parts named `mask` in multipart; one per item or one
    for all.

    Raises UnsupportedMediaType, MalformedPayload, ImageNotDecodable, PayloadTooLarge, and InvalidInput or
    ShapeMismatch, naming the item's index.
    """
    if body.is_json:
        return _read_json(body.data, spec, limits, masked=masked)
    if masked and body.media_type != "multipart/form-data":
        raise UnsupportedMediaType(
            f"content-type: expected application/json or multipart/form-data, which can hold masks, "
            f"found {body.media_type!r}"
        )
    if body.media_type == "application/x-npy":
        array = decode_npy(body.data)
        rows = _npy_rows(array, spec)
        _check_count(len(rows), limits)
        return ReadItems(_npy_to_range(rows, spec))
    if body.media_type == "multipart/form-data":
        return _read_multipart(parse_multipart(body, limits.max_rows), spec, limits, masked=masked)
    if body.media_type.startswith("image/"):
        return ReadItems([_open(body.data, 0, spec, limits)])
    raise UnsupportedMediaType(
        f"content-type: expected application/json, multipart/form-data, application/x-npy or image/*, "
        f"found {body.media_type!r}"
    )


def bring_to_input(
    read: ReadItems, spec: InputSpec, *, invert: bool | None, check: Callable[[], None] = lambda: None
) -> Items:
    """The items as the model takes them.

    Args:
        read: as `read_items` gave it.
        spec: the manifest's `input`.
        invert: True inverts every item, for dark on light; False inverts none; None leaves pictures to the
            manifest's polarity rule and arrays as they are.
        check: called before each item; what it raises ends the work.

    One picture is decoded at a time. Raises ImageNotDecodable, naming the item's index.
    """
    if isinstance(read.entries, np.ndarray) and not invert:
        return Items(read.entries, read.ids)
    values = np.empty((len(read.entries), *spec.shape), dtype=np.float32)
    for index, entry in enumerate(read.entries):
        check()
        values[index] = entry_to_input(entry, index, spec, invert=invert)
    if not read.masks:
        return Items(values, read.ids)
    found = []
    for index, mask in enumerate(read.masks):
        check()
        found.append(mask_entry_to_input(mask, index, spec))
    masks = np.empty((len(read.entries), *spec.mask_shape), dtype=np.float32)  # one that is read may do for all
    masks[:] = np.stack(found)
    return Items(values, read.ids, masks)


def check_rows(rows: NDArray[np.float32], value_range: tuple[float, float] | None) -> None:
    """Raises InvalidInput, naming the first item with a number that is not finite or outside `value_range`."""
    if are_within(rows.reshape(-1), value_range):
        return
    low, high = value_range or (-np.inf, np.inf)
    good = np.isfinite(rows) & (rows >= low) & (rows <= high)
    if good.all():
        return
    index = int(np.argmin(good.reshape(len(rows), -1).all(axis=1)))
    value = float(rows[index][~good[index]].flat[0])
    if not np.isfinite(value):
        raise InvalidInput(f"item {index}: expected finite numbers, found {_number_name(value)}")
    raise InvalidInput(f"item {index}: expected numbers from {low:g} to {high:g}, found {value:g}")


def rows_from_json(value: object, field: str, shape: tuple[int, ...], limits: Limits) -> NDArray[np.float32]:
    """A JSON list of rows, each nested in `shape` or flat, as (n, *shape). Raises InvalidInput or ShapeMismatch."""
    return np.stack([_row_from_json(row, index, shape) for index, row in enumerate(_list(value, field, limits))])


def rows_from_npy(data: bytes, shape: tuple[int, ...], limits: Limits) -> NDArray[np.float32]:
    """An npy file as rows, (n, *shape). Raises MalformedPayload, InvalidInput or ShapeMismatch."""
    rows = _shaped_rows(decode_npy(data), shape)
    _check_count(len(rows), limits)
    return _to_float32(rows)


def ids_from_json(document: dict[str, Any], count: int) -> list[Any] | None:
    """The caller's `ids`, one per item, or None. Raises InvalidInput."""
    ids = document.get("ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or len(ids) != count:
        found = f"{len(ids)} ids" if isinstance(ids, list) else type(ids).__name__
        raise InvalidInput(f"ids: expected a list of {count}, one per item, found {found}")
    if not set(map(type, ids)) <= {str, int}:
        raise InvalidInput("ids: expected strings or integers")
    return ids


def entry_to_input(entry: Entry, index: int, spec: InputSpec, *, invert: bool | None) -> NDArray[np.float32]:
    """One item as the model takes it; see `bring_to_input`. Raises ImageNotDecodable, naming the item's index."""
    if isinstance(entry, Image.Image):
        try:
            return picture_to_input(entry, spec, invert=invert)
        except ImageNotDecodable as error:
            raise ImageNotDecodable(f"item {index}: {error}") from error
        finally:
            entry.close()  # thousands of small files may be gigabytes of pixels
    if invert:
        low, high = spec.range or (0.0, 0.0)
        return np.asarray(np.float32(low + high) - entry, dtype=np.float32)
    return entry


def entry_from_json(instance: object, index: int, spec: InputSpec, limits: Limits) -> Entry:
    """One JSON instance, its form and numbers checked.

    Raises MalformedPayload, ImageNotDecodable, PayloadTooLarge, and InvalidInput or ShapeMismatch, naming the index.
    """
    entry = _entry_from_json(instance, index, spec, limits)
    if not isinstance(entry, Image.Image):
        _check_row(entry, index, spec)
    return entry


def entry_from_file(data: bytes, index: int, spec: InputSpec, limits: Limits) -> Entry:
    """One picture file. Raises InvalidInput, ImageNotDecodable or PayloadTooLarge, naming the index."""
    return _open(data, index, spec, limits)


def entry_from_numbers(row: NDArray[Any], index: int, spec: InputSpec) -> Entry:
    """One array in the item's shape, uint8 of a picture or floats. Raises InvalidInput, naming the index."""
    try:
        rows = _npy_to_range(row[np.newaxis], spec)
    except InvalidInput as error:
        raise InvalidInput(str(error).replace("item 0", f"item {index}", 1)) from error
    return np.asarray(rows[0], dtype=np.float32)


def mask_from_json(mask: object, index: int, spec: InputSpec, limits: Limits) -> Entry:
    """One mask beside an instance. Raises as `entry_from_json` does."""
    return _mask_from_json(mask, index, spec.mask_shape[1:] or spec.mask_shape, spec, limits)


def mask_entry_to_input(mask: Entry, index: int, spec: InputSpec) -> NDArray[np.float32]:
    """One mask as the model takes it. Raises ImageNotDecodable, naming its index."""
    if not isinstance(mask, Image.Image):
        return mask
    try:
        return mask_to_input(mask, spec)
    except ImageNotDecodable as error:
        raise ImageNotDecodable(f"mask {index}: {error}") from error
    finally:
        mask.close()


def _read_multipart(parts: list[Part], spec: InputSpec, limits: Limits, *, masked: bool) -> ReadItems:
    pictures = [part for part in parts if not (masked and part.field == "mask")]
    masks = [part for part in parts if masked and part.field == "mask"]
    if not pictures:
        raise InvalidInput("multipart: expected at least one picture file, found no part")
    if masked:
        _check_mask_count(len(masks), len(pictures), "multipart: parts named mask")
    return ReadItems(
        [_open(part.data, index, spec, limits) for index, part in enumerate(pictures)],
        masks=[_open(part.data, index, spec, limits, what="mask") for index, part in enumerate(masks)],
    )


def _check_mask_count(found: int, items: int, field: str) -> None:
    if found not in (1, items):
        raise InvalidInput(f"{field}: expected one for all or one for each of {items} items, found {found}")


def _read_json(data: bytes, spec: InputSpec, limits: Limits, *, masked: bool) -> ReadItems:
    if not masked and (rows := parse_rows(data, spec.shape, spec.range)) is not None:
        _check_count(len(rows), limits)
        return ReadItems(rows)
    document = parse_json(data)
    if not isinstance(document, dict):
        raise InvalidInput(f'body: expected an object {{"instances": […]}}, found {_json_type(document)}')
    members = ("instances", "ids", "masks") if masked else ("instances", "ids")
    if unknown := _some(name for name in document if name not in members):
        raise InvalidInput(f"body: expected the members {' and '.join(members)}, found {unknown}")
    if "instances" not in document:
        raise InvalidInput("instances: missing; expected a list of items")
    instances = _list(document["instances"], "instances", limits)
    entries = [_entry_from_json(instance, index, spec, limits) for index, instance in enumerate(instances)]
    arrays = [entry for entry in entries if not isinstance(entry, Image.Image)]
    if len(arrays) == len(entries):
        check_rows(np.stack(arrays), spec.range)
    else:
        for index, entry in enumerate(entries):
            if not isinstance(entry, Image.Image):
                _check_row(entry, index, spec)
    masks = _masks_from_json(document, len(entries), spec, limits) if masked else ()
    return ReadItems(entries, ids_from_json(document, len(entries)), masks)


def _masks_from_json(document: dict[str, Any], items: int, spec: InputSpec, limits: Limits) -> list[Entry]:
    if "masks" not in document:
        raise InvalidInput("masks: missing; expected a list of masks, 1 = missing, one for all items or one for each")
    masks = _list(document["masks"], "masks", limits)
    shape = spec.mask_shape[1:] or spec.mask_shape  # (height, width) of a picture, (features,) of a record
    if _lengths(masks) == shape:
        masks = [masks]  # one mask for all, without a list around it
    _check_mask_count(len(masks), items, "masks")
    return [_mask_from_json(mask, index, shape, spec, limits) for index, mask in enumerate(masks)]


def _mask_from_json(mask: object, index: int, shape: tuple[int, ...], spec: InputSpec, limits: Limits) -> Entry:
    if isinstance(mask, dict):
        return _open(_file_from_json(mask, f"mask {index}"), index, spec, limits, what="mask")
    try:
        array = _row_from_json(mask, index, shape)
    except InvalidInput as error:
        raise type(error)(str(error).replace("item", "mask", 1)) from error
    if not np.isin(array, (0, 1)).all():
        raise InvalidInput(f"mask {index}: expected 0 where a value is known and 1 where it is missing, found others")
    return array.reshape(spec.mask_shape)


def _check_row(row: NDArray[np.float32], index: int, spec: InputSpec) -> None:
    try:
        check_rows(row[np.newaxis], spec.range)
    except InvalidInput as error:
        raise InvalidInput(str(error).replace("item 0", f"item {index}", 1)) from error


def _list(value: object, field: str, limits: Limits) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidInput(f"{field}: expected a list, found {_json_type(value)}")
    if not value:
        raise InvalidInput(f"{field}: expected at least one item, found an empty list")
    _check_count(len(value), limits)
    return value


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_rows:
        raise PayloadTooLarge(f"items: expected at most {limits.max_rows}, found {count}")


def _entry_from_json(instance: object, index: int, spec: InputSpec, limits: Limits) -> Entry:
    if isinstance(instance, dict):
        if spec.features is not None:
            return _record_from_json(instance, index, spec.features)
        return _open(_file_from_json(instance, f"item {index}"), index, spec, limits)
    return _row_from_json(instance, index, spec.shape)


def _file_from_json(value: dict[str, Any], where: str) -> bytes:
    if value.keys() != {"b64"} or not isinstance(value["b64"], str):
        raise InvalidInput(
            f'{where}: expected numbers or {{"b64": "<picture file>"}}, '
            f"found an object with {_some(value) or 'no members'}"
        )
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedPayload(f"{where}: b64: not base64: {error}") from error


def _record_from_json(instance: dict[str, Any], index: int, features: tuple[str, ...]) -> NDArray[np.float32]:
    unknown = _some(name for name in instance if name not in features)
    missing = _some(name for name in features if name not in instance)
    if unknown or missing:
        raise InvalidInput(
            f"item {index}: "
            + "; ".join(
                f"{kind} features {names}" for kind, names in (("unknown", unknown), ("missing", missing)) if names
            )
        )
    if empty := _some(name for name in features if instance[name] is None):
        raise InvalidInput(
            f"item {index}: no value for features {empty}: expected numbers, since a score of guesses would be one; "
            "/inpaint fills them where a model can"
        )
    return _row_from_json([instance[name] for name in features], index, (len(features),))


def _row_from_json(row: object, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers nested in `shape`, or flat, as an array of `shape`."""
    if not isinstance(row, list):
        raise InvalidInput(f"item {index}: expected numbers of shape {_shape(shape)}, found {_json_type(row)}")
    flat: list[Any] = row
    if row and isinstance(row[0], list):
        level: list[Any] = [row]
        for depth, length in enumerate(shape):
            for part in level:
                if not isinstance(part, list) or len(part) != length:
                    raise _mismatch(row, index, shape, ragged=depth > 0)
            level = list(chain.from_iterable(level))
        flat = level
    elif len(row) != math.prod(shape):
        raise _mismatch(row, index, shape, ragged=False)
    # At the speed of C, and without numpy's readiness to take strings, booleans and null for numbers.
    if not set(map(type, flat)) <= {int, float}:
        bad = next(value for value in flat if type(value) not in (int, float))
        if isinstance(bad, list):
            raise _mismatch(row, index, shape, ragged=True)
        raise InvalidInput(f"item {index}: expected numbers, found {_json_type(bad)}")
    try:
        with np.errstate(over="ignore"):  # 1e39 becomes an infinity in float32, and is refused as one
            return np.asarray(flat, dtype=np.float32).reshape(shape)
    except OverflowError as error:
        raise InvalidInput(f"item {index}: expected numbers that fit a float, found a larger integer") from error


def _mismatch(row: list[Any], index: int, shape: tuple[int, ...], *, ragged: bool) -> ShapeMismatch:
    what = f"{_shape(_lengths(row))}{', or ragged lists' if ragged else ''}"
    return ShapeMismatch(f"item {index}: expected {_shape(shape)} or a flat ({math.prod(shape)},), found {what}")


def _lengths(value: object) -> tuple[int, ...]:
    """Lengths of nested lists, going by the first member of each."""
    found: list[int] = []
    while isinstance(value, list):
        found.append(len(value))
        value = value[0] if value else None
    return tuple(found)


def _open(data: bytes, index: int, spec: InputSpec, limits: Limits, *, what: str = "item") -> Image.Image:
    if spec.picture is None:
        raise InvalidInput(f"{what} {index}: this model takes records of shape {_shape(spec.shape)}, found a picture")
    try:
        return open_picture(data, limits.max_image_pixels)
    except ServiceError as error:
        raise type(error)(f"{what} {index}: {error}") from error


def _npy_rows(array: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    return _shaped_rows(array, spec.shape)


def _shaped_rows(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """(shape), (n, shape) or (n, flat) as (n, *shape)."""
    size = math.prod(shape)
    if array.shape == shape:
        array = array[np.newaxis]
    elif array.shape[1:] not in (shape, (size,)) or array.ndim < 2:
        raise ShapeMismatch(
            f"npy: expected {_shape(shape)}, (n, {', '.join(map(str, shape))}) or (n, {size}), found "
            f"{_shape(array.shape)}"
        )
    if not len(array):
        raise InvalidInput("npy: expected at least one item, found an array of no rows")
    return array.reshape(len(array), *shape)


def _npy_to_range(rows: NDArray[Any], spec: InputSpec) -> NDArray[np.float32]:
    if rows.dtype == np.uint8 and spec.picture is not None:
        return pixels_to_range(rows, spec)
    values = _to_float32(rows)
    check_rows(values, spec.range)
    return values


def _to_float32(rows: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows float32 becomes an infinity, and is refused as one
        return rows.astype(np.float32)


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _some(names: Iterable[str]) -> str:
    """The first few names, quoted: sorting and joining millions would stop every thread for seconds."""
    found = list(islice(names, 9))
    return ", ".join(map(repr, found[:8])) + (", …" if len(found) > 8 else "")


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _number_name(value: float) -> str:
    return "NaN" if np.isnan(value) else "an infinity, or a number too large for float32"
