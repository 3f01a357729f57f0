"""multipart/form-data that is already in memory, as its parts; nothing is spooled to disk."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from app.codecs.bodies import Body
from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # exists for type checkers alone


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
    boundary = body.parameters.get("boundary")
    if not boundary:
        raise MalformedPayload("multipart: the content-type names no boundary")
    reader = _PartReader(max_parts)
    try:
        parser = MultipartParser(boundary.encode("latin-1"), reader.callbacks())
        parser.write(body.data)
        parser.finalize()
    except (FormParserError, UnicodeEncodeError) as error:
        raise MalformedPayload(f"multipart: {error}") from error
    if not reader.ended:
        raise MalformedPayload("multipart: the closing boundary is missing")
    return reader.parts


class _PartReader:
    """Collects what the parser calls back with, as slices of the one body that it parses."""

    def __init__(self, max_parts: int) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._max_parts = max_parts
        self._headers: dict[str, str] = {}
        self._name = b""
        self._value = b""
        self._chunks: list[bytes] = []

    def callbacks(self) -> MultipartCallbacks:
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
        if len(self.parts) >= self._max_parts:
            raise PayloadTooLarge(f"items: expected at most {self._max_parts}, found more")
        self._headers = {}
        self._chunks = []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("utf-8", "replace")
        self._name = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def _part_end(self) -> None:
        message = Message()
        message["content-disposition"] = self._headers.get("content-disposition", "")
        field = message.get_param("name", "", header="content-disposition")
        file_name = message.get_filename()
        if file_name is None and not self._headers.get("content-type", "").startswith("image/"):
            raise InvalidInput(f"multipart: expected picture files, found the field {field!r} without a file name")
        self.parts.append(Part(str(field), file_name or "", b"".join(self._chunks)))

    def _end(self) -> None:
        self.ended = True
