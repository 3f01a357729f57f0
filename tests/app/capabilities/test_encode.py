"""POST /encode over a real socket."""

from __future__ import annotations

import httpx
import numpy as np


def test_encode_answers_one_latent_per_item(client: httpx.Client) -> None:
    """Each item gets its latent vector, in order, and the answer names the model in body and header."""
    items = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32) * np.float32(0.9)
    answer = client.post("/encode?model=tiny:1", json={"instances": items.tolist()})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model"], body["version"], answer.headers["x-model"]) == ("tiny", 1, "tiny:1")
    assert [len(result["latent"]) for result in body["results"]] == [4, 4, 4]
    alone = client.post("/encode?model=tiny:1", json={"instances": [items[2].ravel().tolist()]}).json()
    np.testing.assert_allclose(alone["results"][0]["latent"], body["results"][2]["latent"], atol=1e-5)
