"""Whatever a server starts is watched and ended with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.processes import ServerFailed, free_port, running

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are told apart by /proc")


@linux
def test_a_server_ends_with_all_its_processes(tmp_path: Path) -> None:
    """A child that left the server's process group is counted with it, and ends with it."""
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with running(command, {}, port=port, ready_path="/", log=tmp_path / "log") as server:
        assert server.get("/")[0] == 200
        assert len(server.pids()) == 2
        assert server.cpu_s() > 0
        assert server.memory_bytes() > 1_000_000
    end = time.monotonic() + 5
    while server.pids() and time.monotonic() < end:  # the kernel needs a moment to take an ended process away
        time.sleep(0.01)
    assert server.pids() == []


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The last line of its log is in the error."""
    command = [sys.executable, "-c", "raise SystemExit('no such store')"]
    with (
        pytest.raises(ServerFailed, match=r"ended with code 1: no such store"),
        running(command, {}, port=free_port(), ready_path="/", log=tmp_path / "log"),
    ):
        pass
