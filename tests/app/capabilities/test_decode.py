"""POST /decode over a real socket."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from app.codecs.npy import encode_npy

LATENTS = np.random.default_rng(4).normal(size=(3, 4)).astype(np.float32)


def test_encoding_then_decoding_is_reconstructing(client: httpx.Client) -> None:
    """What /decode makes of /encode's latents is what /reconstruct answers."""
    items = {"instances": (np.random.default_rng(0).random((3, 64)) * 0.9).tolist()}
    latents = [result["latent"] for result in client.post("/encode?model=tiny", json=items).json()["results"]]
    decoded = client.post("/decode?model=tiny", json={"latents": latents}).json()["results"]
    direct = client.post("/reconstruct?model=tiny", json=items).json()["results"]
    for one, other in zip(decoded, direct, strict=True):
        np.testing.assert_allclose(one["reconstruction"], other["reconstruction"], atol=1e-5)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4"])
def test_npy_latents_are_json_latents(client: httpx.Client, dtype: str) -> None:
    """The same latents as npy and as JSON have the same answer."""
    as_json = client.post("/decode", json={"latents": LATENTS.tolist()})
    as_npy = client.post(
        "/decode", content=encode_npy(LATENTS.astype(dtype)), headers={"content-type": "application/x-npy"}
    )
    assert as_json.content == as_npy.content
    assert np.shape(as_json.json()["results"][0]["reconstruction"]) == (1, 8, 8)


def test_answer_may_be_npy_or_a_picture(client: httpx.Client) -> None:
    """The same reconstructions as npy and, rounded to pixels, as PNG."""
    array = np.load(
        io.BytesIO(
            client.post(
                "/decode", json={"latents": LATENTS[:1].tolist()}, headers={"accept": "application/x-npy"}
            ).content
        )
    )
    assert (array.shape, array.dtype) == ((1, 1, 8, 8), np.float32)
    png = client.post("/decode", json={"latents": LATENTS[:1].tolist()}, headers={"accept": "image/png"})
    with Image.open(io.BytesIO(png.content), formats=["PNG"]) as image:
        assert (np.asarray(image) == np.rint(array[0, 0] * 255)).all()
