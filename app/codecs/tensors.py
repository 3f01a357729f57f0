"""Inference requests and answers of the Open Inference Protocol v2: JSON, with tensors in it or as bytes behind it.

Knows the framing and the data types; knows no model and no names of tensors.

Source: the protocol's REST specification and Triton's binary tensor data extension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from app.codecs.bodies import parse_json
from app.errors import InvalidInput, InvalidParameter, MalformedPayload, ShapeMismatch

HEADER_LENGTH = "Inference-Header-Content-Length"
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NUMBERS_IN_JSON: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}


@dataclass(frozen=True)
class Tensor:
    """A named array and its data type in the protocol's words."""

    name: str
    datatype: str
    values: NDArray[Any]


@dataclass(frozen=True)
class WantedOutput:
    """An output that the caller asks for by name; `binary` is None where it leaves the form to the request."""

    name: str
    binary: bool | None


@dataclass(frozen=True)
class InferRequest:
    """What a caller wants inferred; `outputs` is None where it names none."""

    inputs: dict[str, Tensor]
    outputs: tuple[WantedOutput, ...] | None = None
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    binary: bool = False


def parse_infer_request(data: bytes, header_length: str | None, takes: dict[str, Sequence[str]]) -> InferRequest:
    """The request in a body.

    Args:
        data: the decompressed body.
        header_length: the header `Inference-Header-Content-Length`: how many bytes of JSON stand before the tensors;
            None where there are no tensors behind it.
        takes: the data types of each known input; an unknown name or another type is refused before its data is read.

    Raises MalformedPayload, InvalidInput, ShapeMismatch or InvalidParameter.
    """
    split = len(data) if header_length is None else _header_length(header_length, len(data))
    head = _short_head(data[:split]) if header_length is not None and split <= _SHORT else _head(data[:split])
    tail = _Tail(data, split)
    inputs: dict[str, Tensor] = {}
    for entry in head.inputs:
        tensor = _tensor(entry, takes, tail)
        if tensor.name in inputs:
            raise InvalidInput(f"inputs: {tensor.name} is given more than once")
        inputs[tensor.name] = tensor
    if tail.left:
        raise MalformedPayload(f"body: unexpected additional input data: {tail.left} bytes behind the last input")
    return InferRequest(inputs, head.outputs, head.id, head.parameters, head.binary)


@dataclass(frozen=True)
class _Head:
    """A request's JSON; what it says of its inputs is not looked at yet."""

    inputs: list[dict[str, Any]]
    outputs: tuple[WantedOutput, ...] | None
    id: str
    parameters: dict[str, Any]
    binary: bool


def _head(data: bytes) -> _Head:
    document = parse_json(data)
    if not isinstance(document, dict):
        raise InvalidInput('body: expected an object {"inputs": […]}')
    parameters = _object(document, "parameters", "body")
    identity = document.get("id", "")
    if not isinstance(identity, str):
        raise InvalidInput("id: expected a string")
    outputs = None
    if document.get("outputs"):
        outputs = tuple(_wanted(entry) for entry in _entries(document, "outputs"))
        if len({output.name for output in outputs}) != len(outputs):
            raise InvalidInput("outputs: one is asked for more than once")
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise InvalidParameter("binary_data_output: expected true or false")
    return _Head(_entries(document, "inputs"), outputs, identity, parameters, binary)


_SHORT = 1024
_short_head = lru_cache(maxsize=256)(_head)  # what a client sends before its tensors is the same every time


def encode_infer_answer(answer: dict[str, Any], outputs: Sequence[tuple[Tensor, bool]]) -> tuple[bytes, int | None]:
    """The body that answers `answer` with those outputs, each in JSON or, where the flag says so, as bytes behind it.

    Returns the body and the length of the JSON before the bytes, None where there are none.
    """
    entries, buffers = [], []
    for tensor, binary in outputs:
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.values.shape),
        }
        values = np.ascontiguousarray(tensor.values, dtype=DATATYPES[tensor.datatype])
        if binary:
            entry["parameters"] = {"binary_data_size": values.nbytes}
            buffers.append(values.tobytes())
        else:
            entry["data"] = values.ravel()
        entries.append(entry)
    head = orjson.dumps({**answer, "outputs": entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([head, *buffers]), len(head)) if buffers else (head, None)


class _Tail:
    """The bytes behind the JSON, handed out in order."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._start = start

    @property
    def left(self) -> int:
        return len(self._data) - self._start

    def take(self, size: int, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if size > self.left:
            raise MalformedPayload(f"{name}: unexpected size for input: expected {size} bytes, found {self.left}")
        values = np.frombuffer(self._data, dtype, size // dtype.itemsize, self._start)
        self._start += size
        return values


def _header_length(text: str, size: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= size):
        raise MalformedPayload(
            f"{HEADER_LENGTH}: expected an integer from 0 to {size}, the body's size, found {text!r}"
        )
    return int(text)


def _entries(document: dict[str, Any], field: str) -> list[dict[str, Any]]:
    entries = document.get(field, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidInput(f"{field}: expected a list of objects")
    return entries


def _object(document: dict[str, Any], field: str, where: str) -> dict[str, Any]:
    found = document.get(field)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{where}: {field}: expected an object")
    return found


def _wanted(entry: dict[str, Any]) -> WantedOutput:
    name = entry.get("name")
    if not isinstance(name, str):
        raise InvalidInput("outputs: expected each to have a name")
    parameters = _object(entry, "parameters", name)
    binary = parameters.get("binary_data")
    if binary is not None and not isinstance(binary, bool):
        raise InvalidParameter(f"{name}: binary_data: expected true or false")
    if parameters.get("classification"):
        raise InvalidParameter(f"{name}: classification: this service has no classes to rank")
    if unknown := parameters.keys() - {"binary_data", "classification"}:
        raise InvalidParameter(f"{name}: unknown parameter {min(unknown)!r}")
    return WantedOutput(name, binary)


def _tensor(entry: dict[str, Any], takes: dict[str, Sequence[str]], tail: _Tail) -> Tensor:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or name not in takes:
        raise InvalidInput(f"inputs: expected one of {', '.join(takes)}; found {name!r}")
    if not isinstance(datatype, str) or datatype not in takes[name]:
        raise InvalidInput(f"{name}: expected datatype {' or '.join(takes[name])}, found {datatype!r}")
    if not isinstance(shape, list) or not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise InvalidInput(f"{name}: expected a shape of integers ≥ 0")
    if not 0 < len(shape) <= 32:
        raise ShapeMismatch(f"{name}: expected a shape of 1 to 32 lengths, found {len(shape)}")
    parameters = _object(entry, "parameters", name)
    size = parameters.get("binary_data_size")
    dtype, count = DATATYPES[datatype], math.prod(shape)
    if size is None:
        if "data" not in entry:
            raise InvalidInput(f"{name}: expected data, or parameters.binary_data_size")
        return Tensor(name, datatype, _from_json(entry["data"], shape, dtype, name).reshape(shape))
    if "data" in entry:
        raise InvalidInput(f"{name}: expected data or parameters.binary_data_size, found both")
    if type(size) is not int or size < 0:
        raise MalformedPayload(f"{name}: binary_data_size: expected an integer ≥ 0, found {size!r}")
    if size != count * dtype.itemsize:
        raise MalformedPayload(
            f"{name}: unexpected size for input: {shape} of {datatype} needs {count * dtype.itemsize} bytes, "
            f"found binary_data_size {size}"
        )
    values = tail.take(size, name, dtype)
    if dtype.kind == "b" and (values.view(np.uint8) > 1).any():
        raise InvalidInput(f"{name}: expected bytes 0 and 1 for BOOL, found others")
    return Tensor(name, datatype, values.reshape(shape))


def _from_json(data: object, shape: list[int], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Numbers, flat in row-major order or nested as `shape` says, as a flat array."""
    if not isinstance(data, list):
        raise InvalidInput(f"{name}: data: expected a list")
    flat: list[Any] = data
    if data and isinstance(data[0], list):
        level: list[Any] = [data]
        for length in shape:
            for part in level:
                if not isinstance(part, list) or len(part) != length:
                    raise ShapeMismatch(f"{name}: data: nested otherwise than shape {shape} says, or ragged")
            level = list(chain.from_iterable(level))
        flat = level
    if len(flat) != math.prod(shape):
        raise ShapeMismatch(f"{name}: data: shape {shape} needs {math.prod(shape)} numbers, found {len(flat)}")
    types = set(map(type, flat))
    if not types <= _NUMBERS_IN_JSON[dtype.kind]:
        expected = {"b": "true and false", "u": "integers", "i": "integers", "f": "numbers"}[dtype.kind]
        raise InvalidInput(f"{name}: data: expected {expected}, found another type")
    try:
        if dtype.kind in "ui" and flat and not np.iinfo(dtype).min <= min(flat) <= max(flat) <= np.iinfo(dtype).max:
            raise OverflowError  # noqa: TRY301  as numpy does for what fits no integer of its own
        with np.errstate(over="ignore"):  # 1e39 becomes an infinity, and is refused as one
            return np.asarray(flat, dtype=dtype)
    except OverflowError as error:
        raise InvalidInput(f"{name}: data: expected numbers that fit {dtype}, found a larger one") from error
