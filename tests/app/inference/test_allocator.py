"""Memory that forward passes work in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from app.inference.allocator import keep_freed_memory

FAULTS = """
import resource, sys, threading
import torch
from app.inference.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory({})

def work():
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.empty(10 << 20).fill_(1) for _ in range(2)]
        del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def page_faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_memory_is_kept() -> None:
    """Large blocks that a thread takes and frees again and again cost no page faults in the end."""
    assert page_faults("kept") < page_faults("given back") / 10


@pytest.mark.parametrize(
    "name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"]
)
def test_the_operators_choice_stands(name: str) -> None:
    """Where glibc's own variables are set, they decide."""
    assert not keep_freed_memory({name: "131072"})
