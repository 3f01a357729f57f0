"""npy files: every layout that numpy writes, and headers that lie."""

from __future__ import annotations

import io
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

from app.codecs.npy import decode_npy, encode_npy
from app.errors import InvalidInput, MalformedPayload


def saved(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def claiming(shape: str, data: bytes = b"", descr: str = "'<f4'", version: tuple[int, int] = (1, 0)) -> bytes:
    """An npy file with any header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(header)) + header + data


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 4, 3), (0, 3)])
def test_every_layout_is_read_as_numpy_reads_it(dtype: str, order: Any, shape: tuple[int, ...]) -> None:
    """All offered data types, both byte orders and both memory orders."""
    array = np.asarray(np.random.default_rng(0).random(shape) * 200).astype(dtype, order=order)
    found = decode_npy(saved(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_format_version_two_is_read() -> None:
    """Version 2.0 differs only in the header's length field."""
    assert decode_npy(claiming("(2,)", np.float32([1, 2]).tobytes(), version=(2, 0))).tolist() == [1, 2]


@pytest.mark.parametrize(
    "descr", ["'<i8'", "'|b1'", "'<c8'", "'<U1'", "'|O'", "[('a', '<f4')]", "('<f4', (2,))", "'<M8[s]'"]
)
def test_other_data_types_are_refused(descr: str) -> None:
    """Integers, text, records and, above all, pickled objects are refused by name."""
    with pytest.raises(InvalidInput, match="npy: expected one of float16, float32, float64, uint8, found"):
        decode_npy(claiming("(1,)", bytes(8), descr))


def test_pickle_is_never_loaded() -> None:
    """An object array is refused although its pickle would load."""
    with pytest.raises(InvalidInput, match="found object"):
        decode_npy(saved(np.array([{"a": 1}], dtype=object), allow_pickle=True))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\xff\xff{}",
        b"PK\x03\x04",
        b"no numpy",
        claiming("(2,)", bytes(7)),
        claiming("(2,)", bytes(9)),
        claiming("()", b""),
        claiming("(2,)", bytes(8), version=(3, 0)),
        claiming("(2,)", bytes(8), version=(9, 9)),
        claiming("(-1, -2)", bytes(8)),
        claiming("2", bytes(8)),
        claiming("(2.0,)", bytes(8)),
        claiming("(True,)", bytes(4)),
        claiming("(1,)", bytes(4), "'<f5'"),
        claiming("(1,)", bytes(4), "'nonsense'"),
        claiming("(1,)" + " " * 20_000, bytes(4)),
        claiming("(" * 2000, bytes(4)),
        claiming("__import__('os').abort()", bytes(4)),
        claiming(f"({'1, ' * 65})", bytes(4)),
        claiming("(0, 10**30)", b""),
        claiming(f"(0, {10**30})", b""),
        claiming(f"(0, {2**62}, {2**62})", b""),
    ],
)
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning", "ignore::SyntaxWarning")
def test_what_is_no_npy_file_is_malformed(data: bytes) -> None:
    """Truncated, padded, foreign and lying files are malformed payloads, never another exception."""
    with pytest.raises(MalformedPayload, match="npy: "):
        decode_npy(data)


@pytest.mark.parametrize("shape", ["(1000000000,)", f"({2**40}, {2**40})", f"({10**30},)"])
def test_a_claimed_size_costs_no_memory(shape: str) -> None:
    """A header that claims terabytes is refused before anything is allocated."""
    tracemalloc.start()
    with pytest.raises(MalformedPayload, match=r"needs \d+ bytes, found 4"):
        decode_npy(claiming(shape, bytes(4)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("array", [np.float32([[1, 2]]), np.zeros((2, 3), order="F"), np.arange(6.0)[::2]])
def test_what_is_written_is_read_by_numpy(array: np.ndarray) -> None:
    """Answers load with numpy, whatever memory order they had."""
    np.testing.assert_array_equal(np.load(io.BytesIO(encode_npy(array)), allow_pickle=False), array)
