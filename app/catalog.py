"""Name → served model: what the store holds, what of it is in memory, and the batcher over the devices' threads."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from app.artifacts.manifest import Capability, Manifest
from app.artifacts.store import Artifact, ArtifactRef, Stamp, list_artifacts, read_aliases, read_artifact, stamp
from app.batching.batcher import Batcher, BatchRecord
from app.batching.queue import Lane
from app.errors import (
    ArtifactRefused,
    CapabilityNotSupported,
    DeviceLost,
    InvalidParameter,
    ModelNotFound,
    ModelUnavailable,
    NoModels,
    NotReady,
)
from app.inference.allocator import keep_freed_memory
from app.inference.loaded_model import LoadedModel, is_sticky, tensor_bytes, use_threads
from app.inference.worker_thread import WorkerThread
from app.served_model import ModelLane, Replica, ServedModel, labels_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_BATCH_BYTES = 64 * 1024 * 1024
"""Most input that one batch may hold, whatever the manifest says."""

DEFAULT_ALIAS = "default"
_NOT_IN_MEMORY = "not in memory; the next request for it loads it"
# Requests leave few cycles behind: looking for them ten times more seldom makes up for some percent of a request.
_GC_THRESHOLDS = (10_000, 20, 50)
_MAX_FOUND = 1024


class State(StrEnum):
    """Where one version of a model stands."""

    LOADING = "loading"
    READY = "ready"
    REFUSED = "refused"
    UNLOADED = "unloaded"


class Wish(BaseModel):
    """What an operator wants of one model; a new one wants nothing, and the store decides."""

    model_config = ConfigDict(frozen=True)

    is_unloaded: bool = False
    unloaded_versions: frozenset[int] = frozenset()
    kept_versions: frozenset[int] = frozenset()
    default_version: int | None = None


@dataclass(eq=False)
class ModelVersion:
    """One version of a model in the store, and the model once it was found sound."""

    ref: ArtifactRef
    stamp: Stamp = ()
    """What its files look like; `checked` is the stamp that the verdict is about."""
    checked: Stamp | None = None
    served: ServedModel | None = None
    refusal: str | None = None
    release: str | None = None
    """Why its memory was given back."""
    is_gone: bool = False

    @property
    def state(self) -> State:
        """Where it stands."""
        if self.served is not None:
            return State.READY if self.served.in_memory else State.UNLOADED
        if self.refusal is not None:
            return State.REFUSED
        return State.LOADING if self.release is None else State.UNLOADED

    @property
    def reason(self) -> str | None:
        """Why it is refused or unloaded; what is wrong on disk with one that serves on from memory."""
        if self.served is not None and self.served.in_memory:
            if self.is_gone:
                return "its folder is gone; what is in memory serves on"
            return self.refusal and f"its files changed, what is in memory serves on: {self.refusal}"
        return self.refusal or self.release or (_NOT_IN_MEMORY if self.served is not None else None)


@dataclass(frozen=True)
class _Scan:
    """What the store looks like from outside."""

    stamps: dict[ArtifactRef, Stamp] = field(default_factory=dict)
    aliases: dict[str, dict[str, int] | ArtifactRefused] = field(default_factory=dict)


class Catalog:
    """Owns the devices' worker threads, the loader's, the batcher and every model. Open and close it with `async with`.

    A new or changed version is verified, loaded, tested and warmed up on the loader's thread while the others serve; it
    answers from the moment it has passed all that. The store is looked at again and again; what still changes between
    two looks is not read. `<store>/<name>/aliases.json` gives versions other names.

    Args:
        store: folder of artifacts.
        devices: where the models run, each model on all of them; a device's one worker thread runs all batches there.
        max_queue_rows, max_queue_bytes: most that may wait.
        torch_threads: threads of one forward pass on a CPU.
        max_batch_size: most rows in a batch; None leaves it to each manifest.
        default_model: model for requests that name none, where it has the capability.
        required_models: names without which the service is not ready.
        pinned_models: names that stay in memory, as the default and the required ones do.
        memory_bytes: most parameters and buffers in memory, beside what is pinned; None for no limit.
        keep_versions: how many sound versions of a model are kept, the highest ones.
        poll_s: how often the store is looked at; 0 for never again.
        load_s: how long loading one artifact may take.
        observe: told of every batch: model name, version, capability, record.
        observe_change: told of every version that was loaded, refused, evicted or unloaded, in that word, and the
            seconds that it took.
        on_lost: told when a device is lost.
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
        pinned_models: Sequence[str] = (),
        memory_bytes: int | None = None,
        keep_versions: int = 2,
        poll_s: float = 0,
        load_s: float = 600,
        observe: Callable[[str, int, Capability, BatchRecord], None] = lambda *_: None,
        observe_change: Callable[[str, int, str, float], None] = lambda *_: None,
        on_lost: Callable[[DeviceLost], None] = lambda _: None,
    ) -> None:
        self.store = store
        self.devices = tuple(devices)
        self.required_models = tuple(required_models)
        self._torch_threads = torch_threads
        self._max_batch_size = max_batch_size
        self._default_model = default_model
        self._pinned = {*required_models, *pinned_models} | ({default_model} if default_model else set())
        self._memory_bytes = memory_bytes
        self._keep_versions = keep_versions
        self._poll_s = poll_s
        self._load_s = load_s
        self._observe = observe
        self._observe_change = observe_change
        self._on_lost = on_lost
        keep_freed_memory()
        self._workers = [WorkerThread(f"device-{device}", self._use_threads) for device in self.devices]
        self._loader = WorkerThread("loader", self._use_threads)
        self.batcher = Batcher(
            self._workers,
            max_queue_rows=max_queue_rows,
            max_queue_bytes=max_queue_bytes,
            observe=self._observe_batch,
            on_lost=on_lost,
        )
        self.ran_at_s = 0.0
        """When any request's batch last succeeded, on the machine's monotonic clock."""
        self._versions: dict[str, list[ModelVersion]] = {}
        self._aliases: dict[str, dict[str, int]] = {}
        self._alias_errors: dict[str, str] = {}
        self._wishes: Mapping[str, Wish] = {}
        self._defaults: dict[str, ServedModel] = {}
        self._found: dict[tuple[str | None, tuple[Capability, ...]], ServedModel] = {}
        self._settling = asyncio.Lock()
        self._one_load = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._last_scan = _Scan()
        self._listed = False
        self._unreadable: str | None = None

    def __repr__(self) -> str:
        return f"<Catalog of {self.store} on {self._device_names}: {len(self._versions)} models, {self.batcher!r}>"

    async def __aenter__(self) -> Self:
        """Starts loading every artifact of the store in the background, and watching it."""
        self._loading = asyncio.create_task(self._load_all(), name="load models")
        if self._poll_s:
            self._watching = asyncio.create_task(self._watch(), name="watch the store")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._loading, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.batcher.__aexit__(kind, error, trace)
        for thread in (self._loader, *self._workers):
            thread.shutdown(wait=True, cancel_futures=True)

    async def loaded(self) -> None:
        """Returns once every artifact of the store is served or refused."""
        if self._loading is not None:
            await self._loading

    @property
    def is_loaded(self) -> bool:
        """Whether every artifact that the store had in the beginning is served or refused."""
        return self._loading is not None and self._loading.done()

    @property
    def models(self) -> dict[str, list[ModelVersion]]:
        """Every name of the store with its versions, ascending."""
        return self._versions

    @property
    def threads(self) -> tuple[WorkerThread, ...]:
        """The devices' worker threads, which run every batch."""
        return tuple(self._workers)

    @property
    def loader(self) -> WorkerThread:
        """The thread that loads artifacts."""
        return self._loader

    @property
    def memory_bytes(self) -> int:
        """Parameters and buffers that the catalog holds in memory."""
        return sum(served.memory_bytes for served in self._in_memory())

    def aliases(self, name: str) -> dict[str, int]:
        """Other names of a model's versions."""
        return self._aliases.get(name, {})

    def default_version(self, name: str) -> ServedModel | None:
        """The version that answers to a model's bare name: the one that an operator chose, or the alias `default`
        names, or else the highest sound one.
        """
        return self._defaults.get(name)

    def version_before(self, name: str) -> int:
        """The highest version below the default one that was not refused. Raises ModelNotFound or ModelUnavailable."""
        versions, default = self._known(name), self._defaults.get(name)
        below = [
            version.ref.version
            for version in versions
            if default is not None and version.ref.version < default.manifest.version and version.refusal is None
        ]
        if not below:
            raise ModelUnavailable(f"model: {name} has no sound version before {default or 'its first'}")
        return below[-1]

    async def follow(self, wishes: Mapping[str, Wish], name: str) -> None:
        """Does what an operator wants of a model, after a look at its folder; returns when it is done.

        Refused versions are tried again. Raises ModelNotFound, or ModelUnavailable with the reason if a version that
        is asked for cannot be served.
        """
        await self.loaded()
        scan = await asyncio.to_thread(_scan, self.store)
        async with self._settling:
            self._wishes = wishes
            self._notice(scan, {name})
            for version in self._known(name):
                if version.served is None:
                    version.checked = None
            await self._settle(name, by_force=True)
        wish = self._wishes.get(name, Wish())
        if wish.is_unloaded:
            return
        for number in sorted({*wish.kept_versions, *([wish.default_version] if wish.default_version else [])}):
            self._numbered(name, number)
        if self.default_version(name) is None:
            raise self._unavailable(self._known(name)[-1])

    def start_with(self, wishes: Mapping[str, Wish]) -> None:
        """What operators want already, before anything is loaded."""
        self._wishes = wishes

    def reasons_not_ready(self) -> list[str]:
        """Why the service is not ready; empty when it is."""
        if not self._listed:
            return ["the models store has not been read yet"]
        reasons = [
            f"required model {name}: {self._why_not(name)}"
            for name in self.required_models
            if self.default_version(name) is None
        ]
        versions = [version for name in self._versions for version in self._versions[name]]
        loading = [str(version.ref) for version in versions if version.state is State.LOADING]
        if not self.is_loaded and loading:
            reasons.append(f"loading {', '.join(loading)}")
        elif not self._defaults:
            reasons.append(self._nothing_served())
        return reasons

    def find(self, wanted: str | None, *needed: Capability) -> ServedModel:
        """The model that a request means.

        Args:
            wanted: `name`, `name:version`, or None for the default of the first capability.
            needed: what it must be able to do.

        Raises ModelNotFound, ModelUnavailable, NotReady, NoModels, InvalidParameter or CapabilityNotSupported.
        """
        found = self._found.get((wanted, needed))
        if found is not None:
            return found
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
        if len(self._found) >= _MAX_FOUND:  # a version may be written in many ways
            self._found.clear()
        self._found[wanted, needed] = model
        return model

    def _served(self) -> list[ServedModel]:
        """The default version of every name that is served, by name."""
        return [self._defaults[name] for name in sorted(self._defaults)]

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
        if not self._defaults:
            raise NoModels(self._nothing_served(), retry_after_s=5)
        raise CapabilityNotSupported(f"no model here supports {' and '.join(needed)}")

    def _known(self, name: str) -> list[ModelVersion]:
        versions = self._versions.get(name)
        if not versions:
            if not self._listed:
                raise NotReady("models are still loading")
            known = ", ".join(sorted(self._versions)) or "none"
            raise ModelNotFound(f"model: expected one of {known}; found {name!r}")
        return versions

    def _named(self, wanted: str) -> ServedModel:
        name, colon, which = wanted.partition(":")
        versions = self._known(name)
        if not colon:
            model = self.default_version(name)
            if model is not None:
                return model
            raise self._unavailable(versions[-1])
        if which.isascii() and which.isdigit():
            return self._numbered(name, int(which[:20]))
        aliases = self.aliases(name)
        if which in aliases:
            return self._numbered(name, aliases[which])
        if aliases:
            raise ModelNotFound(f"model: {name} has the aliases {', '.join(sorted(aliases))}; found {which!r}")
        raise InvalidParameter(f"model: expected name or name:version with a number, found {wanted!r}")

    def _numbered(self, name: str, number: int) -> ServedModel:
        versions = self._known(name)
        for version in versions:
            if version.ref.version == number:
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
        why = [
            f"{version.ref} was {version.state}: {version.reason}"
            for versions in self._versions.values()
            for version in versions
            if version.state in (State.REFUSED, State.UNLOADED)
        ]
        return f"models store {self.store}: no model in it can be served" + "".join(f"; {reason}" for reason in why)

    def _unavailable(self, version: ModelVersion) -> Exception:
        if version.state is State.LOADING:
            return NotReady(f"model: {version.ref} is still loading")
        return ModelUnavailable(f"model: {version.ref} was {version.state}: {version.reason}", retry_after_s=5)

    def _why_not(self, name: str) -> str:
        versions = self._versions.get(name)
        if not versions:
            return "not in the store"
        return f"version {versions[-1].ref.version} is {versions[-1].state}" + (
            f": {versions[-1].reason}" if versions[-1].reason else ""
        )

    # What the store holds.

    async def _load_all(self) -> None:
        try:
            scan = await asyncio.to_thread(_scan, self.store)
        except OSError as error:
            self._unreadable = f"models store {self.store}: cannot be read: {error.strerror}"
            logger.error("not ready: %s", self._unreadable)  # noqa: TRY400  the reason says it; no traceback
            scan = _Scan()
        self._last_scan = scan
        names = self._notice(scan, {ref.name for ref in scan.stamps})
        self._listed = True
        for name in sorted(names, key=lambda name: (name not in self._pinned, name)):
            async with self._settling:
                await self._settle(name, by_force=False)
        # What is loaded stays: without torch's own objects a full collection takes microseconds, with them 0.2 s.
        # Nothing of a model is part of a cycle, so what is unloaded later needs no collection either.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        served = sum(version.served is not None for name in self._versions for version in self._versions[name])
        if served:
            logger.info("ready: %d of %d artifacts served on %s", served, len(scan.stamps), self._device_names)
        else:
            logger.error("not ready: %s", "; ".join(self.reasons_not_ready()))

    async def _watch(self) -> None:
        await self.loaded()
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._look_again()
            except OSError as error:  # files come and go; the next look tells more
                logger.info("models store %s: cannot be read now: %s", self.store, error.strerror)
            except Exception:  # whatever it was, the next change must not be missed for it
                logger.exception("looking at the models store failed")

    async def _look_again(self) -> None:
        """Takes up what changed in the store and has been the same for two looks."""
        scan = await asyncio.to_thread(_scan, self.store)
        if not scan.stamps and not self.store.is_dir():
            return  # a volume that is away for a moment: what is in memory serves on
        settled = {ref: seen for ref, seen in scan.stamps.items() if self._last_scan.stamps.get(ref) == seen}
        gone = {ref for ref in self._last_scan.stamps if ref not in scan.stamps}
        self._last_scan = scan
        async with self._settling:
            everything = {ref.name for ref in (*settled, *gone)} | self._versions.keys()
            present = settled | {ref: () for ref in scan.stamps if ref not in settled}
            for name in sorted(self._notice(_Scan(present, scan.aliases), everything)):
                await self._settle(name, by_force=True)

    def _notice(self, scan: _Scan, names: set[str]) -> set[str]:
        """Takes over what is there of some models, an empty stamp meaning that it still changes. Returns the names
        that have something new.
        """
        new: set[str] = set()
        for ref, seen in scan.stamps.items():
            if ref.name not in names or not seen:
                continue
            versions = self._versions.setdefault(ref.name, [])
            version = next((version for version in versions if version.ref == ref), None)
            if version is None:
                version = ModelVersion(ref)
                versions.append(version)
                versions.sort(key=lambda version: version.ref.version)
            version.is_gone = False
            if version.stamp != seen:
                version.stamp = seen
                new.add(ref.name)
        for name in names & self._versions.keys():
            for version in self._versions[name]:
                if version.ref not in scan.stamps and not version.is_gone:
                    version.is_gone = True
                    new.add(name)
            if self._take_aliases(name, scan.aliases.get(name, {})):
                new.add(name)
        return {name for name in new if name in self._versions}

    def _take_aliases(self, name: str, found: dict[str, int] | ArtifactRefused) -> bool:
        """Whether a model's aliases changed; those that cannot be read leave them as they were."""
        if isinstance(found, ArtifactRefused):
            if self._alias_errors.get(name) != str(found):
                self._alias_errors[name] = str(found)
                logger.error("aliases of %s stay as they were: %s", name, found)
            return False
        self._alias_errors.pop(name, None)
        if self._aliases.get(name, {}) == found:
            return False
        self._aliases[name] = found
        return True

    async def _settle(self, name: str, *, by_force: bool) -> None:
        """Makes a model what the store and its operator say: loads what is missing, then gives back what is too much.

        Args:
            name: of the model.
            by_force: whether others may be evicted for it.
        """
        wish = self._wishes.get(name, Wish())
        named = {*self.aliases(name).values(), *wish.kept_versions}
        if wish.default_version is not None:
            named.add(wish.default_version)
        sound, surplus = 0, []
        for version in reversed(self._versions[name]):
            number = version.ref.version
            if wish.is_unloaded or number in wish.unloaded_versions:
                surplus.append((version, "unloaded by its operator"))
            elif sound >= self._keep_versions and number not in named:
                surplus.append((version, f"only the highest {self._keep_versions} versions are kept"))
            else:
                if version.checked != version.stamp and not version.is_gone:
                    await self._take(version, by_force=by_force)
                sound += version.served is not None and not version.is_gone
        for version, why in surplus:
            self._release(version, why)
        for version in [version for version in self._versions[name] if version.is_gone]:
            # The last that is left of a model serves on from memory: a folder may be gone by mistake.
            if sound or version.served is None or not version.served.in_memory:
                self._release(version, "its folder is gone")
                self._versions[name].remove(version)
        if not self._versions[name]:
            del self._versions[name]
        self._update_defaults()

    async def _take(self, version: ModelVersion, *, by_force: bool) -> None:
        """Verifies a version and serves it from now on, or refuses it and leaves what is served as it is."""
        started = time.perf_counter()
        version.checked = version.stamp
        version.release = None
        if version.served is None:
            version.refusal = None  # it is loading now
        try:
            async with self._one_load:
                artifact = await self._in_loader(read_artifact, version.ref)
                served = ServedModel(artifact, self.batcher, self._bring_back)
                need = tensor_bytes(artifact) * len(self.devices)
                pinned = version.ref.name in self._pinned
                if self._fits(need) or ((pinned or by_force) and self._make_room(need, pinned=pinned)):
                    await self._admit(served, artifact)
        except ArtifactRefused as error:
            self._refuse(version, str(error), started)
        except Exception as error:  # one artifact's trouble must not keep the others from being served
            if self._tells_loss(error):
                return
            logger.exception("refused %s", version.ref)
            self._refuse(version, f"{type(error).__name__}: {error}", started, log=False)
        else:
            version.served, version.refusal = served, None
            self._update_defaults()
            word = "loaded" if served.in_memory else "verified"
            logger.info("%s %s in %.2f s", word, version.ref, time.perf_counter() - started)
            self._observe_change(version.ref.name, version.ref.version, word, time.perf_counter() - started)

    async def _bring_back(self, served: ServedModel) -> None:
        """Puts a model back into memory for the request that needs it. Raises ModelUnavailable."""
        started = time.perf_counter()
        manifest = served.manifest
        async with self._one_load:
            version = self._of(served)
            if served.in_memory:
                return
            if version is None:
                raise ModelUnavailable(f"model: {served} was unloaded", retry_after_s=5)
            try:
                artifact = await self._in_loader(read_artifact, version.ref)
                if artifact.manifest != manifest:
                    version.checked = None  # the next look takes it up
                    raise ModelUnavailable(f"model: {served} is being replaced", retry_after_s=1)
                need = tensor_bytes(artifact) * len(self.devices)
                if not self._make_room(need, pinned=False):
                    raise ModelUnavailable(
                        f"model: {served} needs {need} bytes; of {self._memory_bytes} for models, others hold "
                        f"{self.memory_bytes} for good",
                        retry_after_s=5,
                    )
                await self._admit(served, artifact)
            except ArtifactRefused as error:
                version.served = None
                self._refuse(version, str(error), started)
                self._update_defaults()
                raise self._unavailable(version) from error
        self._observe_change(manifest.name, manifest.version, "loaded", time.perf_counter() - started)

    def _of(self, served: ServedModel) -> ModelVersion | None:
        """The version that a model is served as; None if it is not any more."""
        versions = self._versions.get(served.manifest.name, ())
        return next((version for version in versions if version.served is served), None)

    async def _admit(self, served: ServedModel, artifact: Artifact) -> None:
        served.admit(await self._in_loader(self._prepare, artifact))

    async def _in_loader(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result, from the loader's thread. Raises ArtifactRefused if it takes too long."""
        running = asyncio.wrap_future(self._loader.submit(call, *args, **kwargs))
        try:
            async with asyncio.timeout(self._load_s):
                return await running
        except TimeoutError as error:
            # The thread cannot be interrupted: it is left alone, and another one takes its place.
            self._loader.shutdown(wait=False, cancel_futures=True)
            self._loader = WorkerThread("loader", self._use_threads)
            raise ArtifactRefused(f"loading: not over after {self._load_s:g} s") from error

    def _prepare(self, artifact: Artifact) -> list[Replica]:
        """A loaded, tested and warm replica for each device; runs on the loader's thread."""
        replicas = []
        for device in self.devices:
            loaded = LoadedModel.load(artifact, device)
            loaded.self_test(artifact)
            replicas.append(Replica(loaded, loaded.warm_up(self._batch_size(artifact.manifest))))
        return replicas

    def _refuse(self, version: ModelVersion, reason: str, started: float, *, log: bool = True) -> None:
        version.refusal = reason
        if log:
            logger.error("refused %s: %s", version.ref, reason)
        self._observe_change(version.ref.name, version.ref.version, "refused", time.perf_counter() - started)

    def _tells_loss(self, error: BaseException) -> bool:
        """Whether a device was lost in loading; whoever must know is told."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, DeviceLost) or is_sticky(cause):
                self._on_lost(DeviceLost(f"lost while an artifact was loaded: {error}"))
                return True
            cause = cause.__cause__
        return False

    def _release(self, version: ModelVersion, why: str) -> None:
        """Gives a version's memory back, once requests that hold it are done."""
        if version.served is not None:
            version.served = None
            logger.info("unloaded %s: %s", version.ref, why)
            self._observe_change(version.ref.name, version.ref.version, "unloaded", 0.0)
        if version.refusal is None or not version.is_gone:
            version.release, version.refusal = why, None
        version.checked = None

    def _update_defaults(self) -> None:
        self._found.clear()
        self._defaults = {
            name: chosen for name, versions in self._versions.items() if (chosen := self._choose(name, versions))
        }

    def _choose(self, name: str, versions: Sequence[ModelVersion]) -> ServedModel | None:
        served = {version.ref.version: version.served for version in versions if version.served is not None}
        wish = self._wishes.get(name)
        for number in (wish and wish.default_version, self.aliases(name).get(DEFAULT_ALIAS)):
            if number in served:
                return served[number]
        present = [version.ref.version for version in versions if version.ref.version in served and not version.is_gone]
        return served[max(present or served)] if served else None

    # What is in memory.

    def _in_memory(self) -> Iterator[ServedModel]:
        for versions in self._versions.values():
            for version in versions:
                if version.served is not None and version.served.in_memory:
                    yield version.served

    def _fits(self, need: int) -> bool:
        return self._memory_bytes is None or self.memory_bytes + need <= self._memory_bytes

    def _make_room(self, need: int, *, pinned: bool) -> bool:
        """Evicts the models that were used least recently, until there is room; whether there is, or must be taken."""
        for served in sorted(self._in_memory(), key=lambda served: served.used_at_s):
            if self._fits(need):
                break
            version = self._of(served)
            # What cannot come back, its files being damaged or gone, stays.
            stays = version is None or version.is_gone or version.refusal is not None
            name = served.manifest.name
            if not stays and not (name in self._pinned and served is self.default_version(name)):
                served.evict()
                self._observe_change(name, served.manifest.version, "evicted", 0.0)
        if not self._fits(need) and pinned:
            logger.warning("the models that must stay in memory need more than %d bytes", self._memory_bytes)
        return pinned or self._fits(need)

    def _batch_size(self, manifest: Manifest) -> int:
        rows_that_fit = max(1, MAX_BATCH_BYTES // (4 * manifest.input.size))
        return min(manifest.max_batch_size, self._max_batch_size or manifest.max_batch_size, rows_that_fit)

    def _use_threads(self) -> None:
        # torch's number of threads holds for the thread that sets it.
        use_threads(self._torch_threads)

    @property
    def _device_names(self) -> str:
        return ", ".join(map(str, self.devices))

    def _observe_batch(self, lane: Lane[Any, Any], record: BatchRecord) -> None:
        if isinstance(lane, ModelLane):
            if record.failed_rows < record.rows:
                lane.pulse.succeeded_at_s = self.ran_at_s = time.monotonic()
                lane.pulse.has_failed = False
            else:
                lane.pulse.has_failed = True
        labels = labels_of(lane)
        if labels is not None:
            self._observe(*labels, record)


def _scan(store: Path) -> _Scan:
    """What the store looks like now. Raises OSError."""
    stamps: dict[ArtifactRef, Stamp] = {}
    for ref in list_artifacts(store):
        try:
            stamps[ref] = stamp(ref)
        except FileNotFoundError:
            continue  # removed since it was listed
    aliases: dict[str, dict[str, int] | ArtifactRefused] = {}
    for name in {ref.name for ref in stamps}:
        try:
            aliases[name] = read_aliases(store, name)
        except ArtifactRefused as error:
            aliases[name] = error
    return _Scan(stamps, aliases)
