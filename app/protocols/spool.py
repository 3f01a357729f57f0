"""Bytes that wait for a reader slower than their writer: in memory first, beyond that in temporary files."""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Self

from app.errors import PayloadTooLarge

MEMORY_BYTES = 1024 * 1024
_SEGMENT_BYTES = 16 * 1024 * 1024  # a file that was read is deleted: a stream without end needs no disk without end
_PIECE_BYTES = 256 * 1024


class _Segment:
    """A temporary file, written at its end and read from its beginning."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="hourglass-")  # noqa: SIM115  closed by the spool
        self.written = 0
        self.taken = 0


class Spool:
    """A pipe of bytes that never makes its writer wait, up to a limit. Open and close it with `with`.

    Args:
        max_bytes: most that may wait.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._memory: deque[bytes] = deque()
        self._memory_bytes = 0
        self._segments: deque[_Segment] = deque()  # all that is in them is newer than what is in memory
        self._ended = False
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self.waiting_bytes = 0

    def __repr__(self) -> str:
        return f"<Spool {self.waiting_bytes} bytes waiting, {len(self._segments)} files>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        files = [segment.file for segment in self._segments]
        if len(files) > 1:  # giving back a gigabyte of disk takes most of a second
            asyncio.get_running_loop().run_in_executor(None, _close, files)
        else:
            _close(files)
        self._segments.clear()
        self._memory.clear()

    def put(self, data: bytes) -> None:
        """Adds bytes. Raises PayloadTooLarge where more would wait than may."""
        if self.waiting_bytes + len(data) > self._max_bytes:
            raise PayloadTooLarge(
                f"answers: more than {self._max_bytes} bytes of them wait unread while the body is still being sent"
            )
        self._add(data)

    def finish(self, data: bytes = b"") -> None:
        """Adds the last bytes, limit or not; `take` gives b"" behind them."""
        if data:
            self._add(data)
        self._ended = True
        self._changed.set()

    async def take(self) -> bytes:
        """The next bytes, b"" after the last."""
        while not self.waiting_bytes:
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        data = self._from_memory() if self._memory else self._from_file()
        self.waiting_bytes -= len(data)
        self._taken.set()
        return data

    async def room(self) -> None:
        """Returns once what waits fits into memory."""
        while self.waiting_bytes > MEMORY_BYTES:
            self._taken.clear()
            await self._taken.wait()

    def _add(self, data: bytes) -> None:
        self.waiting_bytes += len(data)
        if self._segments or self._memory_bytes + len(data) > MEMORY_BYTES:
            if not self._segments or self._segments[-1].written >= _SEGMENT_BYTES:
                self._segments.append(_Segment())
            segment = self._segments[-1]
            segment.file.seek(segment.written)
            segment.file.write(data)
            segment.written += len(data)
        else:
            self._memory.append(data)
            self._memory_bytes += len(data)
        self._changed.set()

    def _from_memory(self) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while self._memory and size < _PIECE_BYTES:
            pieces.append(self._memory.popleft())
            size += len(pieces[-1])
        self._memory_bytes -= size
        return b"".join(pieces)

    def _from_file(self) -> bytes:
        segment = self._segments[0]
        segment.file.seek(segment.taken)
        data = segment.file.read(min(_PIECE_BYTES, segment.written - segment.taken))
        segment.taken += len(data)
        if segment.taken == segment.written:
            self._segments.popleft().file.close()
        return data


def _close(files: Sequence[IO[bytes]]) -> None:
    for file in files:
        file.close()
