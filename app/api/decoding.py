"""Decoding that would hold up the event loop: on few threads, one picture after another, while anybody waits for it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.api.dependencies import Terms
from app.errors import DeadlineExceeded

T = TypeVar("T")
Check = Callable[[], None]
"""Called between two pictures; raises where nobody waits for the next one any more."""

# A large picture takes a core and hundreds of megabytes while it is decoded: no more of them at once than there are
# cores, however many requests bring some.
_DECODERS = ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="decoder")


class _Abandoned(Exception):
    """Nobody waits for the result."""


async def decode(work: Callable[[Check], T], terms: Terms) -> T:
    """What `work` gives, called on one of the decoders' threads.

    Raises what it raises, and DeadlineExceeded when the request's time is over, its wait for a thread included. What
    is being decoded then, or when the caller is cancelled, is finished; what would come after it is not begun.
    """
    ends_at, abandoned = time.monotonic() + terms.left_s, threading.Event()
    late = f"deadline: no answer within {terms.timeout_ms} ms"

    def check() -> None:
        if abandoned.is_set():
            raise _Abandoned
        if time.monotonic() > ends_at:
            raise DeadlineExceeded(late)

    try:
        async with asyncio.timeout(terms.left_s):
            return await asyncio.get_running_loop().run_in_executor(_DECODERS, work, check)
    except TimeoutError as error:
        raise DeadlineExceeded(late) from error
    finally:
        abandoned.set()
