"""The client against a real service: pictures and arrays, streams, retries; and the examples that use it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from hourglass_client import AsyncClient, Client, HourglassError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base_url(serve: Callable[[Settings], AbstractContextManager[str]]) -> Iterator[str]:
    with serve(Settings(models_store=ROOT / "models_store", log_format="json")) as url:
        yield url


def test_pictures_and_arrays_are_the_same(base_url: str) -> None:
    """A picture, its file, its bytes, its array and its numbers have one latent vector, in either client."""
    path = ROOT / "examples" / "digit-7.png"
    image = Image.open(path).convert("L").resize((28, 28))
    array = np.asarray(image)[np.newaxis]
    with Client(base_url) as client:
        forms = [image, array, array / np.float32(255), (array / np.float32(255)).tolist()]
        latents = [client.encode([form], model="mnist-conv") for form in forms]
        assert all((latent == latents[0]).all() for latent in latents)
        assert (client.encode([path]) == client.encode([path.read_bytes()])).all()
        assert client.decode(latents[0], model="mnist-conv").shape == (1, 1, 28, 28)
        assert client.reconstruct([path, image]).shape == (2, 1, 28, 28)
        assert client.denoise([path]).shape == (1, 1, 28, 28)
        shown, numbers = client.pictures("denoise", [path])[0], client.denoise([path])[0, 0]
        assert (np.asarray(shown) == np.rint(numbers * 255)).all()
        assert len(client.pictures("interpolate", [path, image], model="mnist-conv", steps=3)) == 3
        assert (client.sample(2, seed=1) == client.sample(2, seed=1)).all()
        verdict = client.anomaly_score([path], target_fpr=0.05)[0]
        assert verdict["target_fpr"] == 0.05
        mapped = client.anomaly_score([path], model="mnist-conv", heatmap="array", boxes=True)[0]
        assert mapped["heatmap"].shape == (28, 28)
        assert bool((mapped["heatmap"] > 1).any()) == bool(mapped["boxes"])
        assert client.anomaly_score([path], model="mnist-conv", heatmap="png")[0]["heatmap"].size == (28, 28)
        assert "target_fpr" in client.anomaly_score([path, image], fdr=0.1)[1]
        answers = list(client.bulk("anomaly-score", [path, b"no picture", image]))
        assert [answer["index"] for answer in answers] == [0, 1, 2]
        assert answers[1]["code"] == "image_not_decodable"
        with pytest.raises(HourglassError, match="404 model_not_found") as caught:
            client.encode([path], model="nobody")
        assert caught.value.request_id
        with pytest.raises(HourglassError, match="404 model_not_found"):
            list(client.bulk("encode", [path], model="nobody"))

    async def asynchronously() -> None:
        async with AsyncClient(base_url) as client:
            assert (await client.encode([image], model="mnist-conv") == latents[0]).all()
            assert (await client.anomaly_score([path], target_fpr=0.05))[0] == verdict
            assert (await client.pictures("denoise", [path]))[0].tobytes() == shown.tobytes()
            assert [answer["index"] async for answer in client.bulk("encode", [path, path])] == [0, 1]

    asyncio.run(asynchronously())


def test_retries_wait_as_long_as_they_are_told() -> None:
    """429 with Retry-After is tried again, an error that will not pass is not."""
    statuses = [429, 503, 200, 400]

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = statuses.pop(0)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(b'{"results": [{"latent": [1]}]}' if status == 200 else b'{"code": "x", "error": "y"}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            assert client.encode([[0.5]]).tolist() == [[1]]
            with pytest.raises(HourglassError, match="400 x: y"):
                client.encode([[0.5]])
        server.shutdown()
    assert not statuses


@pytest.mark.parametrize("name", ["score.py", "denoise_async.py", "browser.js"])
def test_examples_run(name: str, base_url: str, tmp_path: Path) -> None:
    """Each example does what it says against the shipped models."""
    if name.endswith(".js"):
        if shutil.which("node") is None:
            pytest.skip("node is not installed")
        command = ["node", ROOT / "examples" / name, ROOT / "examples" / "digit-7.png", base_url]
    else:
        text = (ROOT / "examples" / name).read_text().replace("Client()", f"Client({base_url!r})")
        text = text.replace("__file__", repr(str(ROOT / "examples" / name)))
        (tmp_path / name).write_text(text)
        command = [sys.executable, tmp_path / name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert name == "denoise_async.py" or "p = " in done.stdout
