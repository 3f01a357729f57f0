"""One module on one device: refused by name when it is not what its manifest says, else row by row."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from app.artifacts.manifest import Capability
from app.artifacts.store import Artifact, ArtifactRef, read_artifact
from app.errors import ArtifactRefused
from app.inference.loaded_model import LoadedModel, NotFiniteError, Row, select_devices

CPU = torch.device("cpu")
POISON, NOT_A_NUMBER = 0.9375, 0.96875


@pytest.fixture(scope="module")
def artifact(store: Path) -> Artifact:
    return read_artifact(ArtifactRef("tiny", 2, store / "tiny" / "2"))


@pytest.fixture(scope="module")
def loaded(artifact: Artifact) -> LoadedModel:
    return LoadedModel.load(artifact, CPU)


def changed(artifact: Artifact, *, model: bytes | None = None, vectors: dict[str, np.ndarray] | None = None,
            **manifest: object) -> Artifact:  # fmt: skip
    """The artifact with another module, other self-test vectors or other members in its manifest."""
    files = dict(artifact.files)
    if model is not None:
        files["model.pt"] = model
    if vectors is not None:
        stream = io.BytesIO()
        np.savez(stream, **vectors)  # type: ignore[arg-type]
        files["self_test.npz"] = stream.getvalue()
    return dataclasses.replace(artifact, manifest=artifact.manifest.model_copy(update=manifest), files=files)


def rows_for(loaded: LoadedModel, capability: Capability, count: int) -> list[Row]:
    generator = np.random.default_rng(0)
    shapes = [spec.shape for spec in loaded.manifest.capabilities[capability].inputs]
    return [tuple((generator.random(shape) * 0.9).astype(np.float32) for shape in shapes) for _ in range(count)]


@pytest.mark.parametrize("capability", list(Capability))
def test_batched_equals_single(loaded: LoadedModel, capability: Capability) -> None:
    """A row's outputs do not depend on its neighbours, beyond rounding."""
    rows = rows_for(loaded, capability, 13)
    together = loaded.run(capability, rows)
    for row, answer in zip(rows, together, strict=True):
        (alone,) = loaded.run(capability, [row])
        assert isinstance(answer, tuple)
        assert isinstance(alone, tuple)
        for one, other in zip(alone, answer, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_outputs_have_the_manifests_shapes(loaded: LoadedModel) -> None:
    """Each row's outputs are float32 of the shapes that the manifest names."""
    for capability, method in loaded.manifest.capabilities.items():
        (answer,) = loaded.run(capability, rows_for(loaded, capability, 1))
        assert isinstance(answer, tuple)
        assert [(output.shape, output.dtype) for output in answer] == [
            (spec.shape, np.float32) for spec in method.outputs
        ]


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_that_is_not_finite_fails_alone(loaded: LoadedModel, place: int) -> None:
    """NaN in one row's output is that row's error; the others keep their answers."""
    rows = rows_for(loaded, Capability.ENCODE, 7)
    good = loaded.run(Capability.ENCODE, rows)
    rows[place] = (rows[place][0].copy(),)
    rows[place][0][0, 0, 0] = NOT_A_NUMBER
    for index, answer in enumerate(loaded.run(Capability.ENCODE, rows)):
        if index == place:
            assert isinstance(answer, NotFiniteError)
        else:
            np.testing.assert_array_equal(answer, good[index])


def test_what_the_module_raises_rises(loaded: LoadedModel) -> None:
    """An exception in the forward is the batch's; who isolates it is the batcher."""
    (row,) = rows_for(loaded, Capability.ENCODE, 1)
    row[0][0, 0, 0] = POISON
    with pytest.raises(Exception, match="poisoned row"):
        loaded.run(Capability.ENCODE, [row])


def test_self_test_and_warm_up_run_every_method(artifact: Artifact, loaded: LoadedModel) -> None:
    """The self-test compares every method; the warm-up calls each at growing sizes, and finds one that serves it."""
    assert set(loaded.self_test(artifact)) == set(loaded.manifest.capabilities)
    assert max(loaded.self_test(artifact).values()) < 1e-5
    calls: list[tuple[Capability, int]] = []
    watched = LoadedModel.load(artifact, CPU)
    forward = watched.forward
    watched.forward = lambda c, a: (calls.append((c, len(a[0]))), forward(c, a))[1]  # type: ignore[method-assign]
    best = watched.warm_up(13)
    sizes = {(capability, size) for capability in loaded.manifest.capabilities for size in (1, 2, 4, 8, 13)}
    assert set(calls) == sizes
    assert best == dict.fromkeys(loaded.manifest.capabilities, 13)  # over soon at any size


def test_warm_up_finds_where_batches_stop_paying(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that takes longer for each row of a large batch gets a smaller one, and larger ones are not tried."""
    model = LoadedModel.load(artifact, CPU)
    seconds = {1: 0.010, 2: 0.018, 4: 0.036, 8: 0.2}
    tried: list[int] = []
    monkeypatch.setattr(model, "_time", lambda _capability, size: (tried.append(size), seconds[size])[1])
    assert model.warm_up(64)[Capability.ENCODE] == 4
    assert max(tried) == 8


def saved(scripted: torch.jit.ScriptModule) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
        torch.jit.save(scripted, stream)
    return stream.getvalue()


class OnlyEncode(torch.nn.Module):
    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :5]


@pytest.fixture(scope="module")
def other_module() -> bytes:
    """A module that has `encode` alone, of five numbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
        return saved(torch.jit.script(OnlyEncode()))


def test_missing_method_is_refused_by_name(artifact: Artifact, other_module: bytes) -> None:
    """A module without a method that the manifest lists is refused, naming it."""
    with pytest.raises(ArtifactRefused, match=r"model\.pt: method decode is missing"):
        LoadedModel.load(changed(artifact, model=other_module), CPU)


def test_other_outputs_than_the_manifests_are_refused(artifact: Artifact, other_module: bytes) -> None:
    """A module whose outputs have another shape fails its self-test, and any run."""
    encode = {Capability.ENCODE: artifact.manifest.capabilities[Capability.ENCODE]}
    wrong = changed(artifact, model=other_module, capabilities=encode)
    loaded = LoadedModel.load(wrong, CPU)
    with pytest.raises(ArtifactRefused, match=r"self-test: encode: outputs: expected \[\(3, 4\)\], got \[\(3, 5\)\]"):
        loaded.self_test(wrong)
    with pytest.raises(ValueError, match="outputs: expected"):
        loaded.run(Capability.ENCODE, rows_for(loaded, Capability.ENCODE, 2))


@pytest.mark.parametrize("damage", ["empty", "text", "half", "zeros inside"])
def test_damaged_module_is_refused(artifact: Artifact, damage: str) -> None:
    """Bytes that torch cannot load are refused with one line, whatever torch makes of them."""
    model = artifact.model
    bad = {"empty": b"", "text": b"no archive", "half": model[: len(model) // 2]}
    data = bad.get(damage, model[:300] + bytes(2000) + model[2300:])
    with pytest.raises(ArtifactRefused, match=r"^model\.pt: torch cannot load it: ") as refused:
        LoadedModel.load(changed(artifact, model=data), CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", ["99.0.0", "2.99.1+cu130"])
def test_newer_torch_is_refused(artifact: Artifact, version: str) -> None:
    """A module that a newer torch exported is refused before it is loaded, naming both."""
    with pytest.raises(ArtifactRefused, match=rf"exported with torch {version.replace('+', '.')}, this service runs"):
        LoadedModel.load(changed(artifact, torch_version=version, model=b"never looked at"), CPU)


def test_patch_release_and_build_do_not_matter(artifact: Artifact) -> None:
    """Another patch release or build of the same torch is no reason to refuse."""
    major_minor = ".".join(torch.__version__.split(".")[:2])
    assert LoadedModel.load(changed(artifact, torch_version=f"{major_minor}.99+cu1"), CPU)


SELF_TEST_DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "off by little": (lambda v: v["encode/out/latent"].__iadd__(0.01), r"self-test: encode: latent is off by 0\.01"),
    "one row off": (lambda v: v["sample/out/x"][2].__iadd__(0.01), r"self-test: sample: x is off by 0\.01"),
    "NaN expected": (lambda v: v["decode/out/x"].fill(np.nan), "self-test: decode: x is off by nan"),
    "input missing": (lambda v: v.pop("encode/in/x"), r"self_test\.npz: vectors encode/in/x are missing"),
    "output missing": (lambda v: v.pop("encode/out/latent"), r"self_test\.npz: vectors encode/out/latent are missing"),
    "unequal rows": (
        lambda v: v.update({"encode/in/x": v["encode/in/x"][:2]}),
        r"self_test\.npz: encode: vectors of uneq",
    ),
    "no rows": (
        lambda v: v.update({key: v[key][:0] for key in ("encode/in/x", "encode/out/latent")}),
        r"self_test\.npz: encode: vectors of unequal or no rows",
    ),
    "no axes": (
        lambda v: v.update({"encode/out/latent": np.float32(1)}),
        r"self_test\.npz: encode/out/latent: expected \('n', 4\), found \(\)",
    ),
    "one number for all": (
        lambda v: v.update({"encode/out/latent": v["encode/out/latent"][:, :1]}),
        r"self_test\.npz: encode/out/latent: expected \('n', 4\), found \(3, 1\)",
    ),
    "input of another shape": (
        lambda v: v.update({"encode/in/x": v["encode/in/x"].reshape(3, 64)}),
        r"self_test\.npz: encode/in/x: expected \('n', 1, 8, 8\), found \(3, 64\)",
    ),
    "input that raises": (lambda v: v["encode/in/x"].fill(POISON), "self-test: encode: "),
}


@pytest.mark.parametrize("damage", SELF_TEST_DAMAGE)
def test_failed_self_test_is_refused_by_name(artifact: Artifact, loaded: LoadedModel, damage: str) -> None:
    """Vectors that the module does not reproduce, or that are no vectors, refuse the artifact by method and name."""
    harm, message = SELF_TEST_DAMAGE[damage]
    vectors = artifact.self_test_vectors()
    harm(vectors)
    with pytest.raises(ArtifactRefused, match=message):
        loaded.self_test(changed(artifact, vectors=vectors))


def test_a_device_that_is_not_there_is_named() -> None:
    """Asking for a GPU beyond those of the machine names the setting; the CPU is always there."""
    assert select_devices("cpu") == [CPU]
    assert {device.type for device in select_devices("auto")} == {"cuda" if torch.cuda.is_available() else "cpu"}
    with pytest.raises(ValueError, match=r"device: cuda:77 was asked for, but \d+ CUDA devices are available"):
        select_devices("cuda:77")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("capability", list(Capability))
def test_gpu_equals_cpu(artifact: Artifact, loaded: LoadedModel, capability: Capability) -> None:
    """The same rows give the same outputs on either device, beyond rounding."""
    rows = rows_for(loaded, capability, 5)
    on_gpu = LoadedModel.load(artifact, torch.device("cuda", 0)).run(capability, rows)
    for one, other in zip(loaded.run(capability, rows), on_gpu, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
