"""What a client that leaves amid a stream leaves behind, and how long: temporary files, rows in the queue, memory."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.processes import Server

PROMISE_S = 2.0
PATIENCE_S = 10.0
_PICTURE = Path("examples/digit-7.png")


def measure(server: Server, line: bytes) -> None:
    """Prints, for each way of leaving, what the service held, and after how many seconds it was free of it.

    Args:
        server: at rest.
        line: an item of the default model for /bulk/reconstruct, with its newline.
    """
    print(f"Clients that read nothing, then leave amid /bulk/reconstruct (promise: all is free within {PROMISE_S:g} s)")
    ways: dict[str, Callable[[Server, bytes], socket.socket]] = {
        "has sent everything": _sent_everything,
        "still sends": _still_sends,
        "has sent a zip": _sent_a_zip,
    }
    for name, begin in ways.items():
        time.sleep(1)
        idle = server.memory_bytes()
        sock = begin(server, line)
        time.sleep(1)
        files, size = _temporary_files(server)
        held = f"{files} files of {size / 1e6:.0f} MB, memory {(server.memory_bytes() - idle) / 1e6:+.0f} MB"
        sock.close()
        took = _until_free(server)
        time.sleep(PROMISE_S)
        left = (server.memory_bytes() - idle) / 1e6
        print(f"  {name:20} held {held}; files and rows were gone after {took:.2f} s, memory then {left:+.0f} MB")


def _until_free(server: Server) -> float:
    """Seconds until no temporary file is open and no row waits. Raises TimeoutError after `PATIENCE_S`."""
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < PATIENCE_S:
        if not _temporary_files(server)[0] and not _waiting_rows(server):
            return time.perf_counter() - started
    raise TimeoutError(f"after {took:.0f} s {_temporary_files(server)[0]} files, {_waiting_rows(server):.0f} rows")


def _temporary_files(server: Server) -> tuple[int, int]:
    """How many the server has open, nameless as they are, and their bytes."""
    count, size = 0, 0
    for pid in server.pids():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                if target.startswith(tempfile.gettempdir()) and target.endswith("(deleted)"):
                    count, size = count + 1, size + descriptor.stat().st_size
    return count, size


def _waiting_rows(server: Server) -> float:
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("hourglass_queue_rows"))


def _connect(server: Server, *headers: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that unread answers stay with the server
    sock.connect(("127.0.0.1", server.port))
    sock.sendall("\r\n".join(["POST /bulk/reconstruct HTTP/1.1", "host: x", *headers, "", ""]).encode())
    return sock


def _sent_everything(server: Server, line: bytes) -> socket.socket:
    times = 200
    sock = _connect(server, f"content-length: {100 * times * len(line)}")
    _send(sock, [100 * line] * times)
    return sock


def _still_sends(server: Server, line: bytes) -> socket.socket:
    sock = _connect(server, "transfer-encoding: chunked")
    _send(sock, [b"%x\r\n%s\r\n" % (100 * len(line), 100 * line)] * 60)
    return sock


def _sent_a_zip(server: Server, _line: bytes) -> socket.socket:
    archive, picture = io.BytesIO(), _PICTURE.read_bytes()
    with zipfile.ZipFile(archive, "w") as files:
        for number in range(30_000):
            files.writestr(f"{number}.png", picture)
    body = archive.getvalue()
    sock = _connect(server, "content-type: application/zip", f"content-length: {len(body)}")
    _send(sock, [body])
    sock.recv(4096)
    return sock


def _send(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    for piece in pieces:
        sock.sendall(piece)
