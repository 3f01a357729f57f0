"""The manifest refuses every inconsistency that the service would otherwise trip over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.artifacts.manifest import Capability, InputSpec, Manifest
from app.artifacts.store import ArtifactRef


@pytest.fixture(scope="module")
def document(store: Path) -> dict[str, Any]:
    """A sound manifest's JSON."""
    return json.loads((store / "tiny" / "2" / "manifest.json").read_text())


def changed(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A deep copy with the member at a dotted path set to `value`, or removed if that is ...."""
    copy = json.loads(json.dumps(document))
    *parents, last = path.split("/")
    target = copy
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return copy


INCONSISTENT: list[tuple[str, object, str]] = [
    # path, value, what the message must name
    ("name", ..., "name"),
    ("name", "../up", "name"),
    ("name", "Upper", "name"),
    ("name", "a" * 65, "name"),
    ("name", "tiny\n", "name"),
    ("version", 0, "version"),
    ("version", "1.5", "version"),
    ("created_at", "yesterday", "created_at"),
    ("surprise", 1, "surprise"),
    ("files", {}, "model_file"),
    ("files/..", {"sha256": "0" * 64, "bytes": 0}, "files"),
    ("files/a~b", {"sha256": "0" * 64, "bytes": 0}, "files"),
    ("files/model.pt/sha256", "ABC", "sha256"),
    ("files/model.pt/bytes", -1, "bytes"),
    ("model_file", "other.pt", "model_file: other.pt"),
    ("model_file", "../../etc/passwd", "model_file"),
    ("self_test/file", "other.npz", "self_test.file: other.npz"),
    ("self_test/absolute_tolerance", 0, "absolute_tolerance"),
    ("calibration/file", "other.npy", "calibration.file: other.npy"),
    ("calibration/count", 0, "count"),
    ("calibration/default_target_fpr", 1, "default_target_fpr"),
    ("calibration", None, "calibration: needed for anomaly_score"),
    ("capabilities", {}, "capabilities: expected at least one"),
    ("capabilities/fly", {"inputs": [], "outputs": []}, "capabilities"),
    ("capabilities/encode/inputs", [], "capabilities.encode.inputs"),
    ("capabilities/encode/outputs", [], "capabilities.encode.outputs"),
    ("capabilities/encode/inputs/0/shape", [1, 8, 9], "capabilities.encode: expected"),
    ("capabilities/encode/outputs/0/shape", [5], "capabilities.encode: expected"),
    ("capabilities/decode/inputs/0/shape", [5], "capabilities.decode: expected"),
    ("capabilities/reconstruct/outputs/0/shape", [64], "capabilities.reconstruct: expected"),
    ("capabilities/denoise/outputs/0/shape", [64], "capabilities.denoise: expected"),
    ("capabilities/anomaly_score/outputs/0/shape", [1], "capabilities.anomaly_score: expected"),
    ("capabilities/sample/inputs", [{"name": "eps", "shape": [4]}], "capabilities.sample: expected"),
    ("latent_dim", None, "capabilities.encode: expected"),
    ("latent_dim", 5, "capabilities.encode: expected"),
    ("unsupported", {"denoise": "measured"}, "unsupported"),
    ("default_for", ["fly"], "default_for"),
    ("max_batch_size", 0, "max_batch_size"),
    ("input/shape", [2, 8, 8], "shape: a picture is"),
    ("input/shape", [8, 8], "shape: a picture is"),
    ("input/shape", [1, 0, 8], "input.shape"),
    ("input/range", None, "range: a picture needs one"),
    ("input/range", [1, 0], "range: expected lowest < highest"),
    ("input/features", ["a", "b"], "features: 2 names"),
    ("input/picture/fit", "squeeze", "input.picture.fit"),
    ("metrics", {"mse": {"value": "NaN", "unit": "", "protocol": ""}}, "metrics.mse.value"),
    ("training/threads", 0, "training.threads"),
]


@pytest.mark.parametrize(("path", "value", "named"), INCONSISTENT, ids=[f"{p}={v}"[:40] for p, v, _ in INCONSISTENT])
def test_inconsistency_is_refused_by_name(document: dict[str, Any], path: str, value: object, named: str) -> None:
    """Each inconsistent member is refused, in the file and as an object, with a message that names it."""
    bad = changed(document, path, value)
    with pytest.raises(ValidationError) as in_file:
        Manifest.model_validate_json(json.dumps(bad))
    where_and_what = [
        f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in in_file.value.errors(include_url=False)
    ]
    assert any(named in text for text in where_and_what), where_and_what


def test_sound_manifest_survives_its_own_json(document: dict[str, Any]) -> None:
    """What a manifest writes is what it reads."""
    manifest = Manifest.model_validate(document)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_default_for_needs_the_capability(document: dict[str, Any]) -> None:
    """A model cannot be the default for what it cannot do."""
    bad = changed(document, "default_for", ["sample"])
    del bad["capabilities"]["sample"]
    with pytest.raises(ValidationError, match="default_for: sample is not among the capabilities"):
        Manifest.model_validate(bad)


def test_records_need_no_range() -> None:
    """A record may hold any finite number: its range may be null."""
    assert InputSpec(shape=(3,), features=("a", "b", "c")).size == 3


def test_writing_refuses_what_reading_would(tmp_path: Path, write_artifact_named: Callable[..., ArtifactRef]) -> None:
    """An inconsistent manifest never reaches the store, and nothing readable is left behind."""
    with pytest.raises(ValidationError, match="default_for"):
        write_artifact_named(tmp_path, "bad", without=frozenset({Capability.SAMPLE}), default_for=(Capability.SAMPLE,))
    assert [path.name for path in (tmp_path / "bad").iterdir()] == []
