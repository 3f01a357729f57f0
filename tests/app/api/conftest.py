"""A real server whose application the test can reach: to hold its device, to watch it load, to break it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from app.api.connections import HttpConnection
from app.main import create_app
from app.settings import Settings


@dataclass
class Service:
    """A running service: its application, a client, its host and port."""

    app: FastAPI
    client: httpx.Client
    address: tuple[str, int]
    threads: list[threading.Thread] = field(default_factory=list)

    @contextmanager
    def held_device(self) -> Iterator[None]:
        """The device's worker thread is busy until the block ends: whatever is asked meanwhile waits."""
        holding, release = threading.Event(), threading.Event()
        self.app.state.catalog._workers[0].submit(lambda: (holding.set(), release.wait(30)))
        assert holding.wait(30)
        try:
            yield
        finally:
            release.set()

    def post_aside(self, url: str, **options: Any) -> Callable[[], httpx.Response]:
        """Sends a request from another thread; calling the result waits for the answer."""
        answers: list[httpx.Response] = []

        def send() -> None:
            with httpx.Client(base_url=self.client.base_url, timeout=30) as client:
                answers.append(client.post(url, **options))

        thread = threading.Thread(target=send)
        thread.start()
        self.threads.append(thread)

        def answer() -> httpx.Response:
            thread.join(30)
            return answers[0]

        return answer

    def until(self, happened: Callable[[], bool]) -> None:
        """Returns once something is true of the service; asks it for nothing but signs of life meanwhile."""
        for _ in range(10_000):
            if happened():
                return
            self.client.get("/livez")
        raise AssertionError("it never happened")

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the service's metrics, 0 if there is none yet."""
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0


@contextmanager
def run_service(settings: Settings, *, wait: bool = True, end: Callable[[], None] = lambda: None) -> Iterator[Service]:
    app = create_app(settings, end=end)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, http=HttpConnection)
    )
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        address = server.servers[0].sockets[0].getsockname()[:2]
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=30) as client:
            service = Service(app, client, address)
            while wait and not client.get("/startupz").json()["done"]:
                pass
            yield service
            for aside in service.threads:
                aside.join(30)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def run_app() -> Callable[..., AbstractContextManager[Service]]:
    """A context manager that runs a `Service` for some settings; with wait=False its artifacts may still load."""
    return run_service


@pytest.fixture(scope="module")
def service(store: Path) -> Iterator[Service]:
    """A service over `store` with small limits."""
    settings = Settings(
        models_store=store, log_format="json", max_body_bytes=200_000, max_queue_rows=40, max_image_pixels=10_000
    )
    with run_service(settings) as service:
        yield service


@pytest.fixture(scope="session")
def items() -> np.ndarray:
    """Ten harmless items, (10, 1, 8, 8)."""
    return (np.random.default_rng(0).random((10, 1, 8, 8)) * 0.9).astype(np.float32)
