"""POST /sample over a real socket."""

from __future__ import annotations

import httpx
import numpy as np
import pytest


@pytest.mark.parametrize(
    "body", [{"seed": 7}, {"seed": 7, "count": 5}, {"seed": 0, "temperature": 0.5}, {"seed": 2**53 - 1}]
)
def test_same_seed_gives_the_same_bytes(client: httpx.Client, body: dict) -> None:
    """A seed makes the answer reproducible byte for byte, and is told beside the results."""
    first, second = client.post("/sample", json=body), client.post("/sample", json=body)
    assert first.status_code == 200
    assert first.content == second.content
    assert first.json()["seed"] == body["seed"]
    assert len(first.json()["results"]) == body.get("count", 1)


@pytest.mark.parametrize("options", [{}, {"json": {}}, {"json": {"seed": None, "label": None}}, {"content": b""}])
def test_drawn_seed_is_told_and_reproduces(client: httpx.Client, options: dict) -> None:
    """Without a seed one is drawn, another each time; sent back, it gives the same samples."""
    first, other = client.post("/sample", **options).json(), client.post("/sample", **options).json()
    assert first["seed"] != other["seed"]
    assert client.post("/sample", json={"seed": first["seed"]}).json() == first


def test_samples_differ_from_each_other_and_between_seeds(client: httpx.Client) -> None:
    """No two samples of a request, and no two seeds, give the same picture."""
    samples = [
        str(result["sample"])
        for seed in (1, 2)
        for result in client.post("/sample", json={"seed": seed, "count": 256}).json()["results"]
    ]
    assert len(set(samples)) == 512


def test_first_samples_do_not_change_with_the_temperature_at_one(client: httpx.Client) -> None:
    """Temperature 1 is the default; 0 leaves nothing of the noise."""
    plain = client.post("/sample", json={"seed": 3}).content
    assert client.post("/sample", json={"seed": 3, "temperature": 1}).content == plain
    cold = client.post("/sample", json={"seed": 3, "temperature": 0}).json()["results"][0]["sample"]
    assert np.shape(cold) == (1, 8, 8)
    assert client.post("/sample", json={"seed": 3}).json()["results"][0]["sample"] != cold


def test_samples_are_the_decoded_noise_of_the_seed(client: httpx.Client) -> None:
    """The answer is the exported method's, of the noise that the seed draws."""
    generator = np.random.Generator(np.random.PCG64(5))
    u = generator.random(2, dtype=np.float32)
    eps = generator.standard_normal((2, 4), dtype=np.float32)
    decoded = client.post("/decode?model=tiny", json={"latents": (eps + u[:, np.newaxis]).tolist()}).json()["results"]
    sampled = client.post("/sample?model=tiny", json={"seed": 5, "count": 2}).json()["results"]
    for one, other in zip(sampled, decoded, strict=True):
        np.testing.assert_allclose(one["sample"], other["reconstruction"], atol=1e-5)
