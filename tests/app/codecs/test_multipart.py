"""Multipart forms: any field name, any number of files, and framing that is wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.codecs.bodies import Body, parse_content_type
from app.codecs.multipart import MultipartReader, Part, _plain_parts, parse_multipart
from app.errors import InvalidInput, MalformedPayload, PayloadTooLarge

FILE = b'form-data; name="file"; filename="a.png"'


def part(data: bytes, disposition: bytes = FILE, boundary: bytes = b"B", more: bytes = b"") -> bytes:
    return b"--" + boundary + b"\r\nContent-Disposition: " + disposition + b"\r\n" + more + b"\r\n" + data + b"\r\n"


def form(*parts: bytes, boundary: str = "B") -> Body:
    data = b"".join(parts) + b"--" + boundary.encode() + b"--\r\n"
    return Body(data, "multipart/form-data", {"boundary": boundary})


@pytest.mark.parametrize("count", [1, 2, 7])
def test_files_come_in_order(count: int) -> None:
    """Every file of a form is found, in order, byte for byte."""
    files = [bytes([index, 13, 10, 45, 45]) * index for index in range(count)]
    assert [found.data for found in parse_multipart(form(*map(part, files)), 10)] == files


@pytest.mark.parametrize("field", ["file", "image", "", "файл", 'a\\"b', "x" * 200])
def test_any_field_name_will_do(field: str) -> None:
    """What a field is called is the caller's business."""
    disposition = f'form-data; name="{field}"; filename="x.png"'.encode()
    assert [found.data for found in parse_multipart(form(part(b"data", disposition)), 10)] == [b"data"]


def test_a_picture_needs_no_file_name() -> None:
    """A part of an image type is a file even without a file name."""
    body = form(part(b"data", b'form-data; name="x"', more=b"Content-Type: image/png\r\n"))
    assert parse_multipart(body, 10)[0].data == b"data"


def test_an_empty_file_is_a_file() -> None:
    """A file of no bytes is a part of no bytes."""
    assert [found.data for found in parse_multipart(form(part(b"")), 10)] == [b""]


@pytest.mark.parametrize("boundary", ["B", "a b", "--", "x" * 70, "'()+_,-./:=?"])
def test_boundaries_of_any_look(boundary: str) -> None:
    """Any boundary that RFC 2046 allows frames the parts."""
    body = form(part(b"data", boundary=boundary.encode()), boundary=boundary)
    assert parse_multipart(body, 10)[0].data == b"data"


def test_a_text_field_is_refused_by_name() -> None:
    """A field that is no file is named in the refusal."""
    with pytest.raises(InvalidInput, match="expected picture files, found the field 'note'"):
        parse_multipart(form(part(b"hello", b'form-data; name="note"')), 10)


WHOLE = form(part(b"data")).data


@pytest.mark.parametrize(
    ("data", "boundary"),
    [
        (b"", "B"),
        (WHOLE[: -len("--B--\r\n")], "B"),
        (WHOLE[:-6], "B"),
        (WHOLE[:30], "B"),
        (WHOLE, "C"),
        (WHOLE, ""),
        (WHOLE, "x" * 300),
        (WHOLE, "\u20ac"),
        (b"no form at all", "B"),
        (b"--B\r\n" + b"a: b\r\n" * 10_000, "B"),
        (b"--B\r\na: " + b"b" * 100_000, "B"),
        (b"--B\r\nno header\r\n\r\ndata\r\n--B--\r\n", "B"),
    ],
    ids=["empty", "no end", "half an end", "half", "other boundary", "no boundary", "long boundary", "€", "text",
         "headers without end", "header without end", "no header"],
)  # fmt: skip
def test_wrong_framing_is_malformed(data: bytes, boundary: str) -> None:
    """A form that is cut short or framed otherwise is a malformed payload."""
    with pytest.raises(MalformedPayload, match="multipart: "):
        parse_multipart(Body(data, "multipart/form-data", {"boundary": boundary}), 10)


def test_no_boundary_is_malformed() -> None:
    """A content type without a boundary is a malformed payload."""
    with pytest.raises(MalformedPayload, match="names no boundary"):
        parse_multipart(Body(WHOLE, "multipart/form-data", {}), 10)


def test_too_many_parts_are_refused() -> None:
    """More parts than the limit are too large, and so is the form that would be without end."""
    assert len(parse_multipart(form(*[part(b"")] * 10), 10)) == 10
    with pytest.raises(PayloadTooLarge, match="at most 10, found more"):
        parse_multipart(form(*[part(b"")] * 11), 10)


def test_a_form_of_no_parts_has_none() -> None:
    """A form that ends at once holds nothing."""
    assert parse_multipart(form(), 10) == []


def test_odd_headers_never_raise_anything_else() -> None:
    """Content types and dispositions of random characters are read or refused."""
    chance = random.Random(5)
    alphabet = b"\"';=*%012 ab\\\xff-_utf8"
    for _ in range(3000):
        junk = bytes(chance.choice(alphabet) for _ in range(chance.randrange(40)))
        parse_content_type("multipart/form-data; boundary*0*=" + junk.decode("latin-1"))
        try:
            found = parse_multipart(form(part(b"data", b"form-data; filename*=" + junk)), 10)
        except (InvalidInput, MalformedPayload):
            continue
        assert found[0].data == b"data"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["file", "a b", 'x"y', "mask"]),
            st.sampled_from(["a.png", "b c.jpg", "é.png", ""]),
            st.binary(max_size=12) | st.sampled_from([b"\r\n--B", b"\r\n--Bx", b"--B--\r\n", b"\r\n\r\n", b"\r\n--"]),
            st.sampled_from(
                [b"", b"Content-Type: image/png\r\n", b"X-Other: 1\r\n", b"Content-Type: image/png\r\nA: b\r\n"]
            ),
        ),
        max_size=3,
    ),
    st.sampled_from([b"", b"\r\n", b"after"]),
)
def test_a_form_split_at_once_is_what_the_parser_makes_of_it(
    files: list[tuple[str, str, bytes, bytes]], end: bytes
) -> None:
    """What is read the fast way has the same parts as the parser finds, and what that refuses is not read so."""
    parts = [
        part(data, f'form-data; name="{field}"; filename="{name}"'.encode(), more=more)
        for field, name, data, more in files
    ]
    body = Body(b"".join(parts) + b"--B--" + end, "multipart/form-data", {"boundary": "B"})
    plain = _plain_parts(body, 10)
    if plain is None:
        return
    reader = MultipartReader(body.parameters)
    found = reader.feed(body.data)
    reader.end()
    assert plain == found


def test_a_usual_form_is_split_at_once() -> None:
    """As browsers, curl and Python's libraries write it."""
    more = b"Content-Type: image/png\r\n"
    plain = _plain_parts(form(part(b"\x89PNG\r\n\r\n", more=more), part(b"", more=more)), 10)
    assert plain == [Part("file", "a.png", b"\x89PNG\r\n\r\n"), Part("file", "a.png", b"")]


def test_more_parts_than_may_be_are_not_even_split() -> None:
    """Millions of empty parts would be gigabytes as objects; the parser stops at the first that is one too many."""
    body = form(*[part(b"")] * 3)
    assert _plain_parts(body, 3) is not None
    assert _plain_parts(body, 2) is None
    with pytest.raises(PayloadTooLarge):
        parse_multipart(body, 2)
