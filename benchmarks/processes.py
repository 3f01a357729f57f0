"""Starts a server as a process of its own, watches what its whole tree of processes uses, and ends every one of them.

A server's processes are found by a mark in their environment, which children inherit: some peers start workers that
leave their parent's process group. Reads /proc, so figures of CPU and memory exist on Linux only.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_MARK = "HOURGLASS_BENCH_SERVER"
_PROC = Path("/proc")
_CPU_CLOCK = 2  # CPUCLOCK_SCHED of the kernel: with a process number it names that process's own clock


class ServerFailed(RuntimeError):
    """A server that did not start, or answered wrongly."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def machine_busy_s() -> float:
    """Processor seconds that the whole machine has spent since it started on anything but idling; 0 without /proc."""
    if not (_PROC / "stat").exists():
        return 0.0
    fields = (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    busy = sum(map(int, fields[:8])) - int(fields[3]) - int(fields[4])  # less idle and waiting for input and output
    return busy / os.sysconf("SC_CLK_TCK")


class Server:
    """A running server and all the processes it started. Made by `running`, which ends them."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, port: int, log: Path) -> None:
        self.port = port
        self._process = process
        self._mark = f"{_MARK}={mark}".encode()
        self._log = log

    def __repr__(self) -> str:
        return f"<Server {self._process.pid} on port {self.port}>"

    def wait_ready(self, path: str, timeout_s: float) -> None:
        """Returns when GET `path` answers 200. Raises ServerFailed, with the end of the log."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if (code := self._process.poll()) is not None:
                raise ServerFailed(f"ended with code {code}: {self.last_words()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get(path)[0] == 200:
                    return
            time.sleep(0.1)
        raise ServerFailed(f"not ready after {timeout_s:.0f} s: {self.last_words()}")

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: bytes, content_type: str) -> tuple[int, bytes]:
        """Status and body of a POST."""
        return self._ask("POST", path, body, {"Content-Type": content_type})

    def _ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def last_words(self) -> str:
        """The last line of the log that says anything."""
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")

    def pids(self) -> list[int]:
        """Every process of the server."""
        found = []
        for folder in _PROC.iterdir() if _PROC.is_dir() else ():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    def cpu_s(self) -> float:
        """Processor seconds that the processes of the server have used so far."""
        total = 0.0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                total += time.clock_gettime((~pid << 3) | _CPU_CLOCK)
        return total

    def memory_bytes(self) -> int:
        """Proportional set size: pages that processes share are counted once in all."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total

    def stop(self, patience_s: float = 5.0) -> None:
        """Asks the server to end, and after `patience_s` ends whatever is left of it."""
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience_s)
        finally:  # also for someone who presses Ctrl-C again
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process.poll() is None:
                self._process.kill()  # where there is no /proc, the process itself at least
            self._process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    port: int,
    ready_path: str,
    log: Path,
    timeout_s: float = 90.0,
) -> Iterator[Server]:
    """A server for the time of the `with` block, ready for requests. Raises ServerFailed if it does not start."""
    mark = uuid.uuid4().hex
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, _MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches this program alone, which then ends the servers in order
        )
    server = Server(process, mark, port, log)
    try:
        server.wait_ready(ready_path, timeout_s)
        yield server
    finally:
        server.stop()
