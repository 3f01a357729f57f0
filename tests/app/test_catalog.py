"""Which model a request means, and what a store of good and bad artifacts serves."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app import catalog as catalog_module
from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef
from app.catalog import Catalog, State
from app.errors import CapabilityNotSupported, ModelUnavailable, NoModels
from app.settings import Settings


def in_catalog(store: Path, look: Callable[[Catalog], object], **options: object) -> None:
    """Loads a store, looks at the catalog and closes it."""

    async def run() -> None:
        limits = {"max_queue_rows": 100, "max_queue_bytes": 100_000}
        async with Catalog(store, [torch.device("cpu")], **limits, **options) as catalog:  # type: ignore[arg-type]
            await catalog.loaded()
            look(catalog)

    asyncio.run(run())


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, write_artifact_named: Callable[..., ArtifactRef]) -> Path:
    """a-plain can everything but sample; b-scores is the default for scores; c-scores too; d-last can everything."""
    store = tmp_path_factory.mktemp("names")
    write_artifact_named(store, "d-last")
    write_artifact_named(store, "c-scores", default_for=(Capability.ANOMALY_SCORE,))
    write_artifact_named(store, "b-scores", default_for=(Capability.ANOMALY_SCORE,))
    write_artifact_named(store, "a-plain", without=frozenset({Capability.SAMPLE}))
    return store


@pytest.mark.parametrize(
    ("default_model", "capability", "expected"),
    [
        (None, Capability.ENCODE, "a-plain:1"),
        (None, Capability.SAMPLE, "b-scores:1"),
        (None, Capability.ANOMALY_SCORE, "b-scores:1"),
        ("d-last", Capability.ANOMALY_SCORE, "d-last:1"),
        ("d-last", Capability.ENCODE, "d-last:1"),
        ("a-plain", Capability.SAMPLE, "b-scores:1"),
        ("nobody", Capability.ENCODE, "a-plain:1"),
    ],
)
def test_default_is_the_settings_then_the_manifests_then_the_first_by_name(
    names: Path, default_model: str | None, capability: Capability, expected: str
) -> None:
    """DEFAULT_MODEL if it can, else the first by name that is the default for it, else the first that can."""

    def look(catalog: Catalog) -> None:
        assert str(catalog.find(None, capability)) == expected

    in_catalog(names, look, default_model=default_model)


def test_highest_version_is_served_unless_another_is_named(store: Path) -> None:
    """A name alone is its highest version; name:version is that one, leading zeros or not."""

    def look(catalog: Catalog) -> None:
        for wanted, found in (("tiny", "tiny:2"), ("tiny:1", "tiny:1"), ("tiny:2", "tiny:2"), ("tiny:001", "tiny:1")):
            assert str(catalog.find(wanted, Capability.ENCODE)) == found

    in_catalog(store, look)


def test_what_nobody_can_says_so(tmp_path: Path, write_artifact_named: Callable[..., ArtifactRef]) -> None:
    """Where no model has the capability, the refusal says that, whether or not a model is named."""
    write_artifact_named(tmp_path, "plain", without=frozenset({Capability.SAMPLE}))

    def look(catalog: Catalog) -> None:
        with pytest.raises(CapabilityNotSupported, match="plain:1 does not support sample; no model here does"):
            catalog.find("plain", Capability.SAMPLE)
        with pytest.raises(CapabilityNotSupported, match="no model here supports sample"):
            catalog.find(None, Capability.SAMPLE)

    in_catalog(tmp_path, look)


def overwrite(path: Path, text: str) -> None:
    path.write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bad-json": (lambda p: overwrite(p / "manifest.json", "{"), "manifest.json: manifest: Invalid JSON"),
    "no-manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "no-model": (lambda p: (p / "model.pt").unlink(), "model.pt: cannot be read"),
    "wrong-hash": (
        lambda p: (p / "model.pt").write_bytes(bytes(len((p / "model.pt").read_bytes()))),
        "model.pt: sha256: expected",
    ),
    "wrong-size": (lambda p: (p / "self_test.npz").write_bytes(b""), "self_test.npz: expected"),
    "wrong-count": (lambda p: edit(p, "calibration", "count", 100), "calibration.npy: expected 100 scores"),
    "wrong-signature": (
        lambda p: edit(p, "latent_dim", None, 9),
        "manifest.json: manifest: Value error, capabilities.enc",
    ),
    "future-torch": (lambda p: edit(p, "torch_version", None, "99.0"), "model.pt: exported with torch 99.0"),
    "strict-test": (
        lambda p: (edit(p, "self_test", "absolute_tolerance", 1e-30), edit(p, "self_test", "relative_tolerance", 0)),
        "self-test: ",
    ),
}


def edit(path: Path, member: str, inner: str | None, value: object) -> None:
    document = json.loads((path / "manifest.json").read_text())
    if inner is None:
        document[member] = value
    else:
        document[member][inner] = value
    (path / "manifest.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, write_artifact_named: Callable[..., ArtifactRef]) -> Path:
    """One artifact of each damage beside a good one, whose second version is damaged too."""
    store = tmp_path_factory.mktemp("damaged")
    for name, (harm, _) in DAMAGES.items():
        harm(write_artifact_named(store, name).path)
    write_artifact_named(store, "good")
    (write_artifact_named(store, "good").path / "model.pt").unlink()
    (store / "notes.txt").write_text("no artifact")
    return store


# Exact equality may happen to hold on some machine; everything else is refused anywhere.
CERTAIN = [name for name in DAMAGES if name != "strict-test"]


def test_refused_artifacts_are_named_and_the_good_serve_on(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every damaged artifact is refused with file and field, in its state and the log, without a traceback."""
    caplog.set_level(logging.INFO)

    def look(catalog: Catalog) -> None:
        for name in CERTAIN:
            (version,) = catalog.models[name]
            assert version.state is State.REFUSED
            assert version.reason is not None
            assert version.reason.startswith(DAMAGES[name][1])
            with pytest.raises(ModelUnavailable, match=f"model: {name}:1 was refused: "):
                catalog.find(name, Capability.ENCODE)
        assert [version.state for version in catalog.models["good"]] == [State.READY, State.REFUSED]
        assert str(catalog.find(None, Capability.SAMPLE)) == "good:1"
        assert str(catalog.find("good", Capability.SAMPLE)) == "good:1"
        with pytest.raises(ModelUnavailable, match=r"good:2 was refused: model\.pt: cannot be read"):
            catalog.find("good:2", Capability.SAMPLE)
        assert catalog.reasons_not_ready() == []

    in_catalog(damaged, look)
    refusals = [record for record in caplog.records if record.getMessage().startswith("refused ")]
    assert {record.getMessage().split()[1].rstrip(":") for record in refusals} >= {f"{name}:1" for name in CERTAIN}
    assert not any(record.exc_info for record in refusals)


def test_only_refused_artifacts_leave_no_models(damaged: Path, tmp_path: Path) -> None:
    """Where everything was refused, a request without a name learns why, and the service is not ready."""
    shutil.copytree(damaged / "no-model", tmp_path / "no-model")

    def look(catalog: Catalog) -> None:
        with pytest.raises(NoModels, match=r"no-model:1 was refused: model\.pt: cannot be read"):
            catalog.find(None, Capability.ENCODE)
        (reason,) = catalog.reasons_not_ready()
        assert "no-model:1 was refused" in reason

    in_catalog(tmp_path, look)


def test_required_models_decide_readiness(damaged: Path) -> None:
    """A required model that is refused or not there is a reason; one with a served version is none."""

    def look(catalog: Catalog) -> None:
        refused, missing = catalog.reasons_not_ready()
        assert refused.startswith("required model no-model: version 1 is refused: model.pt: cannot be read")
        assert missing == "required model absent: not in the store"

    in_catalog(damaged, look, required_models=("good", "no-model", "absent"))


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_store_without_artifacts_says_so(tmp_path: Path, kind: str) -> None:
    """A missing, an empty or no folder: not ready, with a reason that names it; a request gets the same."""
    store = tmp_path / "store"
    if kind == "empty":
        store.mkdir()
    elif kind == "a file":
        store.write_text("")
    message = "no model in it can be served" if kind == "empty" else "no such folder"

    def look(catalog: Catalog) -> None:
        assert catalog.reasons_not_ready() == [f"models store {store}: {message}"]
        with pytest.raises(NoModels, match=message):
            catalog.find(None, Capability.ENCODE)

    in_catalog(store, look)


def test_a_store_that_cannot_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error while the store is listed is the reason for not being ready, and stands in the log."""

    def fail(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(catalog_module, "list_artifacts", fail)
    expected = f"models store {tmp_path}: cannot be read: Permission denied"

    def look(catalog: Catalog) -> None:
        assert catalog.reasons_not_ready() == [expected]
        with pytest.raises(NoModels, match="Permission denied"):
            catalog.find(None, Capability.ENCODE)

    in_catalog(tmp_path, look)
    assert f"not ready: {expected}" in caplog.messages


def test_one_artifacts_unforeseen_trouble_keeps_the_others(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever loading one artifact raises, it is refused with a traceback in the log, and the others are served."""
    read = catalog_module.read_artifact

    def fail_for_one(ref: ArtifactRef) -> object:
        if str(ref) == "tiny:2":
            raise ZeroDivisionError("odd")
        return read(ref)

    monkeypatch.setattr(catalog_module, "read_artifact", fail_for_one)

    def look(catalog: Catalog) -> None:
        assert catalog.models["tiny"][1].reason == "ZeroDivisionError: odd"
        assert str(catalog.find("tiny", Capability.ENCODE)) == "tiny:1"

    in_catalog(store, look)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["refused tiny:2"]


def test_batch_size_setting_caps_the_manifests(store: Path) -> None:
    """The setting makes batches smaller than the manifest's, never larger."""
    for setting, expected in ((None, 16), (4, 4), (1000, 16)):

        def look(catalog: Catalog, expected: int = expected) -> None:
            lanes = catalog.find("tiny", Capability.ENCODE).lanes
            assert {lane.max_batch_size for lane in lanes.values()} == {expected}

        in_catalog(store, look, max_batch_size=setting)


def test_settings_reach_the_catalog(store: Path) -> None:
    """The application hands its settings on: store, queue, default and required models."""
    from app.main import create_app

    settings = Settings(models_store=store, default_model="tiny-plain", required_models=("absent",), max_queue_rows=7)

    async def run() -> None:
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            catalog = app.state.catalog
            await catalog.loaded()
            assert str(catalog.find(None, Capability.ENCODE)) == "tiny-plain:1"
            assert catalog.reasons_not_ready() == ["required model absent: not in the store"]
            assert "tiny" in catalog.models

    asyncio.run(run())
