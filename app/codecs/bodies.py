"""A request's body before anyone knows what is in it: media type, decompression, JSON syntax."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any

import orjson

from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge, UnsupportedMediaType

_JSON_TYPES = ("", "application/json", "text/json")
# With one parameter and nothing that would need a parser: what nearly all send.
_PLAIN_CONTENT_TYPE = re.compile(r"([\w./+-]+);\s*([A-Za-z]+)=(\"?)([\w'()+,./:=?-]+)\3", re.ASCII)
_PIECE_BYTES = 64 * 1024
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


@dataclass(slots=True)
class Body:
    """A whole body, decompressed, with its media type in lower case ("" if none was sent) and the type's parameters."""

    data: bytes
    media_type: str
    parameters: dict[str, str]

    @property
    def is_json(self) -> bool:
        """Whether the body is to be read as JSON, which needs no media type.

        `curl -d` says form-urlencoded of whatever it sends; a form is never what these routes take.
        """
        if self.media_type == "application/x-www-form-urlencoded":
            return self.data.lstrip()[:1] in (b"{", b"[", b"")
        return self.media_type in _JSON_TYPES or self.media_type.endswith("+json")


def parse_content_type(header: str) -> tuple[str, dict[str, str]]:
    """Media type in lower case, and parameters; ("", {}) for an empty header."""
    if not header.strip():
        return "", {}
    if ";" not in header:
        return header.strip().lower(), {}
    if plain := _PLAIN_CONTENT_TYPE.fullmatch(header):
        return plain[1].lower(), {plain[2].lower(): plain[4]}
    message = Message()
    message["content-type"] = header
    parameters = {key.lower(): value for key, value in (message.get_params() or [])[1:] if isinstance(value, str)}
    return header.partition(";")[0].strip().lower(), parameters


def decompress(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its Content-Encoding, at most `max_bytes`.

    Raises UnsupportedMediaType for an encoding other than gzip, deflate and identity, MalformedPayload for damaged
    data and PayloadTooLarge beyond the limit, without holding more than that in memory.
    """
    for name in reversed([name.strip().lower() for name in encoding.split(",") if name.strip()]):
        if name == "identity":
            continue
        if name not in _WINDOW_BITS:
            raise UnsupportedMediaType(f"content-encoding: expected gzip or deflate, found {name!r}")
        data = _inflate(data, name, max_bytes)
    return data


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`.

    NaN, Infinity and numbers too large for a float are read, to be refused as numbers where they stand.
    Raises MalformedPayload for what is no JSON in UTF-8 and InvalidInput for what is nested too deeply.
    """
    if not data.strip():
        raise MalformedPayload("body: expected JSON, found an empty body")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        # The standard library reads what orjson, rightly, does not: the bare words NaN and Infinity, and 1e400.
        try:
            value = json.loads(data.decode("utf-8-sig"), parse_int=_parse_int)
            if b"\\u" in data:
                # It also reads half of a surrogate pair, which no answer could repeat.
                json.dumps(value, ensure_ascii=False).encode()
        except RecursionError as deep:
            raise InvalidInput("body: JSON nested more deeply than any item is") from deep
        except ValueError:
            raise MalformedPayload(f"body: not JSON: {error}") from error
        return value


def _parse_int(digits: str) -> int | float:
    # Python refuses to convert thousands of digits; as a number it is too large for any float.
    return int(digits) if len(digits) < 400 else math.inf


class Inflater:
    """A body without its Content-Encoding as it arrives, in pieces of bounded size.

    Raises UnsupportedMediaType for an encoding other than one of gzip and deflate, or identity.
    """

    def __init__(self, encoding: str) -> None:
        names = [
            name for name in (part.strip().lower() for part in encoding.split(",")) if name not in ("", "identity")
        ]
        if len(names) > 1 or (names and names[0] not in _WINDOW_BITS):
            raise UnsupportedMediaType(f"content-encoding: expected gzip or deflate, found {encoding!r}")
        self._name = names[0] if names else ""
        self._inflater = zlib.decompressobj(_WINDOW_BITS[self._name]) if names else None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes of these. Raises MalformedPayload."""
        if self._inflater is None:
            if data:
                yield data
            return
        while data:
            try:
                plain = self._inflater.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise MalformedPayload(f"body: not {self._name}: {error}") from error
            if self._inflater.unused_data:
                raise MalformedPayload(f"body: {self._name} data is followed by other bytes")
            if plain:
                yield plain
            data = self._inflater.unconsumed_tail
            if len(plain) < _PIECE_BYTES and not data:
                return

    def end(self) -> None:
        """Called when there are no more bytes. Raises MalformedPayload if some are missing."""
        if self._inflater is not None and not self._inflater.eof:
            raise MalformedPayload(f"body: {self._name} data is truncated")


def _inflate(data: bytes, name: str, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(_WINDOW_BITS[name])
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise MalformedPayload(f"body: not {name}: {error}") from error
    if len(plain) > max_bytes:
        raise PayloadTooLarge(f"body: expected at most {max_bytes} bytes decompressed, found more")
    if not inflater.eof or inflater.unused_data:
        raise MalformedPayload(f"body: {name} data is {'truncated' if not inflater.eof else 'followed by other bytes'}")
    return plain
