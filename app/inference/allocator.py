"""How the C library hands out the memory that forward passes work in. Knows nothing of torch."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt's numbers
_KEPT_BYTES = 1 << 30


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Has glibc keep what a forward pass frees for the next one; elsewhere nothing is done.

    By itself it gives every large block back to the system and asks for it anew, which then clears it page by page: up
    to half the time of a convolutional network on pictures of 224 × 224. Whoever set one of glibc's own variables for
    this has decided already.

    Returns whether it is done.
    """
    decided = ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if platform.libc_ver()[0] != "glibc" or any(name in environment for name in decided):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena, to be called before the threads that run passes begin: those of other threads come in parts of 64 MiB,
    # and keep nothing once a threshold is set.
    options = {_ARENA_MAX: 1, _MMAP_THRESHOLD: _KEPT_BYTES, _TRIM_THRESHOLD: _KEPT_BYTES}
    done = [mallopt(option, value) for option, value in options.items()]
    return all(done)
