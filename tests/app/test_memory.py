"""What is in memory: first uses load once, the least recently used goes, the pinned stays, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from app import catalog as catalog_module
from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef, list_artifacts, read_artifact
from app.catalog import Catalog, State, Wish
from app.errors import ModelUnavailable
from app.inference.loaded_model import LoadedModel, tensor_bytes

NAMES = ("a", "b", "c", "d")
ROW = (np.full((1, 8, 8), 0.25, np.float32),)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, write_artifact_named: Callable[..., ArtifactRef]) -> Path:
    """Four models of the same size."""
    store = tmp_path_factory.mktemp("memory")
    for name in NAMES:
        write_artifact_named(store, name)
    return store


def in_catalog(store: Path, look: Callable[[Catalog], Awaitable[None]], fits: int = 4, **options: object) -> None:
    """A catalog with room for so many of the store's models."""
    budget = fits * tensor_bytes(read_artifact(next(iter(list_artifacts(store)))))

    async def run() -> None:
        limits = {"max_queue_rows": 100, "max_queue_bytes": 100_000, "memory_bytes": budget}
        async with Catalog(store, [torch.device("cpu")], **limits, **options) as catalog:  # type: ignore[arg-type]
            await catalog.loaded()
            await look(catalog)
            assert catalog.memory_bytes <= budget

    asyncio.run(run())


async def ask(catalog: Catalog, name: str, timeout_s: float = 30) -> None:
    served = catalog.find(name, Capability.ENCODE)
    await served.run(Capability.ENCODE, [ROW], timeout_s=timeout_s, caller="", priority=0)


def ready(catalog: Catalog) -> str:
    return "".join(name for name in NAMES if catalog.models[name][0].state is State.READY)


def test_least_recently_used_goes_first(names: Path) -> None:
    """What fits is loaded at the start; a first use takes the place of what was used longest ago."""

    async def look(catalog: Catalog) -> None:
        assert ready(catalog) == "ab"
        assert catalog.models["c"][0].reason == "not in memory; the next request for it loads it"
        for name, expected in (("a", "ab"), ("c", "ac"), ("d", "cd"), ("c", "cd"), ("a", "ac")):
            await ask(catalog, name)
            assert ready(catalog) == expected

    in_catalog(names, look, fits=2)


@pytest.mark.parametrize("option", ["required_models", "pinned_models", "default_model"])
def test_pinned_models_stay(names: Path, option: str) -> None:
    """Required, pinned and default models are loaded first and never evicted, however long nobody asks for them."""

    async def look(catalog: Catalog) -> None:
        assert ready(catalog) == "ad"
        for name in ("a", "b", "c"):
            await ask(catalog, name)
            assert "d" in ready(catalog)

    in_catalog(names, look, fits=2, **{option: "d" if option == "default_model" else ("d",)})


def test_no_room_beside_the_pinned_says_so(names: Path) -> None:
    """Where the pinned models leave no room, the others are unavailable, with the numbers."""

    async def look(catalog: Catalog) -> None:
        with pytest.raises(ModelUnavailable, match=r"model: a:1 needs \d+ bytes; of \d+ for models, others hold \d+"):
            await ask(catalog, "a")
        await ask(catalog, "d")

    in_catalog(names, look, fits=1, pinned_models=("d",))


def test_concurrent_first_requests_load_once(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests for what is not in memory share one loading, also when the first of them leaves."""
    read: list[str] = []
    monkeypatch.setattr(catalog_module, "read_artifact", lambda ref: (read.append(ref.name), read_artifact(ref))[1])

    async def look(catalog: Catalog) -> None:
        read.clear()
        asked = [asyncio.create_task(ask(catalog, "d")) for _ in range(20)]
        await asyncio.sleep(0)
        asked[0].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == [None] * 19
        assert read == ["d"]

    in_catalog(names, look, fits=2)


def test_damage_found_at_the_first_use_is_told(names: Path, tmp_path: Path) -> None:
    """A model that was damaged since it was verified is refused when it is needed, and the others serve."""
    import shutil

    shutil.copytree(names, tmp_path / "store")

    async def look(catalog: Catalog) -> None:
        (tmp_path / "store" / "d" / "1" / "model.pt").write_bytes(b"no model")
        with pytest.raises(ModelUnavailable, match=r"model: d:1 was refused: model\.pt: expected"):
            await ask(catalog, "d")
        assert catalog.models["d"][0].state is State.REFUSED
        await ask(catalog, "c")

    in_catalog(tmp_path / "store", look, fits=2)


def test_unloading_gives_memory_back_without_a_collection(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unloaded model is gone at once, though what was there at the start is never looked at by the collector."""
    loaded: list[weakref.ref[LoadedModel]] = []
    prepare = Catalog._prepare

    def watched(self: Catalog, artifact: object) -> object:
        replicas = prepare(self, artifact)  # type: ignore[arg-type]
        loaded.extend(weakref.ref(replica.model) for replica in replicas)
        return replicas

    monkeypatch.setattr(Catalog, "_prepare", watched)

    async def look(catalog: Catalog) -> None:
        await ask(catalog, "a")
        assert len([model for model in loaded if model() is not None]) == 4
        gc.disable()
        try:
            held = catalog.find("b", Capability.ENCODE)
            for name in NAMES:
                await catalog.follow({name: Wish(is_unloaded=True) for name in NAMES}, name)
            assert len([model for model in loaded if model() is not None]) == 1
            await held.run(Capability.ENCODE, [ROW], timeout_s=30, caller="", priority=0)
            del held
            for _ in range(10_000):  # until the thread that ran it lets go of it
                await asyncio.sleep(0)
                if all(model() is None for model in loaded):
                    break
            assert [model() for model in loaded] == [None] * 4
        finally:
            gc.enable()
            gc.unfreeze()

    in_catalog(names, look)
