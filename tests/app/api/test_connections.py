"""Raw sockets: what is no HTTP, or has no end, harms nobody."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.api.connections import MAX_HEAD_BYTES, MAX_PIPELINED, HttpConnection

if TYPE_CHECKING:
    from conftest import Service

BODY = json.dumps({"instances": [[0.5] * 64]}).encode()
POST = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def talk(service: Service, *pieces: bytes, end: bool = False) -> bytes:
    """Sends the pieces and returns all that comes back until the service closes the connection."""
    with socket.create_connection(service.address, timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            if end:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the service has heard enough
        received = b""
        while True:
            try:
                data = connection.recv(65536)
            except ConnectionResetError:
                return received
            if not data:
                return received
            received += data


GARBAGE = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "unknown method": b"FETCH /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown version": b"GET /livez HTTP/7.3\r\nHost: x\r\n\r\n",
    "two lengths": b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "negative length": b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "endless length": b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 100 + b"\r\n\r\n",
    "length and chunks": CHUNKED.replace(b"Host: x", b"Content-Length: 5") + b"0\r\n\r\n",
    "space in a name": b"GET /livez HTTP/1.1\r\nHost : x\r\n\r\n",
    "newline in an id": b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\rSet-Cookie: b\r\n\r\n",
    "null in a header": b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\0b\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_http_gets_the_one_error_form(service: Service, name: str) -> None:
    """Bytes that are no HTTP get a 400 in the form of every error, and the connection ends."""
    head, _, body = talk(service, GARBAGE[name]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    problem = json.loads(body)
    assert problem.keys() == {"error", "code", "request_id"}
    assert problem["code"] == "invalid_input"
    assert f"x-request-id: {problem['request_id']}".encode() in head
    assert service.client.get("/readyz").status_code == 200


ENDLESS = {
    "path": (b"GET /", b"a" * 16384),
    "header": (b"GET /livez HTTP/1.1\r\nX: ", b"a" * 16384),
    "header name": (b"GET /livez HTTP/1.1\r\n", b"a" * 16384),
    "headers": (b"GET /livez HTTP/1.1\r\n", b"a: b\r\n" * 3000),
    "chunk size": (CHUNKED + b"1;", b"a" * 16384),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 3000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_head_without_end_is_cut_off(service: Service, name: str) -> None:
    """Request lines, headers, chunk headers and trailers end at the limit, after which nothing more is read."""
    start, more = ENDLESS[name]
    received = talk(service, start, *[more] * (4_000_000 // len(more)))
    assert b"HTTP/1.1 400 Bad Request" in received or received == b""
    assert f"headers: expected at most {MAX_HEAD_BYTES} bytes".encode() in received or received == b""
    assert service.client.get("/readyz").status_code == 200


def test_large_but_bounded_head_is_read(service: Service) -> None:
    """Headers below the limit are nobody's trouble."""
    answer = service.client.get("/livez", headers={"x": "a" * (MAX_HEAD_BYTES // 2)})
    assert answer.status_code == 200


def test_requests_sent_ahead_are_answered_in_order(service: Service) -> None:
    """Pipelined requests, good and bad, get their answers one after another."""
    nowhere = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received = talk(service, (POST + BODY + nowhere) * 20 + last)
    found = [part.split(b" ", 1)[0] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert found == [b"200", b"404"] * 20 + [b"200"]


def test_too_many_requests_sent_ahead_are_cut_off(service: Service) -> None:
    """Requests sent ahead without end do not pile up."""
    received = talk(service, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * (MAX_PIPELINED * 20))
    assert received.count(b"HTTP/1.1 200") < MAX_PIPELINED * 20
    assert service.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "chunks",
    [b"zz\r\nab\r\n0\r\n\r\n", b"-5\r\nabcde\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"f" * 40 + b"\r\n"],
    ids=["no number", "negative", "too long", "huge"],
)
def test_bad_chunks_are_refused(service: Service, chunks: bytes) -> None:
    """A body whose chunks are wrong is answered with a 400 or not at all; the service stays ready."""
    received = talk(service, CHUNKED + chunks)
    assert b"HTTP/1.1 200" not in received
    assert service.client.get("/readyz").status_code == 200


def test_body_in_single_bytes_is_read(service: Service) -> None:
    """A body that arrives byte by byte, in chunks of one, is a body."""
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    request = CHUNKED.replace(b"Host: x", b"Host: x\r\nConnection: close") + chunks
    received = talk(service, *[request[start : start + 7] for start in range(0, len(request), 7)])
    assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent", [b"GET /liv", b"GET /livez HTTP/1.1\r\nHo", POST, POST + BODY[:50], CHUNKED + b"5\r\nab"]
)
def test_client_that_leaves_early_harms_nobody(service: Service, sent: bytes) -> None:
    """A connection that ends in the middle of anything leaves the service ready and its queue empty."""
    talk(service, sent, end=True)
    assert service.client.get("/readyz").status_code == 200
    assert service.metric("hourglass_queue_rows") == 0


def test_unread_large_body_is_refused_before_it_is_sent(service: Service) -> None:
    """A body that declares itself too large is refused by its header, before any of it arrives."""
    declared = b"POST /encode HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 999999999999\r\n\r\n"
    received = talk(service, declared)
    assert received.startswith(b"HTTP/1.1 413")
    assert b"found 999999999999" in received


def test_whole_and_in_pieces_are_answered_alike(service: Service) -> None:
    """A request that arrives in one piece and one that does not, with and without a proxy, differ in nothing."""
    head = POST.replace(b"Host: x", b"Host: x\r\nX-Request-Id: same\r\nConnection: close")
    forwarded = head.replace(b"Host: x", b"Host: x\r\nX-Forwarded-For: 10.0.0.1")
    request, half = head + BODY, len(head) + 40
    with socket.create_connection(service.address, timeout=20) as connection:
        connection.sendall(request[:half])
        time.sleep(0.05)  # or both pieces may arrive as one
        connection.sendall(request[half:])
        in_pieces = b"".join(iter(lambda: connection.recv(65536), b""))
    answers = [in_pieces, talk(service, request), talk(service, forwarded + BODY)]
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    headers = [[line.partition(b":")[0] for line in answer.split(b"\r\n\r\n")[0].split(b"\r\n")] for answer in answers]
    assert bodies[0] == bodies[1] == bodies[2]
    assert headers[0] == headers[1] == headers[2]
    assert b"x-request-id: same" in in_pieces


def test_whoever_waits_to_be_told_to_go_on_is_told(service: Service) -> None:
    """`Expect: 100-continue` is answered before the body comes."""
    with socket.create_connection(service.address, timeout=20) as connection:
        connection.sendall(POST.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue\r\nConnection: close"))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_idle_connections_are_closed() -> None:
    """Who was answered and says nothing for long is hung up on; who is answered only now is not."""

    async def act() -> None:
        connection = HttpConnection(uvicorn.Config(answer_nothing, http=HttpConnection), ServerState(), {})
        transport = Mock(asyncio.Transport)
        transport.is_closing.return_value = False
        transport.get_extra_info.return_value = None
        connection.connection_made(transport)
        now = connection.loop.time()
        connection.close_if_idle(now + 1000)
        transport.close.assert_not_called()  # nothing was asked yet
        connection.data_received(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.01)
        assert transport.write.call_count
        assert connection.cycle is None, "an idle connection keeps nothing of what it was asked"
        connection.close_if_idle(now + connection.timeout_keep_alive / 2)
        transport.close.assert_not_called()
        connection.close_if_idle(now + connection.timeout_keep_alive + 1)
        transport.close.assert_called_once()

    asyncio.run(act())


def test_the_batcher_hears_of_each_new_connection(service: Service) -> None:
    """Or it would rest while others wait to be let in; see `Batcher.stay_awake`."""
    batcher = service.app.state.catalog.batcher
    batcher._stays_awake = False
    with socket.create_connection(service.address, timeout=20) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert batcher._stays_awake


async def answer_nothing(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An application whose every answer is empty."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def test_upgrade_is_not_followed(service: Service) -> None:
    """There are no websockets here: an upgrade to them is answered like any other request, or refused."""
    received = talk(
        service,
        b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        end=True,
    )
    assert b"101 Switching" not in received
    assert service.client.get("/readyz").status_code == 200
