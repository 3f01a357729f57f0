"""POST /encode over a real socket."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np

from app.artifacts.store import ArtifactRef
from app.settings import Settings


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


def test_projection_is_the_place_on_the_models_map(client: httpx.Client) -> None:
    """With project=true each item has [x, y] beside its latent; the map's known points are the model's own."""
    item = (np.random.default_rng(1).random((1, 8, 8)) * 0.9).tolist()
    result = client.post("/encode?project=true", json={"instances": [item]}).json()["results"][0]
    np.testing.assert_allclose(result["projection"], np.array(result["latent"][:2]) - 1, atol=1e-5)  # mean 1, identity
    assert "projection" not in client.post("/encode", json={"instances": [item]}).json()["results"][0]
    known = client.get("/models/tiny/projection").json()
    assert (known["points"], known["labels"], known["method"]) == ([[0, 0]] * 3, [None] * 3, "hand")
    assert client.get("/models/nobody/projection").status_code == 404


def test_projection_of_a_model_without_a_map_is_refused(
    serve: Callable[[Settings], AbstractContextManager[str]],
    write_artifact_named: Callable[..., ArtifactRef],
    tmp_path: Path,
) -> None:
    """A model without a map says so, with a 409."""
    write_artifact_named(tmp_path, "mapless", projection=None)
    with serve(Settings(models_store=tmp_path)) as url:
        answer = httpx.post(f"{url}/encode?project=true", json={"instances": [[0.0] * 64]})
        assert (answer.status_code, answer.json()["code"]) == (409, "capability_not_supported")
        assert httpx.get(f"{url}/models/mapless/projection").status_code == 409
