"""What all tests share: a real server on a loopback socket, and real, tiny artifacts, trained once per run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.main import create_app
from app.settings import Settings

TINY_SETTINGS = ("latent_dim=4", "epochs=1", "ema_decay=0")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, not to be written to, of artifacts 1×8×8 with latent_dim 4, trained for an epoch on digits.

    `tiny-variational` can encode, decode, reconstruct, anomaly_score and sample; `tiny-denoising` can denoise instead
    of sample.
    """
    import torch

    from training.data import load_dataset
    from training.presets import get_preset, override
    from training.progress import Silent
    from training.run import make_artifact

    store = tmp_path_factory.mktemp("tiny_store")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    digits = load_dataset("digits", Path("unused"))
    tiny = (("tiny-variational", "vae", "hidden_sizes=[16]"), ("tiny-denoising", "denoising", "channels=[8]"))
    for name, preset, width in tiny:
        make_artifact(
            override(get_preset(preset), [*TINY_SETTINGS, width]),
            digits,
            name=name,
            store=store,
            seed=0,
            device=torch.device("cpu"),
            progress=Silent(),
        )
    torch.set_num_threads(threads)
    return store


@contextmanager
def run_server(settings: Settings) -> Iterator[str]:
    """A real server in a thread; yields its base URL once every artifact of its store is loaded or refused."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None, access_log=False, ws="none")
    )
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        base_url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=base_url) as client:
            while not client.get("/startupz").json()["done"]:
                time.sleep(0.01)
        yield base_url
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def serve() -> Callable[[Settings], AbstractContextManager[str]]:
    """A context manager that runs a real server for some settings and gives its base URL."""
    return run_server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells what tests measured, those that call `record_property("measured", "…")`."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    lines = [line for report in reports for key, line in report.user_properties if key == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(str(line))
