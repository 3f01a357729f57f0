"""Services that end, die and are replaced while clients ask: who is answered, and what /readyz says meanwhile.

`make rolling` restarts two replicas behind nginx fifty times, `make many` serves 200 artifacts from room for 20 for a
minute; here both are short.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest

from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef, list_artifacts, read_artifact
from app.inference.loaded_model import tensor_bytes

if TYPE_CHECKING:
    from conftest import Load, Running

    Run = Callable[..., AbstractContextManager[Running]]

ROOT = Path(__file__).parents[2]
BODY = json.dumps({"instances": [[0.25] * 64]}).encode()
RESTARTS = int(os.environ.get("RESTARTS", "2"))
MODELS, FIT = int(os.environ.get("MODELS", "40")), 20
SECONDS = float(os.environ.get("SECONDS", "3"))


def is_good(status: int, _headers: dict[str, str], body: bytes) -> str | None:
    return None if status == 200 else f"{status} {body[:200]!r}"


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json().get("code", "")
    return code


@pytest.mark.parametrize("workers", ["1", "2"])
def test_drain_under_load(store: Path, tmp_path: Path, workers: str, running: Run, load: type[Load]) -> None:
    """After SIGTERM the service is not ready at once and answers on, ending each connection; then it exits with 0."""
    with running(store, tmp_path / "log", "--workers", workers, HOURGLASS_DRAIN_SECONDS="1.5") as service:
        closing: list[str | None] = []

        def note(status: int, headers: dict[str, str], body: bytes) -> str | None:
            closing.append(headers.get("connection"))
            return None if status == 200 or b'"draining"' in body else f"{status} {body[:200]!r}"

        with load(service.port, "/encode", BODY, note, clients=64) as clients:
            service.until(lambda: clients.answers > 200, "answers")
            service.process.send_signal(signal.SIGTERM)
            signalled_s = time.monotonic()
            service.until(lambda: code_of(service.get("/readyz")) == "draining", "not ready", seconds=1)
            assert service.get("/livez").status_code == 200
            before = len(closing)
            service.until(lambda: len(closing) > before + 100, "answers while draining")
            assert time.monotonic() - signalled_s < 1.5, "too slow to tell"
            assert clients.failures == []
            assert set(closing[before + 64 :]) == {"close"}
            assert service.process.wait(timeout=20) == 0
        assert clients.wrong == []
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_signal_cuts_the_drain_short(store: Path, tmp_path: Path, running: Run) -> None:
    """SIGTERM twice ends the service at once, whatever the pause, with exit code 0."""
    for workers in ("1", "2"):
        with running(store, tmp_path / "log", "--workers", workers, HOURGLASS_DRAIN_SECONDS="600") as service:
            service.process.send_signal(signal.SIGTERM)
            service.until(lambda service=service: service.get("/readyz").status_code == 503, "not ready")
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(timeout=20) == 0


def test_killed_worker_under_load(store: Path, tmp_path: Path, running: Run, load: type[Load]) -> None:
    """SIGKILL of a worker loses at most one request for each of its connections; /readyz tells that one is missing."""
    with running(store, tmp_path / "log", "--workers", "2") as service:
        with load(service.port, "/encode", BODY, is_good, clients=64) as clients:
            service.until(lambda: clients.answers > 500, "answers")
            victim = service.workers()[0]
            mine = connections(victim, service.port)
            os.kill(victim, signal.SIGKILL)
            service.until(lambda: service.get("/readyz").status_code == 503, "not ready", seconds=5)
            while victim in service.workers() or len(service.workers()) < 2:
                assert service.get("/readyz").status_code == 503
            service.until(lambda: service.get("/readyz").status_code == 200, "ready again")
            after = clients.answers
            service.until(lambda: clients.answers > after + 500, "answers again")
        assert clients.wrong == []
        assert 0 < mine < 64
        assert len(clients.lost) <= mine + 8, clients.lost  # those in the kernel's queue are not yet a worker's to see


def connections(pid: int, port: int) -> int:
    """How many connections of that port a process holds."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(
        f"socket:[{line[9]}]" in sockets and line[1].endswith(f":{port:04X}") and line[3] == "01" for line in lines
    )


def test_many_models_in_little_memory(
    tmp_path: Path,
    running: Run,
    load: type[Load],
    write_artifact_named: Callable[..., ArtifactRef],
    record_property: Callable[[str, object], None],
) -> None:
    """A store of many artifacts under a budget for 20 of them: random requests, none fails, memory stays flat."""
    made = write_artifact_named(tmp_path / "made", "tiny", without=frozenset(Capability) - {"encode", "anomaly_score"})
    store = tmp_path / "store"
    for number in range(MODELS):
        target = store / f"tiny-{number}" / "1"
        shutil.copytree(made.path, target)
        manifest = json.loads((made.path / "manifest.json").read_text()) | {"name": f"tiny-{number}"}
        (target / "manifest.json").write_text(json.dumps(manifest))
    budget = FIT * tensor_bytes(read_artifact(next(iter(list_artifacts(store)))))
    draw = random.Random(0)
    environment = {"HOURGLASS_MODEL_MEMORY_BYTES": str(budget), "MALLOC_ARENA_MAX": "2"}
    with running(store, tmp_path / "log", HOURGLASS_TORCH_THREADS="1", **environment) as service:

        def path() -> str:
            return f"/encode?model=tiny-{draw.randrange(MODELS)}"

        states = [model["versions"][0]["state"] for model in service.get("/models").json()["models"]]
        assert (states.count("ready"), states.count("unloaded")) == (FIT, MODELS - FIT)
        resident: list[int] = []
        with load(service.port, path, BODY, is_good, clients=8, pause_s=0) as clients:
            ends_at_s = time.monotonic() + SECONDS
            while time.monotonic() < ends_at_s:
                resident.append(metric(service, "process_resident_memory_bytes"))
                assert metric(service, "hourglass_model_memory_bytes") <= budget
                time.sleep(0.1)
        assert clients.failures == []
        assert clients.answers > MODELS
        evicted = metric(service, "hourglass_model_changes_total", 'change="evicted"')
    quarter = len(resident) // 4
    early, late = np.median(resident[quarter : 2 * quarter]), np.median(resident[-quarter:])
    record_property(
        "measured",
        f"{MODELS} artifacts in room for {FIT}, {SECONDS:g} s: {clients.answers} requests, {len(clients.failures)} "
        f"failed, {evicted} evictions; memory {early / 1e6:.0f} MB in the second quarter, {late / 1e6:.0f} in the last",
    )
    assert late <= early * 1.05


def metric(service: Running, name: str, label: str = "") -> int:
    lines = service.get("/metrics").text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@contextmanager
def nginx(folder: Path, ports: list[int]) -> Iterator[None]:
    """The committed configuration, on other ports."""
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    for committed, port in zip((8000, 8001, 8002), ports, strict=True):
        assert f"127.0.0.1:{committed}" in text
        text = text.replace(f"127.0.0.1:{committed}", f"127.0.0.1:{port}")
    folder.mkdir()
    (folder / "nginx.conf").write_text(text)
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_rolling_restarts_behind_nginx(
    store: Path, tmp_path: Path, running: Run, load: type[Load], record_property: Callable[[str, object], None]
) -> None:
    """Two replicas behind nginx, restarted in turn under 64 keep-alive clients: no client sees an error."""
    ports = free_ports(3)
    log = tmp_path / "log"

    def start(port: int) -> AbstractContextManager[Running]:
        return running(store, log.with_suffix(f".{port}"), port=port, HOURGLASS_DRAIN_SECONDS="1")

    replicas = {port: start(port) for port in ports[1:]}
    services = {port: replica.__enter__() for port, replica in replicas.items()}
    try:
        with nginx(tmp_path / "nginx", ports), load(ports[0], "/encode", BODY, is_good, pause_s=0.1) as clients:
            for restart in range(RESTARTS):
                port = ports[1 + restart % 2]
                before = clients.answers
                services[port].until(lambda before=before: clients.answers > before + 100, "answers")
                services[port].process.send_signal(signal.SIGTERM)
                assert services[port].process.wait(timeout=30) == 0
                replicas[port] = start(port)
                services[port] = replicas[port].__enter__()  # returns once /readyz is 200
        record_property(
            "measured",
            f"{RESTARTS} rolling restarts behind nginx: {clients.answers} requests, {len(clients.failures)} failed",
        )
        assert clients.failures == []
        assert clients.answers > 100 * RESTARTS
    finally:
        for replica in replicas.values():
            replica.__exit__(None, None, None)
