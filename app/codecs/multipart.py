"""multipart/form-data as its parts, whole or as it arrives; nothing is spooled to disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from app.codecs.bodies import Body
from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge, ServiceError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # exists for type checkers alone


_PLAIN_HEAD = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([\w.-]+)"; filename="([\w. -]+)"(?:\r\nContent-Type: [\w./+-]+)?',
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Part:
    """One file of a form: the field's name, the file's name and its bytes."""

    field: str
    file_name: str
    data: bytes


def parse_multipart(body: Body, max_parts: int) -> list[Part]:
    """The files of a form, in order, whatever their field names.

    Raises MalformedPayload for bytes that are no complete form, InvalidInput for a part that is no file, and
    PayloadTooLarge for more than `max_parts`.
    """
    if (plain := _plain_parts(body, max_parts)) is not None:
        return plain
    reader = MultipartReader(body.parameters, max_parts)
    parts = reader.feed(body.data)
    reader.end()
    for part in parts:
        if isinstance(part, ServiceError):
            raise part
    return [part for part in parts if isinstance(part, Part)]


def _plain_parts(body: Body, max_parts: int) -> list[Part] | None:
    """The files of a form that is written as nearly all are; None for every other, good or bad or of more than
    `max_parts`, which the parser reads.

    A split at the speed of memory, in place of a look at every part's headers byte by byte.
    """
    boundary = body.parameters.get("boundary", "").encode("latin-1", "replace")
    opening = b"--" + boundary + b"\r\n"
    if not boundary or not body.data.startswith(opening):
        return None
    *pieces, closing = body.data[len(opening) - 2 :].split(b"\r\n--" + boundary, max_parts)
    if closing not in (b"--\r\n", b"--") or not pieces:
        return None
    parts = []
    for piece in pieces:
        head, blank, data = piece.partition(b"\r\n\r\n")
        found = _PLAIN_HEAD.fullmatch(head)
        if not blank or found is None:
            return None
        parts.append(Part(found[1].decode(), found[2].decode(), data))
    return parts


class MultipartReader:
    """The parts of a form as they arrive.

    Args:
        parameters: the content-type's; `boundary` is needed.
        max_parts: most parts; None for any number.
        max_part_bytes: most bytes of one part; None for any number.
    """

    def __init__(
        self, parameters: dict[str, str], max_parts: int | None = None, max_part_bytes: int | None = None
    ) -> None:
        boundary = parameters.get("boundary")
        if not boundary:
            raise MalformedPayload("multipart: the content-type names no boundary")
        self._done: list[Part | ServiceError] = []
        self._count = 0
        self._ended = False
        self._max_parts = max_parts
        self._max_part_bytes = max_part_bytes
        self._size = 0
        self._headers: dict[str, str] = {}
        self._name = b""
        self._value = b""
        self._chunks: list[bytes] = []
        try:
            self._parser = MultipartParser(boundary.encode("latin-1"), self._callbacks())
        except (FormParserError, UnicodeEncodeError) as error:
            raise MalformedPayload(f"multipart: {error}") from error

    def feed(self, data: bytes) -> list[Part | ServiceError]:
        """The parts that end in these bytes; an error in place of one that is no file, or too large.

        Raises MalformedPayload for bytes that are no form, and PayloadTooLarge for too many parts.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise MalformedPayload(f"multipart: {error}") from error
        done, self._done = self._done, []
        return done

    def end(self) -> None:
        """Called when there are no more bytes. Raises MalformedPayload if the form is not complete."""
        try:
            self._parser.finalize()
        except FormParserError as error:
            raise MalformedPayload(f"multipart: {error}") from error
        if not self._ended:
            raise MalformedPayload("multipart: the closing boundary is missing")

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._max_parts is not None and self._count > self._max_parts:
            raise PayloadTooLarge(f"items: expected at most {self._max_parts}, found more")
        self._headers = {}
        self._chunks = []
        self._size = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("utf-8", "replace")
        self._name = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._max_part_bytes is None or self._size <= self._max_part_bytes:
            self._chunks.append(data[start:end])
        else:
            self._chunks = []

    def _part_end(self) -> None:
        message = Message()
        message["content-disposition"] = self._headers.get("content-disposition", "")
        field = message.get_param("name", "", header="content-disposition")
        file_name = message.get_filename()
        if file_name is None and not self._headers.get("content-type", "").startswith("image/"):
            self._done.append(
                InvalidInput(f"multipart: expected picture files, found the field {field!r} without a file name")
            )
        elif self._max_part_bytes is not None and self._size > self._max_part_bytes:
            self._done.append(
                PayloadTooLarge(f"multipart: expected at most {self._max_part_bytes} bytes a part, found {self._size}")
            )
        else:
            self._done.append(Part(str(field), file_name or "", b"".join(self._chunks)))
        self._chunks = []

    def _end(self) -> None:
        self._ended = True
