"""Model control over HTTP: load, unload, roll back, aliases; in one process and in several."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.artifacts.store import ArtifactRef
from app.settings import Settings

ITEM = {"instances": [[0.25] * 64]}
KEY = {"authorization": "Bearer key"}


def write_keys(folder: Path) -> Path:
    path = folder / "keys"
    path.write_text(f"operator infer,admin,metrics sha256:{hashlib.sha256(b'key').hexdigest()}\n")
    return path


@pytest.fixture
def admin(
    tmp_path: Path, run_app: Callable[..., Any], write_artifact_named: Callable[..., ArtifactRef]
) -> Iterator[tuple[httpx.Client, Path]]:
    """A client that may do anything, and the store of its service: `tiny` in the versions 1 to 3."""
    store = tmp_path / "store"
    for seed in range(3):
        write_artifact_named(store, "tiny", seed=seed)
    settings = Settings(
        models_store=store, log_format="json", api_keys_file=write_keys(tmp_path), store_poll_seconds=0.02
    )
    with run_app(settings) as service:
        service.client.headers.update(KEY)
        yield service.client, store


def states(client: httpx.Client) -> dict[int, str]:
    return {entry["version"]: entry["state"] for entry in client.get("/models/tiny").json()["versions"]}


def answering(client: httpx.Client, model: str = "tiny") -> str:
    answer = client.post(f"/encode?model={model}", json=ITEM)
    return answer.headers.get("x-model") or answer.json()["code"]


def until(happened: Callable[[], bool]) -> None:
    assert any(happened() for _ in range(3000)), "it never happened"


def test_rollback_and_back(admin: tuple[httpx.Client, Path]) -> None:
    """Rollback lets the version before answer, a version that is named stays with it, load ends both."""
    client, _ = admin
    assert states(client) == {1: "unloaded", 2: "ready", 3: "ready"}
    assert (answering(client), answering(client, "tiny:1")) == ("tiny:3", "model_unavailable")
    assert client.post("/models/tiny/rollback").json()["default_version"] == 2
    assert (answering(client), answering(client, "tiny:3")) == ("tiny:2", "tiny:3")
    assert client.post("/models/tiny/rollback").json()["default_version"] == 1
    assert (answering(client), states(client)) == ("tiny:1", {1: "ready", 2: "ready", 3: "ready"})
    assert client.post("/models/tiny/rollback").status_code == 503
    assert answering(client) == "tiny:1"
    assert client.post("/models/tiny/rollback?version=2").json()["default_version"] == 2
    assert client.post("/models/tiny/load").json()["default_version"] == 3
    assert answering(client) == "tiny:3"


def test_unload_and_load(admin: tuple[httpx.Client, Path]) -> None:
    """An unloaded model or version says so until it is loaded again; what is not there is a 404."""
    client, _ = admin
    assert client.post("/models/tiny/unload?version=3").json()["default_version"] == 2
    assert (answering(client), answering(client, "tiny:3")) == ("tiny:2", "model_unavailable")
    assert client.post("/models/tiny/unload").json()["default_version"] is None
    refusal = client.post("/encode?model=tiny", json=ITEM)
    assert (refusal.status_code, refusal.json()["code"]) == (503, "model_unavailable")
    assert "tiny:3 was unloaded: unloaded by its operator" in refusal.json()["error"]
    assert client.get("/readyz").status_code == 503
    assert client.post("/models/tiny/load?version=1").json()["default_version"] is not None
    assert client.post("/models/tiny/load").json()["default_version"] == 3
    assert client.get("/readyz").status_code == 200
    for path in ("nobody/load", "nobody/unload", "nobody/rollback", "tiny/load?version=9", "tiny/unload?version=9"):
        assert (client.post(f"/models/{path}").status_code, path) == (404, path)
    for query in ("version=x", "version=0", "version=1&version=2", "force=true"):
        assert client.post(f"/models/tiny/load?{query}").json()["code"] == "invalid_parameter"
    assert answering(client) == "tiny:3"


def test_a_bad_version_cannot_be_loaded_and_is_tried_again(
    admin: tuple[httpx.Client, Path], write_artifact_named: Callable[..., ArtifactRef], tmp_path: Path
) -> None:
    """Loading a damaged version is a 503 with the reason and changes nothing; mended, it is taken up by itself."""
    client, store = admin
    # Damaged before the service can see it: the store is watched.
    scratch = shutil.copytree(store, tmp_path / "scratch")
    ref = write_artifact_named(scratch, "tiny", seed=3)
    whole = (ref.path / "model.pt").read_bytes()
    (ref.path / "model.pt").write_bytes(whole[:-1])
    damaged = ref.path.rename(store / "tiny" / ref.path.name)
    answer = client.post("/models/tiny/load?version=4")
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
    assert "tiny:4 was refused: model.pt: expected" in answer.json()["error"]
    assert (answering(client), states(client)[4]) == ("tiny:3", "refused")
    (damaged / "model.pt").write_bytes(whole)
    until(lambda: answering(client) == "tiny:4")
    until(lambda: states(client) == {1: "unloaded", 2: "unloaded", 3: "ready", 4: "ready"})


def test_aliases(admin: tuple[httpx.Client, Path]) -> None:
    """`name:alias` is the version that aliases.json names, kept however old; `default` answers to the bare name."""
    client, store = admin
    file = store / "tiny" / "aliases.json"
    file.write_text(json.dumps({"stable": 1}))
    until(lambda: answering(client, "tiny:stable") == "tiny:1")
    assert answering(client) == "tiny:3"
    assert client.get("/models/tiny").json()["aliases"] == {"stable": 1}
    assert answering(client, "tiny:wild") == "model_not_found"
    file.write_text("{")
    file.write_text(json.dumps({"default": 2}))
    until(lambda: answering(client) == "tiny:2")
    file.unlink()
    until(lambda: answering(client) == "tiny:3")
