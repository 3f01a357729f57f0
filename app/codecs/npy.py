"""npy files ⇄ arrays, without pickle and without trusting the header's shape."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InvalidInput, MalformedPayload

MAX_NPY_HEADER_BYTES = 64 * 1024
_DTYPES = ("float16", "float32", "float64", "uint8")


def decode_npy(data: bytes) -> NDArray[Any]:
    """The array in an npy file of float16, float32, float64 or uint8. The data is not copied.

    Raises MalformedPayload for bytes that are no such file or more or fewer than its header says, and InvalidInput for
    another data type.
    """
    shape, fortran_order, dtype, start = read_npy_header(data)
    count = math.prod(shape)
    # Before anything is allocated: the header may claim any size.
    if count * dtype.itemsize != len(data) - start:
        raise MalformedPayload(
            f"npy: the header's {shape} of {dtype} needs {count * dtype.itemsize} bytes, found {len(data) - start}"
        )
    flat = np.frombuffer(data, dtype=dtype, count=count, offset=start)
    try:
        return flat.reshape(shape, order="F" if fortran_order else "C")
    except (TypeError, ValueError) as error:  # more axes than numpy has, or (0, 10**30)
        raise MalformedPayload(f"npy: no array has the header's shape: {error}") from error


def read_npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, data type and where the numbers begin, of an npy file's first bytes.

    Raises MalformedPayload, and InvalidInput for a data type that is not read.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(stream)
    except KeyError as error:
        raise MalformedPayload("npy: expected format version 1.0 or 2.0") from error
    except Exception as error:  # numpy parses the header as Python source and raises whatever that leads to
        raise MalformedPayload(
            f"npy: not a readable header: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if dtype.newbyteorder("=").name not in _DTYPES:
        raise InvalidInput(f"npy: expected one of {', '.join(_DTYPES)}, found {dtype}")
    if any(length < 0 for length in shape):
        raise MalformedPayload(f"npy: expected a shape of lengths ≥ 0, found {shape}")
    return shape, fortran_order, dtype, stream.tell()


def npy_header_size(data: bytes) -> int | None:
    """How many bytes the header takes, as far as the first bytes of a file tell; None while they are too few."""
    if len(data) < 12:
        return None
    length = (
        int.from_bytes(data[8:12], "little") + 12 if data[6:7] == b"\x02" else int.from_bytes(data[8:10], "little") + 10
    )
    return min(length, MAX_NPY_HEADER_BYTES)


def encode_npy(array: NDArray[Any]) -> bytes:
    """The array as an npy file, format version 1.0."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()
