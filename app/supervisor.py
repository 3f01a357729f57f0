"""Several worker processes on one port: starts them, restarts those that die, passes signals on.

Each worker has its own event loop, its own copy of the models and its own listening socket; the kernel spreads the
connections over them (SO_REUSEPORT). Runs no event loop and no torch itself.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from app.fleet import Member

logger = logging.getLogger(__name__)

MEMBER_VARIABLE = "HOURGLASS_INTERNAL_MEMBER"
_LOOK_EVERY_S = 0.5
_SHORT_LIFE_S = 10.0
_MAX_SHORT_LIVES = 5
_MAX_PAUSE_S = 5.0
_ENDED_BY_US = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


def member_from_environment() -> Member | None:
    """The place of this process among the workers; None if no supervisor started it."""
    text = os.environ.get(MEMBER_VARIABLE)
    if text is None:
        return None
    index, count, folder = text.split(":", 2)
    return Member(int(index), int(count), Path(folder))


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket bound to that address, which other processes of ours may bind too if `shared`. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


@dataclass
class _Worker:
    """One process and how often it died young."""

    index: int
    process: subprocess.Popen[bytes]
    started_at_s: float
    short_lives: int = 0
    restart_at_s: float | None = field(default=None)


class Supervisor:
    """Runs `count` workers until a signal ends them. `run` returns the exit code.

    SIGTERM and SIGINT are passed on, and the workers leave as one alone would; a third one kills them. A worker that
    dies is replaced, with growing pauses while it dies young; one that never lives ends the service.
    """

    def __init__(self, host: str, port: int, count: int) -> None:
        # First without sharing, or a second service would take half of the first one's connections, and nobody notice.
        with listen(host, port) as alone:
            port = alone.getsockname()[1]
        # Held, never listened on: the port stays ours while workers come and go, and port 0 becomes one port for all.
        self._reserved = listen(host, port, shared=True)
        self._host, self._port = host, self._reserved.getsockname()[1]
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="hourglass-"))
        self._workers: list[_Worker] = []
        self._stopping = threading.Event()
        self._signals = 0

    @property
    def port(self) -> int:
        """The port that the workers listen on."""
        return int(self._port)

    def run(self) -> int:
        """Starts the workers and looks after them until they have stopped."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._workers = [_Worker(index, self._start(index), time.monotonic()) for index in range(self._count)]
            while not self._stopping.wait(_LOOK_EVERY_S):
                for worker in self._workers:
                    if not self._look_after(worker):
                        self._pass_on(signal.SIGTERM)
                        self._wait()
                        return 1
            return self._wait()
        finally:
            for worker in self._workers:
                if worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()
            self._reserved.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        metrics = self._folder / "metrics"
        metrics.mkdir(exist_ok=True)
        environment = os.environ | {
            MEMBER_VARIABLE: f"{index}:{self._count}:{self._folder}",
            "PROMETHEUS_MULTIPROC_DIR": str(metrics),
            "HOURGLASS_HOST": self._host,
            "HOURGLASS_PORT": str(self._port),
            "HOURGLASS_WORKERS": str(self._count),
        }
        # A session of its own: Ctrl-C reaches the supervisor, which passes it on once.
        return subprocess.Popen([sys.executable, "-m", "app", "serve"], env=environment, start_new_session=True)

    def _look_after(self, worker: _Worker) -> bool:
        """Replaces a worker that died; False if there is no point in it."""
        now = time.monotonic()
        if worker.restart_at_s is not None:
            if now >= worker.restart_at_s:
                worker.process, worker.started_at_s, worker.restart_at_s = self._start(worker.index), now, None
            return True
        code = worker.process.poll()
        if code is None:
            return True
        lived_s = now - worker.started_at_s
        worker.short_lives = worker.short_lives + 1 if lived_s < _SHORT_LIFE_S else 0
        logger.error("worker %d (pid %d) ended with %d", worker.index, worker.process.pid, code)
        if worker.short_lives > _MAX_SHORT_LIVES:
            logger.error("worker %d does not stay alive; stopping", worker.index)
            return False
        pause_s = min(_MAX_PAUSE_S, 0.1 * 2**worker.short_lives) if worker.short_lives > 1 else 0.0
        worker.restart_at_s = now + pause_s
        return True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        self._pass_on(signal.SIGKILL if self._signals > 2 else signal.Signals(number))
        self._stopping.set()

    def _pass_on(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    def _wait(self) -> int:
        """Waits for every worker; 0 if all ended well, or of our signal, as those do that had just begun."""
        codes = [worker.process.wait() for worker in self._workers]
        return 0 if all(code in (0, *_ENDED_BY_US) for code in codes) else 1
