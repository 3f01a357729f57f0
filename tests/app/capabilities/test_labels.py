"""POST /sample with a label, over a real socket."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np

from app.artifacts.store import ArtifactRef
from app.settings import Settings


def test_a_label_chooses_the_class(
    serve: Callable[[Settings], AbstractContextManager[str]],
    write_artifact_named: Callable[..., ArtifactRef],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    """`label` is one of the model's labels, as text or number; none of them draws from all; others are refused."""
    write_artifact_named(tmp_path, "labelled", labels=("3", "7", "cat"))
    with serve(Settings(models_store=tmp_path)) as url, httpx.Client(base_url=url) as labelled:
        for label, value in ((7, 0.1), ("7", 0.1), ("cat", 0.2), (None, 0.5)):
            answer = labelled.post("/sample", json={"label": label, "count": 2})
            np.testing.assert_allclose([r["sample"] for r in answer.json()["results"]], value, atol=1e-6)
        refused = labelled.post("/sample", json={"label": 4})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_parameter")
        assert "3, 7, cat" in refused.json()["error"]
        assert labelled.get("/models/labelled").json()["labels"] == ["3", "7", "cat"]
    refused = client.post("/sample", json={"label": 3})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_parameter")
