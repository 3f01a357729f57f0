"""Bodies before anyone knows what is in them."""

from __future__ import annotations

import gzip
import math
import tracemalloc
import zlib

import pytest

from app.codecs.bodies import Body, decompress, parse_content_type, parse_json
from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge, UnsupportedMediaType

PLAIN = b'{"instances": [[0.5]]}' * 50


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (PLAIN, "identity"),
        (gzip.compress(PLAIN), "gzip"),
        (gzip.compress(PLAIN), "X-GZIP"),
        (zlib.compress(PLAIN), "deflate"),
        (gzip.compress(zlib.compress(PLAIN)), "deflate, gzip"),
        (gzip.compress(PLAIN), " identity ,, gzip "),
    ],
)
def test_encodings_are_undone_last_first(data: bytes, encoding: str) -> None:
    """gzip, deflate and several of them in a row give the plain body."""
    assert decompress(data, encoding, len(PLAIN)) == PLAIN


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bomb_is_cut_at_the_limit(encoding: str) -> None:
    """A small body that inflates to forty megabytes is refused without holding much more than the limit."""
    inflater = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    megabyte = bytes(1024 * 1024)
    bomb = b"".join(inflater.compress(megabyte) for _ in range(40)) + inflater.flush()
    tracemalloc.start()
    with pytest.raises(PayloadTooLarge, match="at most 1000000 bytes decompressed"):
        decompress(bomb, encoding, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("data", [b"", b"plain", gzip.compress(PLAIN)[:-9], zlib.compress(PLAIN)[:-5]])
def test_damaged_compression_is_malformed(data: bytes, encoding: str) -> None:
    """Truncated or foreign bytes are a malformed payload."""
    with pytest.raises(MalformedPayload, match=encoding):
        decompress(data, encoding, 10_000)


def test_bytes_behind_the_compressed_body_are_malformed() -> None:
    """Nothing may follow the compressed data."""
    with pytest.raises(MalformedPayload, match="followed by other bytes"):
        decompress(zlib.compress(PLAIN) + b"x", "deflate", 10_000)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "\x00"])
def test_unknown_encoding_is_unsupported(encoding: str) -> None:
    """An encoding that is not spoken here is named."""
    with pytest.raises(UnsupportedMediaType, match="expected gzip or deflate, found"):
        decompress(gzip.compress(PLAIN), encoding, 10_000)


@pytest.mark.parametrize(
    "data", [b"", b" \r\n", b"{", b"[1,]", b"{'a': 1}", b"\x00", b"\xff\xfe", b"\x89PNG", b"[1] 2", b"truth", b"-"]
)
def test_what_is_no_json_is_malformed(data: bytes) -> None:
    """Anything but JSON in UTF-8 is a malformed payload."""
    with pytest.raises(MalformedPayload, match="JSON"):
        parse_json(data)


@pytest.mark.parametrize(
    "data",
    [rb'["\ud800"]', rb'{"\udc00": 1}', b'"\xed\xa0\x80"', rb'[NaN, "\ud800"]'],
    ids=["high", "low", "raw", "NaN"],
)
def test_half_a_surrogate_pair_is_malformed(data: bytes) -> None:
    """A string that is no Unicode text, which no answer could repeat, is a malformed payload."""
    with pytest.raises(MalformedPayload, match="not JSON"):
        parse_json(data)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"instances":[' + b"["])
def test_nesting_without_end_is_refused(opening: bytes) -> None:
    """200 000 opening brackets neither crash nor count as syntax errors: they are nested too deeply."""
    with pytest.raises(InvalidInput, match="nested more deeply"):
        parse_json(opening * 200_000)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"[Infinity]", math.inf),
        (b"[-Infinity]", -math.inf),
        (b"[1e400]", math.inf),
        (b"[-1e400]", -math.inf),
        (b"[" + b"9" * 5000 + b"]", math.inf),
        (b"[1" + b"0" * 350 + b"]", 10**350),
    ],
    ids=["Infinity", "-Infinity", "1e400", "-1e400", "5000 digits", "351 digits"],
)
def test_numbers_beyond_floats_are_read(text: bytes, value: float) -> None:
    """What JSON writes but no float holds is read, to be refused where it stands."""
    assert parse_json(text) == [value]
    assert math.isnan(parse_json(b"[NaN]")[0])


def test_last_of_duplicate_keys_wins() -> None:
    """Of equal keys the last counts, in either reader."""
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    assert parse_json(b'{"a": NaN, "a": 1e400}') == {"a": math.inf}


def test_byte_order_mark_is_overlooked() -> None:
    """A byte order mark in front of JSON, as some editors write it, harms nothing."""
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize(
    ("header", "media_type", "parameters"),
    [
        ("", "", {}),
        ("  ", "", {}),
        ("Application/JSON", "application/json", {}),
        ("application/json; charset=utf-8", "application/json", {"charset": "utf-8"}),
        ('Multipart/Form-Data; Boundary="a b"', "multipart/form-data", {"boundary": "a b"}),
        ("multipart/form-data; boundary", "multipart/form-data", {"boundary": ""}),
    ],
)
def test_content_type_is_split(header: str, media_type: str, parameters: dict[str, str]) -> None:
    """Media type in lower case, parameters by lower-case name, values as they are."""
    assert parse_content_type(header) == (media_type, parameters)


@pytest.mark.parametrize(
    ("media_type", "data", "is_json"),
    [
        ("", b"{}", True),
        ("application/json", b"", True),
        ("application/vnd.api+json", b"{}", True),
        ("application/x-www-form-urlencoded", b' {"instances": []}', True),
        ("application/x-www-form-urlencoded", b"", True),
        ("application/x-www-form-urlencoded", b"a=1", False),
        ("text/plain", b"{}", False),
        ("image/png", b"{}", False),
    ],
)
def test_json_needs_no_media_type(media_type: str, data: bytes, is_json: bool) -> None:
    """JSON is what says so, what says nothing, and what `curl -d` mistakes for a form."""
    assert Body(data, media_type, {}).is_json is is_json
