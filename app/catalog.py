"""Name → served model: loaded artifacts, their states, each device's one worker thread, and the batcher over them."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import Capability, Manifest
from app.artifacts.store import Artifact, ArtifactRef, Projection, list_artifacts, read_artifact
from app.batching.batcher import Answered, Batcher, BatchRecord
from app.batching.queue import Lane
from app.errors import (
    ArtifactRefused,
    CapabilityNotSupported,
    InvalidParameter,
    ModelNotFound,
    ModelUnavailable,
    NoModels,
    NotReady,
)
from app.inference.loaded_model import LoadedModel, Row, use_threads

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 64 * 1024 * 1024
"""Most input that one batch may hold, whatever the manifest says."""


class State(StrEnum):
    """Where one version of a model stands."""

    LOADING = "loading"
    READY = "ready"
    REFUSED = "refused"


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and the lanes of its capabilities in the batcher."""

    manifest: Manifest
    calibration: Calibration | None
    projection: Projection | None
    lanes: dict[Capability, Lane[Row, Row]]
    batcher: Batcher

    def __str__(self) -> str:
        return f"{self.manifest.name}:{self.manifest.version}"

    async def run(
        self, capability: Capability, rows: Sequence[Row], *, timeout_s: float, caller: str, priority: int
    ) -> Answered[Row]:
        """The outputs of the exported method for each row; takes and raises what `Batcher.submit` does."""
        return await self.batcher.submit(
            self.lanes[capability], rows, timeout_s=timeout_s, caller=caller, priority=priority
        )


@dataclass(frozen=True)
class Replica:
    """A model on one device, and the batch size that is best for each of its methods there."""

    model: LoadedModel
    batch_sizes: dict[Capability, int]


@dataclass
class ModelVersion:
    """One version of a model in the store: its state, the reason for it, and the model once it is served."""

    ref: ArtifactRef
    state: State = State.LOADING
    reason: str | None = None
    served: ServedModel | None = None


class Catalog:
    """Owns the devices' worker threads, the batcher and every loaded model. Open and close it with `async with`.

    Args:
        store: folder of artifacts.
        devices: where the models run, each model on all of them; a device's one worker thread runs all of its torch.
        max_queue_rows, max_queue_bytes: most that may wait.
        torch_threads: threads of one forward pass on a CPU.
        max_batch_size: most rows in a batch; None leaves it to each manifest.
        default_model: model for requests that name none, where it has the capability.
        required_models: names without which the service is not ready.
        observe: told of every batch: model name, version, capability, record.
    """

    def __init__(
        self,
        store: Path,
        devices: Sequence[torch.device],
        *,
        max_queue_rows: int,
        max_queue_bytes: int,
        torch_threads: int = 1,
        max_batch_size: int | None = None,
        default_model: str | None = None,
        required_models: Sequence[str] = (),
        observe: Callable[[str, int, Capability, BatchRecord], None] = lambda *_: None,
    ) -> None:
        self.store = store
        self.devices = tuple(devices)
        self._torch_threads = torch_threads
        self._max_batch_size = max_batch_size
        self._default_model = default_model
        self._required_models = tuple(required_models)
        self._observe = observe
        self._lane_labels: dict[Lane[Any, Any], tuple[str, int, Capability]] = {}
        self._workers = [self._worker(device) for device in self.devices]
        self.batcher = Batcher(
            self._workers,
            max_queue_rows=max_queue_rows,
            max_queue_bytes=max_queue_bytes,
            observe=self._observe_batch,
        )
        self._versions: dict[str, list[ModelVersion]] = {}
        self._loading: asyncio.Task[None] | None = None
        self._listed = False
        self._unreadable: str | None = None

    def __repr__(self) -> str:
        return f"<Catalog of {self.store} on {self._device_names}: {len(self._versions)} models, {self.batcher!r}>"

    async def __aenter__(self) -> Self:
        """Starts loading every artifact of the store in the background."""
        self._loading = asyncio.create_task(self._load_all(), name="load models")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        await self.batcher.__aexit__(kind, error, trace)
        for worker in self._workers:
            worker.shutdown(wait=True, cancel_futures=True)

    async def loaded(self) -> None:
        """Returns once every artifact of the store is served or refused."""
        if self._loading is not None:
            await self._loading

    @property
    def is_loaded(self) -> bool:
        """Whether every artifact of the store is served or refused."""
        return self._loading is not None and self._loading.done()

    @property
    def models(self) -> dict[str, list[ModelVersion]]:
        """Every name of the store with its versions, ascending."""
        return self._versions

    def default_version(self, name: str) -> ServedModel | None:
        """The highest version of that name that is served."""
        ready = [version.served for version in self._versions.get(name, ()) if version.served is not None]
        return ready[-1] if ready else None

    def reasons_not_ready(self) -> list[str]:
        """Why the service is not ready; empty when it is."""
        if not self._listed:
            return ["the models store has not been read yet"]
        reasons = [
            f"required model {name}: {self._why_not(name)}"
            for name in self._required_models
            if self.default_version(name) is None
        ]
        versions = [version for name in self._versions for version in self._versions[name]]
        if loading := [str(version.ref) for version in versions if version.state is State.LOADING]:
            reasons.append(f"loading {', '.join(loading)}")
        elif not any(version.served for version in versions):
            reasons.append(self._nothing_served())
        return reasons

    def find(self, wanted: str | None, *needed: Capability) -> ServedModel:
        """The model that a request means.

        Args:
            wanted: `name`, `name:version`, or None for the default of the first capability.
            needed: what it must be able to do.

        Raises ModelNotFound, ModelUnavailable, NotReady, NoModels, InvalidParameter or CapabilityNotSupported.
        """
        model = self._default(needed) if wanted is None else self._named(wanted)
        for missing in needed:
            if missing not in model.manifest.capabilities:
                reason = model.manifest.unsupported.get(missing)
                able = self._able(needed)
                raise CapabilityNotSupported(
                    f"{model} does not support {missing}"
                    + (f": {reason}" if reason else "")
                    + (
                        f"; models that do: {', '.join(other.manifest.name for other in able)}"
                        if able
                        else "; no model here does"
                    )
                )
        return model

    def _served(self) -> list[ServedModel]:
        """The default version of every name that is served, by name."""
        models = (self.default_version(name) for name in sorted(self._versions))
        return [model for model in models if model is not None]

    def _able(self, needed: Sequence[Capability]) -> list[ServedModel]:
        return [model for model in self._served() if model.manifest.capabilities.keys() >= set(needed)]

    def _default(self, needed: Sequence[Capability]) -> ServedModel:
        able = self._able(needed)
        if able:
            # Of equals, min takes the first, and they come by name.
            return min(
                able,
                key=lambda model: (
                    model.manifest.name != self._default_model,
                    needed[0] not in model.manifest.default_for,
                ),
            )
        if not self._listed or any(v.state is State.LOADING for versions in self._versions.values() for v in versions):
            raise NotReady("models are still loading")
        if not self._served():
            raise NoModels(self._nothing_served(), retry_after_s=5)
        raise CapabilityNotSupported(f"no model here supports {' and '.join(needed)}")

    def _named(self, wanted: str) -> ServedModel:
        name, colon, number = wanted.partition(":")
        versions = self._versions.get(name)
        if not versions:
            if not self._listed:
                raise NotReady("models are still loading")
            known = ", ".join(sorted(self._versions)) or "none"
            raise ModelNotFound(f"model: expected one of {known}; found {name!r}")
        if not colon:
            model = self.default_version(name)
            if model is not None:
                return model
            raise self._unavailable(versions[-1])
        if not number.isascii() or not number.isdigit():
            raise InvalidParameter(f"model: expected name or name:version with a number, found {wanted!r}")
        for version in versions:
            if str(version.ref.version) == number.lstrip("0"):
                if version.served is None:
                    raise self._unavailable(version)
                return version.served
        raise ModelNotFound(
            f"model: {name} has the versions {', '.join(str(v.ref.version) for v in versions)}; found {number}"
        )

    def _nothing_served(self) -> str:
        if self._unreadable:
            return self._unreadable
        if not self.store.is_dir():
            return f"models store {self.store}: no such folder"
        refused = [
            f"{version.ref} was refused: {version.reason}"
            for versions in self._versions.values()
            for version in versions
            if version.state is State.REFUSED
        ]
        return f"models store {self.store}: no model in it can be served" + "".join(f"; {reason}" for reason in refused)

    def _unavailable(self, version: ModelVersion) -> Exception:
        if version.state is State.LOADING:
            return NotReady(f"model: {version.ref} is still loading")
        return ModelUnavailable(f"model: {version.ref} was refused: {version.reason}", retry_after_s=5)

    def _why_not(self, name: str) -> str:
        versions = self._versions.get(name)
        if not versions:
            return "not in the store"
        return f"version {versions[-1].ref.version} is {versions[-1].state}" + (
            f": {versions[-1].reason}" if versions[-1].reason else ""
        )

    async def _load_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            refs = await loop.run_in_executor(None, lambda: list(list_artifacts(self.store)))
        except OSError as error:
            self._unreadable = f"models store {self.store}: cannot be read: {error.strerror}"
            logger.error("not ready: %s", self._unreadable)  # noqa: TRY400  the reason says it; no traceback
            refs = []
        for ref in refs:
            self._versions.setdefault(ref.name, []).append(ModelVersion(ref))
        self._listed = True
        for version in [version for name in self._versions for version in self._versions[name]]:
            await self._load(version)
        # What is loaded stays: without torch's own objects a full collection takes microseconds, with them 0.2 s.
        gc.collect()
        gc.freeze()
        served = sum(version.served is not None for name in self._versions for version in self._versions[name])
        if served:
            logger.info("ready: %d of %d artifacts served on %s", served, len(refs), self._device_names)
        else:
            logger.error("not ready: %s", "; ".join(self.reasons_not_ready()))

    async def _load(self, version: ModelVersion) -> None:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            artifact = await loop.run_in_executor(None, read_artifact, version.ref)
            # On the devices' own threads: no forward pass ever runs on any other.
            replicas = await asyncio.gather(
                *(
                    loop.run_in_executor(worker, self._prepare, artifact, device)
                    for worker, device in zip(self._workers, self.devices, strict=True)
                )
            )
            version.served = self._serve(artifact, replicas)
        except ArtifactRefused as error:
            version.state, version.reason = State.REFUSED, str(error)
            logger.error("refused %s: %s", version.ref, error)  # noqa: TRY400  the reason says it; no traceback
        except Exception as error:  # one artifact's trouble must not keep the others from being served
            version.state, version.reason = State.REFUSED, f"{type(error).__name__}: {error}"
            logger.exception("refused %s", version.ref)
        else:
            version.state = State.READY
            logger.info("loaded %s in %.2f s", version.ref, time.perf_counter() - started)

    def _worker(self, device: torch.device) -> ThreadPoolExecutor:
        # torch's number of threads holds for the thread that sets it, and this one runs the forward passes.
        return ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix=f"device-{device}",
            initializer=use_threads,
            initargs=(self._torch_threads,),
        )

    def _prepare(self, artifact: Artifact, device: torch.device) -> Replica:
        loaded = LoadedModel.load(artifact, device)
        loaded.self_test(artifact)
        return Replica(loaded, loaded.warm_up(self._batch_size(artifact.manifest)))

    def _batch_size(self, manifest: Manifest) -> int:
        rows_that_fit = max(1, MAX_BATCH_BYTES // (4 * manifest.input.size))
        return min(manifest.max_batch_size, self._max_batch_size or manifest.max_batch_size, rows_that_fit)

    def _serve(self, artifact: Artifact, replicas: Sequence[Replica]) -> ServedModel:
        manifest = artifact.manifest
        lanes = {capability: self._lane(manifest, replicas, capability) for capability in manifest.capabilities}
        return ServedModel(manifest, artifact.calibration(), artifact.projection(), lanes, self.batcher)

    def _lane(self, manifest: Manifest, replicas: Sequence[Replica], capability: Capability) -> Lane[Row, Row]:
        inputs = manifest.capabilities[capability].inputs
        lane: Lane[Row, Row] = Lane(
            name=f"{manifest.name}:{manifest.version} {capability}",
            run=lambda rows, slot: replicas[slot].model.run(capability, rows),
            max_batch_size=min(replica.batch_sizes[capability] for replica in replicas),
            row_bytes=sum(4 * math.prod(spec.shape) for spec in inputs),  # float32
        )
        self._lane_labels[lane] = (manifest.name, manifest.version, capability)
        return lane

    @property
    def _device_names(self) -> str:
        return ", ".join(map(str, self.devices))

    def _observe_batch(self, lane: Lane[Any, Any], record: BatchRecord) -> None:
        self._observe(*self._lane_labels[lane], record)
