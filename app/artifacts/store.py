"""Where an artifact lies on disk: `<store>/<name>/<version>/`. Writes atomically, verifies before anyone parses."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from app.artifacts.calibration import Calibration, Tail
from app.artifacts.manifest import NAME_PATTERN, SCHEMA_VERSION, FileEntry, Manifest
from app.errors import ArtifactRefused

MANIFEST_FILE = "manifest.json"
ALIASES_FILE = "aliases.json"
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_ALIASES = TypeAdapter(
    dict[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9._-]{0,63}$")], PositiveInt],
    config=ConfigDict(strict=True),
)


@dataclass(frozen=True, order=True)
class ArtifactRef:
    """An artifact's place in a store; says nothing about its being sound."""

    name: str
    version: int
    path: Path

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Projection:
    """A map of the latent space: where a latent vector lies on it, and known items around.

    A point is (z − mean) · componentsᵀ. `labels` are indices into the manifest's, -1 for none.
    """

    mean: NDArray[np.float32]  # (latent_dim,)
    components: NDArray[np.float32]  # (2, latent_dim)
    points: NDArray[np.float32]  # (n, 2)
    labels: NDArray[np.int32]  # (n,)

    def project(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, latent_dim) → (batch, 2)."""
        return np.asarray((latents - self.mean) @ self.components.T, dtype=np.float32)


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its manifest, and the bytes of its files, each of the hash that the manifest gives."""

    ref: ArtifactRef
    manifest: Manifest
    files: Mapping[str, bytes]

    @property
    def model(self) -> bytes:
        """The TorchScript archive."""
        return self.files[self.manifest.model_file]

    def calibration(self) -> Calibration | None:
        """The scores that verdicts are measured against, if the artifact has any. Raises ArtifactRefused."""
        entry = self.manifest.calibration
        if entry is None:
            return None
        try:
            scores = np.load(io.BytesIO(self.files[entry.file]), allow_pickle=False)
            tail = None if entry.tail is None else Tail(entry.tail.start, entry.tail.scale, entry.tail.share)
            calibration = Calibration.from_scores(scores, tail)
        except Exception as error:  # numpy's reader raises whatever the damage leads to
            raise ArtifactRefused(f"{entry.file}: not readable as scores: {error}") from error
        if len(calibration.scores) != entry.count or calibration.id != entry.id:
            raise ArtifactRefused(
                f"{entry.file}: expected {entry.count} scores with id {entry.id}, "
                f"found {len(calibration.scores)} with id {calibration.id}"
            )
        return calibration

    def projection(self) -> Projection | None:
        """The map of the latent space, if the artifact has one. Raises ArtifactRefused."""
        entry = self.manifest.projection
        if entry is None:
            return None
        arrays = self._arrays(entry.file)
        d, n = self.manifest.latent_dim, entry.count
        expected = {"mean": (d,), "components": (2, d), "points": (n, 2), "labels": (n,)}
        found = {name: array.shape for name, array in arrays.items()}
        if found != expected:
            raise ArtifactRefused(f"{entry.file}: expected arrays of {expected}, found {found}")
        return Projection(
            mean=arrays["mean"].astype(np.float32),
            components=arrays["components"].astype(np.float32),
            points=arrays["points"].astype(np.float32),
            labels=arrays["labels"].astype(np.int32),
        )

    def self_test_vectors(self) -> dict[str, NDArray[np.float32]]:
        """Arrays by `<method>/in/<name>` and `<method>/out/<name>`. Raises ArtifactRefused."""
        arrays = self._arrays(self.manifest.self_test.file)
        return {key: np.asarray(array, dtype=np.float32) for key, array in arrays.items()}

    def _arrays(self, file: str) -> dict[str, NDArray[Any]]:
        try:
            with np.load(io.BytesIO(self.files[file]), allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except Exception as error:  # numpy's zip reader raises whatever the damage leads to
            raise ArtifactRefused(f"{file}: not a readable .npz: {error}") from error


def list_artifacts(store: Path) -> Iterator[ArtifactRef]:
    """Every `<name>/<version>/` in the store, sorted; half-written and foreign folders are passed over."""
    if not store.is_dir():
        return
    for folder in sorted(store.iterdir()):
        if not folder.is_dir() or not re.fullmatch(NAME_PATTERN, folder.name):
            continue
        versions = [v for v in folder.iterdir() if v.is_dir() and _is_version(v.name)]
        for version in sorted(versions, key=lambda v: int(v.name)):
            yield ArtifactRef(folder.name, int(version.name), version)


Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, size, time of change and inode of each file of an artifact: another stamp, another content perhaps."""


def stamp(ref: ArtifactRef) -> Stamp:
    """What the artifact's files look like from outside; nothing is read. Raises OSError if its folder is gone."""
    found = []
    with os.scandir(ref.path) as entries:
        for entry in entries:
            facts = entry.stat()
            found.append((entry.name, facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return tuple(sorted(found))


def read_aliases(store: Path, name: str) -> dict[str, int]:
    """Other names for versions of a model, from `<store>/<name>/aliases.json`: `{"stable": 3}`.

    An alias begins with a letter. `default` names the version that answers to the model's bare name. Without the file
    there are none. Raises ArtifactRefused if it is not such a file.
    """
    try:
        data = (store / name / ALIASES_FILE).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ArtifactRefused(f"{ALIASES_FILE}: cannot be read: {error.strerror}") from error
    try:
        return _ALIASES.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "aliases"
        raise ArtifactRefused(f"{ALIASES_FILE}: {where}: {first['msg']}") from error


def read_artifact(ref: ArtifactRef) -> Artifact:
    """Reads an artifact and verifies its schema and every file's size and SHA-256.

    Raises ArtifactRefused, naming file and field, before anything of it is parsed by torch.
    """
    manifest = _read_manifest(ref.path / MANIFEST_FILE)
    if (manifest.name, manifest.version) != (ref.name, ref.version):
        raise ArtifactRefused(
            f"{MANIFEST_FILE}: name and version: expected {ref} from its folder, "
            f"found {manifest.name}:{manifest.version}"
        )
    return Artifact(ref, manifest, {name: _read_file(ref.path / name, entry) for name, entry in manifest.files.items()})


def write_artifact(store: Path, manifest: Manifest, files: Mapping[str, bytes]) -> ArtifactRef:
    """Writes an artifact as the name's next version, whole or not at all.

    `manifest.version` and `manifest.files` are replaced by the facts.
    """
    parent = store / manifest.name
    parent.mkdir(parents=True, exist_ok=True)
    entries = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in files.items()
    }
    while True:
        version = next_version(store, manifest.name)
        facts = manifest.model_dump() | {"version": version, "files": entries}
        text = Manifest.model_validate(facts).model_dump_json(indent=2) + "\n"
        # Beside its final place, so that the rename stays on one file system; the dot keeps readers away.
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
        try:
            for name, data in {**files, MANIFEST_FILE: text.encode()}.items():
                _write_synced(temporary / name, data)
            temporary.chmod(0o755)
            target = parent / str(version)
            try:
                os.rename(temporary, target)
            except OSError:
                if not target.exists():
                    raise
                continue  # another writer took this version
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync_folder(parent)
        return ArtifactRef(manifest.name, version, target)


def next_version(store: Path, name: str) -> int:
    """The version that the next artifact of this name gets: above whatever stands there, be it an artifact or not."""
    folder = store / name
    taken = [int(path.name) for path in folder.iterdir() if _is_version(path.name)] if folder.is_dir() else []
    return max(taken, default=0) + 1


def _is_version(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,8}", text) is not None


def _read_manifest(path: Path) -> Manifest:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ArtifactRefused(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise ArtifactRefused(f"{path.name}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        newer = re.search(rb'"schema_version"\s*:\s*(\d+)', text)
        if newer and int(newer[1]) > SCHEMA_VERSION:
            raise ArtifactRefused(
                f"{path.name}: schema_version: expected at most {SCHEMA_VERSION}, found {int(newer[1])}; "
                "a newer service reads it"
            ) from error
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ArtifactRefused(f"{path.name}: {where}: {first['msg']}") from error


def _read_file(path: Path, entry: FileEntry) -> bytes:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactRefused(f"{path.name}: expected {entry.bytes} bytes, found {size}")
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactRefused(f"{path.name}: cannot be read: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise ArtifactRefused(f"{path.name}: sha256: expected {entry.sha256}, found {found}")
    return data


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
