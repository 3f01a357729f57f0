"""The store on disk: whole or not at all, verified before anything is parsed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.artifacts import store as store_module
from app.artifacts.store import ArtifactRef, list_artifacts, next_version, read_artifact, write_artifact
from app.errors import ArtifactRefused


@pytest.fixture
def ref(store: Path, tmp_path: Path) -> ArtifactRef:
    """A copy of a sound artifact, to be damaged."""
    target = tmp_path / "tiny" / "2"
    shutil.copytree(store / "tiny" / "2", target)
    return ArtifactRef("tiny", 2, target)


def rewrite(ref: ArtifactRef, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of an artifact in place."""
    path = ref.path / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def put(ref: ArtifactRef, name: str, data: bytes) -> None:
    """Replaces a file of an artifact, and its size and hash in the manifest."""
    (ref.path / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(ref, lambda document: document["files"].update({name: entry}))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_what_was_written_is_read(ref: ArtifactRef) -> None:
    """A sound artifact is read whole: model, calibration and self-test vectors."""
    artifact = read_artifact(ref)
    assert artifact.model == (ref.path / "model.pt").read_bytes()
    calibration = artifact.calibration()
    assert calibration is not None
    assert calibration.id == artifact.manifest.calibration.id
    assert artifact.self_test_vectors()["encode/in/x"].shape == (3, 1, 8, 8)


DAMAGES: dict[str, tuple[Callable[[ArtifactRef], object], str]] = {
    "no manifest": (lambda r: (r.path / "manifest.json").unlink(), r"manifest\.json: cannot be read: No such file"),
    "manifest is a folder": (
        lambda r: ((r.path / "manifest.json").unlink(), (r.path / "manifest.json").mkdir()),
        r"manifest\.json: cannot be read: Is a directory",
    ),
    "bad JSON": (
        lambda r: (r.path / "manifest.json").write_text('{"name": '),
        r"manifest\.json: manifest: Invalid JSON",
    ),
    "not UTF-8": (lambda r: (r.path / "manifest.json").write_bytes(b"\xff\xfe{}"), r"manifest\.json: manifest: "),
    "no object": (lambda r: (r.path / "manifest.json").write_text("[]"), r"manifest\.json: manifest: "),
    "deep nesting": (lambda r: (r.path / "manifest.json").write_text("[" * 200_000), r"manifest\.json: manifest: "),
    "newer schema": (
        lambda r: rewrite(r, lambda d: d.update(schema_version=2, novelty={})),
        r"manifest\.json: schema_version: expected at most 1, found 2; a newer service reads it",
    ),
    "missing member": (lambda r: rewrite(r, lambda d: d.pop("input")), r"manifest\.json: input: Field required"),
    "other name": (
        lambda r: rewrite(r, lambda d: d.update(name="other")),
        r"manifest\.json: name and version: expected tiny:2 from its folder, found other:2",
    ),
    "other version": (lambda r: rewrite(r, lambda d: d.update(version=3)), r"expected tiny:2 .*, found tiny:3"),
    "missing file": (lambda r: (r.path / "model.pt").unlink(), r"model\.pt: cannot be read: No such file"),
    "short file": (lambda r: os.truncate(r.path / "model.pt", 100), r"model\.pt: expected \d+ bytes, found 100"),
    "empty file": (
        lambda r: os.truncate(r.path / "calibration.npy", 0),
        r"calibration\.npy: expected \d+ bytes, found 0",
    ),
    "flipped bit": (
        lambda r: (r.path / "model.pt").write_bytes(flipped((r.path / "model.pt").read_bytes())),
        r"model\.pt: sha256: expected [0-9a-f]{64}, found [0-9a-f]{64}",
    ),
    "a path for a file": (
        lambda r: rewrite(r, lambda d: d["files"].update({"../1/model.pt": d["files"]["model.pt"]})),
        r"manifest\.json: files\.\.\./1/model\.pt",
    ),
    "a path for the model": (
        lambda r: rewrite(r, lambda d: d.update(model_file="/etc/passwd")),
        r"manifest\.json: model_file: ",
    ),
}


def flipped(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_file_and_field(ref: ArtifactRef, damage: str) -> None:
    """Every damage is refused before torch sees a byte, with a message that names the file and the field."""
    harm, message = DAMAGES[damage]
    harm(ref)
    with pytest.raises(ArtifactRefused, match=message):
        read_artifact(ref)


def test_a_manifest_without_end_is_not_read(ref: ArtifactRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest beyond the limit is refused without being parsed."""
    monkeypatch.setattr(store_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ArtifactRefused, match=r"manifest\.json: larger than 100 bytes"):
        read_artifact(ref)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.arange(98, dtype=np.float32)), "expected 99 scores with id cal-.*, found 98 with id cal-"),
        (npy(np.arange(99, dtype=np.float32)), "expected 99 scores with id cal-.*, found 99 with id cal-"),
        (npy(np.full(99, np.nan, np.float32)), "not readable as scores"),
        (npy(np.array(["a"])), "not readable as scores"),
        (npy(np.zeros(0, np.float32)), "not readable as scores"),
        (npy(np.arange(99, dtype=np.float32))[:-3], "not readable as scores"),
        (b"PK\x03\x04 no zip at all", "not readable as scores"),
        (b"", "not readable as scores"),
    ],
    ids=["too few", "others", "NaN", "text", "none", "truncated", "zip", "empty"],
)
def test_calibration_must_be_what_the_manifest_says(ref: ArtifactRef, data: bytes, message: str) -> None:
    """Scores that are no scores, or others than the manifest names, refuse the artifact."""
    put(ref, "calibration.npy", data)
    with pytest.raises(ArtifactRefused, match=rf"calibration\.npy: {message}"):
        read_artifact(ref).calibration()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"text", npy(np.array([object()], dtype=object))])
def test_self_test_vectors_must_be_readable(ref: ArtifactRef, data: bytes) -> None:
    """A broken or pickled archive of self-test vectors refuses the artifact."""
    put(ref, "self_test.npz", data)
    with pytest.raises(ArtifactRefused, match=r"self_test\.npz: not a readable \.npz"):
        read_artifact(ref).self_test_vectors()


def test_foreign_folders_are_passed_over(ref: ArtifactRef, tmp_path: Path) -> None:
    """Only <name>/<positive version>/ counts; versions sort as numbers; a missing store is an empty one."""
    for folder in ("tiny/10", "tiny/03", "tiny/0", "tiny/x", "tiny/.writing-abc", "UPPER/1", ".git/1", "b-model/1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "tiny" / "11").write_text("a file")
    assert [str(found) for found in list_artifacts(tmp_path)] == ["b-model:1", "tiny:2", "tiny:10"]
    assert list(list_artifacts(tmp_path / "nowhere")) == []
    assert list(list_artifacts(tmp_path / "README.md")) == []


def test_next_version_is_above_all_that_stands_there(ref: ArtifactRef, tmp_path: Path) -> None:
    """A number that is taken is never taken again, be it by an artifact, an empty folder or a file."""
    assert next_version(tmp_path, "new") == 1
    assert next_version(tmp_path, "tiny") == 3
    (tmp_path / "tiny" / "7").write_text("")
    source = read_artifact(ref)
    assert write_artifact(tmp_path, source.manifest, source.files).version == 8


def test_crash_while_writing_leaves_nothing_readable(
    ref: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step fails, no reader ever sees half an artifact, and the next write gets the version."""
    source = read_artifact(ref)
    with monkeypatch.context() as broken:
        broken.setattr(
            store_module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            write_artifact(tmp_path, source.manifest, source.files)
    with monkeypatch.context() as broken:
        broken.setattr(store_module.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        # As killed: not even the clean-up ran.
        broken.setattr(store_module.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_artifact(tmp_path, source.manifest, source.files)
    left = [path.name for path in (tmp_path / "tiny").iterdir() if path.name != "2"]
    assert len(left) == 1
    assert left[0].startswith(".writing-")
    assert [str(found) for found in list_artifacts(tmp_path)] == ["tiny:2"]
    assert write_artifact(tmp_path, source.manifest, source.files).version == 3


def test_concurrent_writers_get_distinct_versions(ref: ArtifactRef, tmp_path: Path) -> None:
    """Writers of one name at once each get a version of their own, all of them sound."""
    source = read_artifact(ref)
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: write_artifact(tmp_path, source.manifest, source.files), range(16)))
    assert sorted(found.version for found in written) == list(range(3, 19))
    assert all(read_artifact(found).model == source.model for found in written)


def test_written_facts_replace_what_the_manifest_claims(ref: ArtifactRef, tmp_path: Path) -> None:
    """Version, sizes and hashes are those of what was written, whatever the given manifest says."""
    source = read_artifact(ref)
    claims = source.manifest.model_copy(update={"version": 99})
    written = read_artifact(write_artifact(tmp_path, claims, source.files))
    assert written.manifest.version == 3
    assert written.manifest.files == source.manifest.files
