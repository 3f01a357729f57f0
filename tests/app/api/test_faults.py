"""Faults put in while requests are in flight: everyone is answered in time, and readiness tells the truth throughout.

`make faults` prints how long the answers took.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import numpy as np
import pytest
import torch

from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef
from app.catalog import Catalog
from app.health import Health
from app.inference.loaded_model import LoadedModel, is_sticky
from app.served_model import labels_of
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service

ITEM = {"instances": [[0.25] * 64]}
IN_FLIGHT = 16
ANSWERED_WITHIN_S = float(os.environ.get("ANSWERED_WITHIN_S", "5"))
"""One second with `make faults`; among other tests the machine may have other things to do."""
STALL_S = 1.0

Forward = Callable[[LoadedModel, Capability, Any], Any]


@pytest.fixture
def faulty(
    tmp_path: Path, run_app: Callable[..., Any], write_artifact_named: Callable[..., ArtifactRef]
) -> Iterator[tuple[Service, Path]]:
    """A service whose one model is required, and its store."""
    write_artifact_named(tmp_path, "tiny")
    settings = Settings(
        models_store=tmp_path,
        log_format="json",
        required_models=("tiny",),
        ready_within_seconds=5,
        store_poll_seconds=0.05,
    )
    with run_app(settings) as service:
        yield service, tmp_path


class Flight:
    """Requests in flight; `land` waits for their answers and gives each one's status and when it came, in seconds
    since `fault`.
    """

    def __init__(self, service: Service, path: str = "/encode", body: object = ITEM) -> None:
        self.fault_s = 0.0
        self._answers: list[tuple[int, float]] = []
        self._threads = [threading.Thread(target=self._ask, args=(service, path, body)) for _ in range(IN_FLIGHT)]
        for thread in self._threads:
            thread.start()

    def _ask(self, service: Service, path: str, body: object) -> None:
        with httpx.Client(base_url=service.client.base_url, timeout=20) as client:
            status = client.post(path, json=body).status_code
        self._answers.append((status, time.monotonic()))

    def fault(self) -> None:
        self.fault_s = time.monotonic()

    def land(self) -> tuple[set[int], float]:
        """The statuses, and the longest time from the fault to an answer."""
        for thread in self._threads:
            thread.join(20)
        assert len(self._answers) == IN_FLIGHT, "a request hangs"
        return {status for status, _ in self._answers}, max(0.0, *(at - self.fault_s for _, at in self._answers))


@contextmanager
def forward_is(monkeypatch: pytest.MonkeyPatch, change: Callable[[Forward], Forward]) -> Iterator[None]:
    """Every forward pass goes through something else, as long as the block lasts."""
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "forward", change(LoadedModel.forward))
        yield


def waiting(service: Service, rows: int) -> Callable[[], bool]:
    """Whether so many rows of requests wait or left for the device."""
    batcher = service.app.state.catalog.batcher

    def in_flight() -> bool:
        running = [part for batches in list(batcher._running.values()) for batch in batches for part in batch]
        asked = [part for part in running if labels_of(part.request.lane) is not None]
        return batcher.waiting_rows + sum(map(len, asked)) >= rows

    return in_flight


def became(service: Service, ready: bool) -> float:
    """Seconds until /readyz says so."""
    started = time.monotonic()
    service.until(lambda: (service.client.get("/readyz").status_code == 200) is ready)
    return time.monotonic() - started


def test_exception_in_a_forward(
    faulty: tuple[Service, Path], monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]
) -> None:
    """A model that raises for everyone fails their requests at once, is not ready, and is ready when it works again."""
    service, _ = faulty

    def raises(_: Forward) -> Forward:
        def forward(*_: Any) -> Any:
            raise RuntimeError("injected")

        return forward

    with forward_is(monkeypatch, raises):
        with service.held_device():
            flight = Flight(service)
            service.until(waiting(service, IN_FLIGHT))
            flight.fault()
        statuses, longest_s = flight.land()
        not_ready_s = became(service, ready=False)
        assert "its last forward pass failed" in service.client.get("/readyz").text
        assert service.client.get("/livez").status_code == 200
    ready_s = became(service, ready=True)
    record_property("measured", told("exception in a forward", longest_s, not_ready_s, ready_s))
    assert statuses == {500}
    assert max(longest_s, not_ready_s) <= ANSWERED_WITHIN_S
    assert service.client.post("/encode", json=ITEM).status_code == 200


def test_one_bad_item_is_no_illness(faulty: tuple[Service, Path], record_property: Callable[..., None]) -> None:
    """An item that makes the model raise fails alone, and the service stays ready."""
    service, _ = faulty
    with service.held_device():
        good = Flight(service)
        service.until(waiting(service, IN_FLIGHT))
        bad = service.post_aside("/encode", json={"instances": [[0.9375] + [0.25] * 63]})
        service.until(waiting(service, IN_FLIGHT + 1))
        good.fault()
    statuses, longest_s = good.land()
    assert (statuses, bad().status_code) == ({200}, 500)
    assert all(service.client.get("/readyz").status_code == 200 for _ in range(50))
    record_property("measured", told("exception for one item", longest_s))
    assert longest_s <= ANSWERED_WITHIN_S


def test_out_of_memory(
    faulty: tuple[Service, Path], monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]
) -> None:
    """Batches that do not fit are halved, the size is remembered, everyone is answered and the service stays ready."""
    service, _ = faulty

    def small(forward: Forward) -> Forward:
        def limited(loaded: LoadedModel, capability: Capability, arguments: Any) -> Any:
            if len(arguments[0]) > 2:
                raise torch.OutOfMemoryError("injected")
            return forward(loaded, capability, arguments)

        return limited

    with forward_is(monkeypatch, small):
        with service.held_device():
            flight = Flight(service)
            service.until(waiting(service, IN_FLIGHT))
            flight.fault()
        statuses, longest_s = flight.land()
        assert service.client.get("/readyz").status_code == 200
    lane = service.app.state.catalog.default_version("tiny").lanes[Capability.ENCODE]
    record_property("measured", told("out of memory", longest_s))
    assert statuses == {200}
    assert lane.max_batch_size <= 2
    assert longest_s <= ANSWERED_WITHIN_S


@pytest.mark.parametrize(("within_s", "stall_s"), [(10.0, 30.0), (0.8, 0.2), (0.02, 60.0), (60.0, 0.01)])
def test_short_limits_are_looked_at_as_often_as_they_need(within_s: float, stall_s: float) -> None:
    """The event loop turns several times within a stall's limit, or the watchdog would take idling for one, and a
    canary runs several times within the time in which a model must have run.
    """
    health = Health(cast(Catalog, None), within_s=within_s, stall_s=stall_s, end=lambda: None)
    assert health._look_every_s + health._tend_every_s <= stall_s / 2
    assert health._tend_every_s <= within_s / 8


def test_stalled_forward(
    tmp_path: Path,
    run_app: Callable[..., Any],
    write_artifact_named: Callable[..., ArtifactRef],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[..., None],
) -> None:
    """A forward that never returns: at the watchdog's limit all are told, readiness is off, and the process ends."""
    write_artifact_named(tmp_path, "tiny")
    settings = Settings(models_store=tmp_path, log_format="json", stall_seconds=STALL_S)
    release, ended = threading.Event(), threading.Event()

    def stalls(_: Forward) -> Forward:
        def forward(*_: Any) -> Any:
            release.wait(30)
            raise RuntimeError("released")

        return forward

    with run_app(settings, end=ended.set) as service:
        try:
            with forward_is(monkeypatch, stalls):
                flight = Flight(service)
                flight.fault()
                statuses, longest_s = flight.land()
                after = service.client.post("/encode", json=ITEM)
                ready, live = service.client.get("/readyz"), service.client.get("/livez")
                assert ended.wait(5)
                ended_s = time.monotonic() - flight.fault_s
        finally:
            release.set()
    record_property("measured", told("stalled forward", longest_s, ended_s=ended_s, limit_s=STALL_S))
    assert (statuses, after.status_code, after.json()["code"]) == ({503}, 503, "not_ready")
    assert (ready.status_code, live.status_code) == (503, 503)
    assert "a forward pass is not over after 1 s" in ready.text
    assert longest_s <= STALL_S + ANSWERED_WITHIN_S


def test_lost_device(
    tmp_path: Path,
    run_app: Callable[..., Any],
    write_artifact_named: Callable[..., ArtifactRef],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[..., None],
) -> None:
    """A sticky device error answers everyone in flight and in the queue at once and ends the process."""
    write_artifact_named(tmp_path, "tiny")
    ended = threading.Event()

    def asserts(_: Forward) -> Forward:
        def forward(*_: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        return forward

    settings = Settings(models_store=tmp_path, log_format="json", max_batch_size=4)
    with run_app(settings, end=ended.set) as service, forward_is(monkeypatch, asserts):
        with service.held_device():
            flight = Flight(service)
            service.until(waiting(service, IN_FLIGHT))
            flight.fault()
        statuses, longest_s = flight.land()
        not_ready_s = became(service, ready=False)
        assert ended.wait(5)
    record_property("measured", told("lost device", longest_s, not_ready_s))
    assert statuses == {503}
    assert max(longest_s, not_ready_s) <= ANSWERED_WITHIN_S


def test_executor_thread_killed(faulty: tuple[Service, Path], record_property: Callable[..., None]) -> None:
    """A device's thread that dies is replaced; what it ran fails, what waited is answered, and the service is ready."""
    service, _ = faulty
    (worker,) = service.app.state.catalog.threads
    victim = worker._thread
    with service.held_device():
        flight = Flight(service)
        service.until(waiting(service, IN_FLIGHT))
        exception = ctypes.py_object(SystemExit)
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), exception) == 1
        flight.fault()
    statuses, longest_s = flight.land()
    ready_s = became(service, ready=True)
    record_property("measured", told("executor thread killed", longest_s, ready_s=ready_s))
    assert statuses <= {200, 500}
    assert longest_s <= ANSWERED_WITHIN_S
    assert service.client.post("/encode", json=ITEM).status_code == 200


def test_dead_thread_is_replaced(faulty: tuple[Service, Path], record_property: Callable[..., None]) -> None:
    """Where the thread ends between two jobs, nothing that waits is lost."""
    service, _ = faulty
    (worker,) = service.app.state.catalog.threads
    victim = worker._thread
    with service.held_device():
        flight = Flight(service)
        service.until(waiting(service, IN_FLIGHT))
        worker._jobs.put(None)  # what ends it
        flight.fault()
    statuses, longest_s = flight.land()
    victim.join(20)
    service.until(lambda: worker.is_alive and worker._thread is not victim)
    record_property("measured", told("executor thread ended", longest_s))
    assert statuses == {200}
    assert longest_s <= ANSWERED_WITHIN_S


def truncate(path: Path) -> None:
    data = (path / "model.pt").read_bytes()
    (path / "model.pt").write_bytes(data[: len(data) // 2])


def edit_hash(path: Path) -> None:
    document = json.loads((path / "manifest.json").read_text())
    document["files"]["model.pt"]["sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(document))


def change_vectors(path: Path) -> None:
    import hashlib

    with np.load(path / "self_test.npz") as vectors:
        changed = {key: array + (key == "encode/out/latent") for key, array in vectors.items()}
    np.savez(path / "self_test.npz", **changed)
    data = (path / "self_test.npz").read_bytes()
    document = json.loads((path / "manifest.json").read_text())
    document["files"]["self_test.npz"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "manifest.json").write_text(json.dumps(document))


ARTIFACT_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (lambda path: shutil.rmtree(path.parent), "its folder is gone"),
    "truncated": (truncate, "model.pt: expected"),
    "wrong hash": (edit_hash, "model.pt: sha256: expected"),
    "wrong self-test": (change_vectors, "self-test: encode: latent is off by 1"),
    "newer schema": (
        lambda path: (path / "manifest.json").write_text('{"schema_version": 2}'),
        "schema_version: expected at most 1",
    ),
}


@pytest.mark.parametrize("fault", ARTIFACT_FAULTS)
def test_artifact_damaged_while_serving(
    faulty: tuple[Service, Path], fault: str, record_property: Callable[..., None]
) -> None:
    """Whatever happens to the files of what is served, it serves on from memory, ready, and says what is wrong."""
    service, store = faulty
    harm, reason = ARTIFACT_FAULTS[fault]
    with service.held_device():
        flight = Flight(service)
        service.until(waiting(service, IN_FLIGHT))
        harm(store / "tiny" / "1")
        flight.fault()
    statuses, longest_s = flight.land()

    def told_reason() -> bool:
        (version,) = service.client.get("/models/tiny").json()["versions"]
        assert version["state"] == "ready"
        return reason in (version["reason"] or "")

    service.until(told_reason)
    record_property("measured", told(f"artifact {fault}", longest_s))
    assert statuses == {200}
    assert longest_s <= ANSWERED_WITHIN_S
    assert service.client.get("/readyz").status_code == 200
    assert service.client.post("/encode", json=ITEM).headers["x-model"] == "tiny:1"
    if fault != "deleted":
        assert service.metric("hourglass_model_changes_total", model="tiny", change="refused") == 1


@pytest.mark.parametrize("fault", [fault for fault in ARTIFACT_FAULTS if fault != "deleted"])
def test_a_bad_new_version_is_refused_and_the_old_serves_on(
    faulty: tuple[Service, Path], fault: str, write_artifact_named: Callable[..., ArtifactRef], tmp_path_factory: Any
) -> None:
    """A damaged new version is refused with state, reason and metric; the old one answers; mended, the new one does."""
    service, store = faulty
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(store / "tiny", elsewhere / "tiny")
    good = write_artifact_named(elsewhere, "tiny", seed=5).path
    bad = elsewhere / "bad"
    shutil.copytree(good, bad)
    ARTIFACT_FAULTS[fault][0](bad)
    shutil.move(bad, store / "tiny" / "2")
    service.until(lambda: version_state(service, 2) == "refused")
    assert service.client.post("/encode", json=ITEM).headers["x-model"] == "tiny:1"
    assert service.metric("hourglass_model_changes_total", model="tiny", change="refused") == 1
    assert service.metric("hourglass_model_state", model="tiny", version="2", state="refused") == 1
    assert service.client.get("/readyz").status_code == 200
    for file in good.iterdir():
        shutil.copy(file, store / "tiny" / "2" / file.name)
    service.until(lambda: version_state(service, 2) == "ready")
    assert service.client.post("/encode", json=ITEM).headers["x-model"] == "tiny:2"


def version_state(service: Service, number: int) -> str | None:
    entries = service.client.get("/models/tiny").json()["versions"]
    return next((entry["state"] for entry in entries if entry["version"] == number), None)


def test_overload_alone_stays_ready(
    tmp_path: Path, run_app: Callable[..., Any], write_artifact_named: Callable[..., ArtifactRef], monkeypatch: Any
) -> None:
    """With a full queue that answers 429, the service is ready all the while, also by a model that nobody asks."""
    write_artifact_named(tmp_path, "busy")
    write_artifact_named(tmp_path, "silent")

    def slow(forward: Forward) -> Forward:
        def slower(*arguments: Any) -> Any:
            time.sleep(0.02)  # the load itself
            return forward(*arguments)

        return slower

    settings = Settings(
        models_store=tmp_path,
        log_format="json",
        required_models=("silent",),
        max_queue_rows=IN_FLIGHT // 2,
        max_batch_size=1,
        ready_within_seconds=1.5,
    )
    with run_app(settings) as service, forward_is(monkeypatch, slow):
        statuses: set[int] = set()
        until_s = time.monotonic() + 2.5
        while time.monotonic() < until_s:
            flight = Flight(service, "/encode?model=busy", {"instances": [[0.25] * 64] * 2})
            assert service.client.get("/readyz").json() == {"ready": True, "reasons": []}
            statuses |= flight.land()[0]
    assert statuses == {200, 429}


def test_half_written_folders_are_never_read(
    faulty: tuple[Service, Path], write_artifact_named: Callable[..., ArtifactRef], tmp_path_factory: Any
) -> None:
    """A folder that still changes is not taken up: no refusal, no state, until it has been whole for two looks."""
    service, store = faulty
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(store / "tiny", elsewhere / "tiny")
    good = write_artifact_named(elsewhere, "tiny", seed=5).path
    target = store / "tiny" / "2"
    target.mkdir()
    catalog = service.app.state.catalog
    for file in sorted(good.iterdir()):
        (target / file.name).write_bytes(file.read_bytes()[:10])
        asyncio.run_coroutine_threadsafe(catalog._look_again(), loop_of(service)).result(10)
        (target / file.name).write_bytes(file.read_bytes())
    service.until(lambda: version_state(service, 2) == "ready")
    assert service.client.post("/encode", json=ITEM).headers["x-model"] == "tiny:2"


def loop_of(service: Service) -> Any:
    return service.app.state.health._loop


@pytest.mark.parametrize(
    ("error", "sticky"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: invalid argument"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
        (ValueError("device-side assert"), False),
    ],
)
def test_what_is_sticky(error: Exception, sticky: bool) -> None:
    """Errors after which the device runs nothing any more are told from those that one batch alone has."""
    assert is_sticky(error) is sticky


def told(
    fault: str,
    longest_s: float,
    not_ready_s: float | None = None,
    ready_s: float | None = None,
    ended_s: float | None = None,
    limit_s: float | None = None,
) -> str:
    """One line of `make faults`."""
    parts = [f"{fault:26} {IN_FLIGHT} in flight answered within {longest_s * 1000:6.0f} ms"]
    parts += [f"not ready after {not_ready_s * 1000:.0f} ms"] if not_ready_s is not None else []
    parts += [f"ready again after {ready_s * 1000:.0f} ms"] if ready_s is not None else []
    parts += [f"process ended after {ended_s * 1000:.0f} ms"] if ended_s is not None else []
    parts += [f"watchdog's limit {limit_s * 1000:.0f} ms"] if limit_s is not None else []
    return ", ".join(parts)
