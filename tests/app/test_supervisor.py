"""Several workers on one port: what they answer about the service is about all of them, and they come and go."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Running

    Run = Callable[..., AbstractContextManager[Running]]

ITEM = {"instances": [[0.25] * 64]}


@pytest.fixture(scope="module")
def pair(store: Path, tmp_path_factory: pytest.TempPathFactory, running: Run) -> Iterator[Running]:
    """A service of two workers."""
    with running(store, tmp_path_factory.mktemp("pair") / "log", "--workers", "2") as service:
        yield service


def test_metrics_are_about_all_workers(pair: Running) -> None:
    """Whichever worker is asked, it counts the requests of both."""

    def counted() -> float:
        lines = pair.get("/metrics").text.splitlines()
        wanted = 'hourglass_http_requests_total{method="POST",route="/encode",status="200"}'
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted))

    before = counted()
    for _ in range(20):
        assert pair.post("/encode").status_code == 200
    assert {counted() for _ in range(10)} == {before + 20}
    assert "hourglass_workers 2.0" in pair.get("/metrics").text


def test_both_workers_serve(pair: Running) -> None:
    """The kernel spreads connections over both workers, and both give the same bytes."""
    busy = {pid: Path(f"/proc/{pid}/stat").read_text().split()[13] for pid in pair.workers()}
    assert len({pair.post("/encode").content for _ in range(200)}) == 1
    later = {pid: Path(f"/proc/{pid}/stat").read_text().split()[13] for pid in pair.workers()}
    assert len(busy) == 2
    assert all(int(later[pid]) > int(busy[pid]) for pid in busy), (busy, later)


def test_a_killed_worker_is_missed_and_replaced(pair: Running) -> None:
    """After kill -9 the service is not ready until the worker has been replaced, and says why."""
    victim = pair.workers()[0]
    os.kill(victim, signal.SIGKILL)
    pair.until(lambda: pair.get("/readyz").status_code == 503, "not ready", seconds=5)
    pair.until(lambda: pair.get("/readyz").status_code == 200, "ready again")
    assert victim not in pair.workers()
    assert len(pair.workers()) == 2
    assert pair.post("/encode").status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_well(
    store: Path, tmp_path: Path, workers: str, number: signal.Signals, running: Run
) -> None:
    """SIGTERM and SIGINT end it with exit code 0 and nothing left behind, whatever the number of workers."""
    with running(store, tmp_path / "log", "--workers", workers, TMPDIR=str(tmp_path)) as service:
        children = service.workers() if workers != "1" else []
        service.process.send_signal(number)
        assert service.process.wait(timeout=20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not list(tmp_path.glob("hourglass-*"))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_workers_do_not_outlive_their_supervisor(store: Path, tmp_path: Path, running: Run) -> None:
    """When the supervisor is killed, its workers end by themselves."""
    with running(store, tmp_path / "log", "--workers", "2") as service:
        children = service.workers()
        service.process.kill()
        service.process.wait()
        service.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the workers' end")


def test_a_taken_port_is_named(store: Path, pair: Running) -> None:
    """A port that another program listens on, be it this one, is one clear line and exit code 1."""
    for workers in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "app", "serve", "--port", str(pair.port), "--workers", workers],
            env={**os.environ, "HOURGLASS_MODELS_STORE": str(store)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert f"cannot listen on 127.0.0.1, port {pair.port}" in done.stderr


def test_model_control_reaches_every_worker(store: Path, tmp_path: Path, running: Run) -> None:
    """When an order is answered, every worker has done it, and one that is replaced starts with it."""
    shutil.copytree(store, tmp_path / "store")
    keys = tmp_path / "keys"
    keys.write_text(f"operator infer,admin sha256:{hashlib.sha256(b'key').hexdigest()}\n")
    bearer = {"authorization": "Bearer key"}
    with running(
        tmp_path / "store", tmp_path / "log", "--workers", "2", HOURGLASS_API_KEYS_FILE=str(keys), TMPDIR=str(tmp_path)
    ) as service:

        def order(path: str) -> int:
            return httpx.post(f"http://127.0.0.1:{service.port}/models/{path}", headers=bearer, timeout=60).status_code

        def answering() -> set[str]:
            url = f"http://127.0.0.1:{service.port}/encode?model=tiny"
            answers = [httpx.post(url, json=ITEM, headers=bearer, timeout=20) for _ in range(16)]
            return {answer.headers.get("x-model") or answer.json()["code"] for answer in answers}

        assert answering() == {"tiny:2"}
        assert order("tiny/rollback") == 200
        assert answering() == {"tiny:1"}
        os.kill(service.workers()[0], signal.SIGKILL)
        service.until(lambda: service.get("/readyz").status_code == 503, "not ready", seconds=5)
        service.until(lambda: service.get("/readyz").status_code == 200, "ready again")
        assert answering() == {"tiny:1"}
        assert order("tiny/unload") == 200
        assert answering() == {"model_unavailable"}
        assert order("tiny/load") == 200
        assert answering() == {"tiny:2"}
        assert order("tiny/load?version=7") == 404
