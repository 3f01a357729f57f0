"""The shipped artifacts over a real socket, with real digits: what a caller of the contract sees."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef, list_artifacts, read_artifact
from app.inference.loaded_model import LoadedModel
from app.settings import Settings

ROOT = Path(__file__).parents[2]
STORE = ROOT / "models_store"
SHIPPED = list(list_artifacts(STORE))
DIGIT = ROOT / "examples" / "digit-7.png"  # a 28×28 grey MNIST test picture
PHOTO = ROOT / "examples" / "digit-photo.jpg"  # another size, colour, dark on light
ITEM_ROUTES = {
    Capability.ENCODE: ("/encode", "latent"),
    Capability.RECONSTRUCT: ("/reconstruct", "reconstruction"),
    Capability.DENOISE: ("/denoise", "denoised"),
    Capability.ANOMALY_SCORE: ("/anomaly-score", "score"),
}


@pytest.fixture(scope="module")
def base_url(serve: Callable[[Settings], AbstractContextManager[str]]) -> Iterator[str]:
    """Base URL of a real server over models_store/."""
    with serve(Settings(models_store=STORE)) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[httpx.Client]:
    """A client of the server over models_store/."""
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


def load(ref: ArtifactRef) -> LoadedModel:
    """The artifact's module on the CPU."""
    return LoadedModel.load(read_artifact(ref), torch.device("cpu"))


def digit() -> np.ndarray:
    """The example digit as the models take it, (1, 28, 28)."""
    return np.asarray(Image.open(DIGIT), dtype=np.float32)[np.newaxis] / np.float32(255)


def arguments(loaded: LoadedModel, capability: Capability, count: int) -> list[np.ndarray]:
    """`count` rows of random arguments for a method, values in the item's range."""
    generator = np.random.default_rng(0)
    specs = loaded.manifest.capabilities[capability].inputs
    return [generator.random((count, *spec.shape), dtype=np.float32) for spec in specs]


def test_the_four_models_are_shipped() -> None:
    """The store ships a model for each job, conv being the default for scores."""
    assert {ref.name for ref in SHIPPED} >= {"mnist-basic", "mnist-conv", "mnist-denoising", "mnist-variational"}
    manifests = {ref.name: read_artifact(ref).manifest for ref in SHIPPED}
    assert [name for name, m in manifests.items() if Capability.ANOMALY_SCORE in m.default_for] == ["mnist-conv"]
    for ref in SHIPPED:
        assert len(read_artifact(ref).model) <= 4_000_000


@pytest.mark.parametrize("ref", SHIPPED, ids=str)
def test_every_route_answers_with_a_digit_and_a_photo(client: httpx.Client, ref: ArtifactRef) -> None:
    """Each capability of each shipped artifact answers, for an exact picture and for one of another size and mode."""
    manifest = read_artifact(ref).manifest
    for capability in manifest.capabilities.keys() & ITEM_ROUTES.keys():
        route, field = ITEM_ROUTES[capability]
        exact = client.post(f"{route}?model={ref.name}", files={"file": DIGIT.read_bytes()})
        assert exact.status_code == 200, exact.text
        assert exact.headers["x-model"] == str(ref)
        numbers = client.post(f"{route}?model={ref.name}", json={"instances": [digit().tolist()]})
        assert exact.content == numbers.content  # the picture and its numbers are the same item
        other = client.post(f"{route}?model={ref.name}", files={"photo": PHOTO.read_bytes()})
        assert other.status_code == 200, other.text
        assert other.json()["results"][0][field] != exact.json()["results"][0][field]
    if Capability.DECODE in manifest.capabilities:
        latent = client.post(f"/encode?model={ref.name}", files={"file": DIGIT.read_bytes()}).json()["results"][0]
        decoded = client.post(f"/decode?model={ref.name}", json={"latents": [latent["latent"]]}).json()["results"][0]
        whole = client.post(f"/reconstruct?model={ref.name}", files={"file": DIGIT.read_bytes()}).json()["results"][0]
        np.testing.assert_allclose(decoded["reconstruction"], whole["reconstruction"], atol=1e-5)
        assert np.shape(decoded["reconstruction"]) == (1, 28, 28)


def test_a_dark_on_light_photo_is_read_as_the_same_digit(client: httpx.Client) -> None:
    """A large colour picture of a dark digit on light ground reconstructs nearly as well as the digit itself does."""
    photo = client.post("/reconstruct", files={"file": PHOTO.read_bytes()}).json()["results"][0]
    upside = client.post("/reconstruct?invert=false", files={"file": PHOTO.read_bytes()}).json()["results"][0]
    assert photo["reconstruction_error"] < 0.02 < upside["reconstruction_error"]


def test_pictures_come_back_as_pictures(client: httpx.Client) -> None:
    """PNG, base64 PNG and npy answers carry what the JSON answer carries."""
    files = {"file": DIGIT.read_bytes()}
    numbers = np.array(client.post("/reconstruct", files=files).json()["results"][0]["reconstruction"])
    pixels = np.clip(np.rint(numbers * 255), 0, 255).astype(np.uint8)[0]
    png = client.post("/reconstruct", files=files, headers={"Accept": "image/png"})
    assert png.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.content))), pixels)
    encoded = client.post("/reconstruct?images=png", files=files).json()["results"][0]["reconstruction"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), pixels)
    npy = client.post("/reconstruct", files=files, headers={"Accept": "application/x-npy"})
    np.testing.assert_array_equal(np.load(io.BytesIO(npy.content))[0], numbers.astype(np.float32))


@pytest.mark.parametrize("ref", SHIPPED, ids=str)
def test_batched_equals_single(ref: ArtifactRef) -> None:
    """For every method of every artifact a row's answer does not depend on its neighbours, within 1e-5."""
    loaded = load(ref)
    for capability in loaded.manifest.capabilities:
        most = loaded.manifest.max_batch_size
        rows = list(zip(*arguments(loaded, capability, most), strict=True))
        single = [row for start in range(14) for row in loaded.run(capability, rows[start : start + 1])]
        for size in sorted({2, 4, 7, 8, 16, 32, 64, 128, most}):
            for got, want in zip(loaded.run(capability, rows[:size]), single, strict=False):
                assert not isinstance(got, Exception)
                assert not isinstance(want, Exception)
                for one, other in zip(got, want, strict=True):
                    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ref", SHIPPED, ids=str)
def test_the_served_model_equals_the_trained_one(ref: ArtifactRef) -> None:
    """Every shipped artifact reproduces its self-test vectors on this machine."""
    loaded = load(ref)
    worst = loaded.self_test(read_artifact(ref))
    assert worst.keys() == loaded.manifest.capabilities.keys()


def test_a_seed_gives_the_same_sample(base_url: str) -> None:
    """The same seed gives the same bytes alone, and the same numbers within 1e-5 amid 64 concurrent others."""

    async def scene() -> None:
        limits = httpx.Limits(max_connections=80)
        async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=limits) as client:
            alone = await client.post("/sample", json={"count": 3, "seed": 42})
            again = await client.post("/sample", json={"count": 3, "seed": 42})
            assert alone.content == again.content
            answers = await asyncio.gather(
                *(client.post("/sample", json={"count": 2, "seed": seed}) for seed in range(64)),
                client.post("/sample", json={"count": 3, "seed": 42}),
            )
            assert all(answer.status_code == 200 for answer in answers)
            np.testing.assert_allclose(samples(answers[-1]), samples(alone), rtol=0, atol=1e-5)
            drawn = await client.post("/sample")
            repeated = await client.post("/sample", json={"seed": drawn.json()["seed"]})
            assert drawn.content == repeated.content

    def samples(answer: httpx.Response) -> np.ndarray:
        return np.array([result["sample"] for result in answer.json()["results"]])

    asyncio.run(scene())


def test_five_hundred_requests_share_forward_passes(base_url: str) -> None:
    """500 concurrent requests get 500 right answers, each its own, in fewer forward passes than requests."""
    items = np.random.default_rng(1).random((500, 784), dtype=np.float32)
    bodies = [json.dumps({"instances": [item.tolist()]}) for item in items]
    (ref,) = [ref for ref in SHIPPED if ref.name == "mnist-basic"]
    expected = load(ref).forward(Capability.ENCODE, [items.reshape(-1, 1, 28, 28)])[0]

    async def scene() -> tuple[list[httpx.Response], float]:
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=limits) as client:
            before = await batches(client)
            answers = await asyncio.gather(*(client.post("/encode?model=mnist-basic", content=body) for body in bodies))
            return answers, await batches(client) - before

    async def batches(client: httpx.AsyncClient) -> float:
        name = 'hourglass_batch_rows_count{capability="encode",model="mnist-basic",version="1"}'
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    answers, passes = asyncio.run(scene())
    assert [answer.status_code for answer in answers] == [200] * 500
    found: list[Any] = [answer.json()["results"][0]["latent"] for answer in answers]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert 0 < passes < 500
