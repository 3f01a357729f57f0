from __future__ import annotations

import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch

from app.artifacts.manifest import Capability
from training.autoencoders import Autoencoder
from training.errors import TrainingError
from training.export import (
    METHODS,
    TOLERANCE,
    ExportedModule,
    export,
    method_inputs,
    self_test_differences,
    self_test_vectors,
    servable,
    signatures,
)
from training.noise import generator
from training.presets import Preset, build_network, get_preset
from training.scores import Scorer


def inputs_of(network: Autoencoder, items: torch.Tensor) -> dict[Capability, tuple[torch.Tensor, ...]]:
    return method_inputs(network.capabilities, network.latent_dim, items, generator(0, "inputs"))


def test_every_capability_has_a_method() -> None:
    """The table of exported methods is the manifest's list of capabilities, each exporting its own name alone."""
    assert set(METHODS) == set(Capability)
    assert all(capability.value in vars(method) for capability, method in METHODS.items())


def test_exported_methods_are_the_capabilities(network: Autoencoder, items: torch.Tensor) -> None:
    """A module exports what its network can do, and nothing else."""
    exported = ExportedModule(export(network, items, generator(0, "check")))
    assert exported.methods == tuple(sorted(network.capabilities))
    assert set(signatures(network.capabilities, (1, 8, 8), network.latent_dim)) == set(network.capabilities)


def test_scripted_equals_eager_in_any_batch(network: Autoencoder, items: torch.Tensor) -> None:
    """Every method answers each row as the eager network does, alone or among 2, 7 or 64."""
    exported = ExportedModule(export(network, items, generator(0, "check")))
    eager = servable(network, Scorer((1, 8, 8)))
    for method, inputs in inputs_of(network, items).items():
        with torch.inference_mode():
            expected = getattr(eager, method)(*inputs)
        for batch_size in (1, 2, 7, 64):
            found = exported.outputs(method, *inputs, batch_size=batch_size)
            wanted = [expected] if isinstance(expected, torch.Tensor) else list(expected)
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_a_row_ignores_its_neighbours(network: Autoencoder, items: torch.Tensor) -> None:
    """Replacing every other row of a batch leaves a row's answers as they were."""
    exported = ExportedModule(export(network, items, generator(0, "check")))
    others = inputs_of(network, torch.zeros_like(items))
    for method, inputs in inputs_of(network, items).items():
        mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip(inputs, others[method], strict=True)]
        found = exported.run(method, *mixed)[0]
        torch.testing.assert_close(found, exported.run(method, *inputs)[0], atol=TOLERANCE, rtol=0)


def test_frozen_equals_not_frozen(network: Autoencoder, items: torch.Tensor) -> None:
    """Freezing with the methods preserved, as the service does, keeps every method and its answers."""
    data = export(network, items, generator(0, "check"))
    plain, frozen = ExportedModule(data), ExportedModule(data).freeze()
    assert frozen.methods == plain.methods
    for method, inputs in inputs_of(network, items).items():
        torch.testing.assert_close(frozen.run(method, *inputs), plain.run(method, *inputs), atol=TOLERANCE, rtol=0)


def test_export_is_deterministic(preset: Preset, items: torch.Tensor) -> None:
    """The same network gives the same bytes, whatever the process exported before."""
    first = export(build_network(preset, (1, 8, 8), 0), items, generator(0, "check"))
    export(build_network(preset, (3, 9, 12), 0), torch.rand(64, 3, 9, 12), generator(0, "check"))
    again = export(build_network(preset, (1, 8, 8), 0), items, generator(0, "check"))
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(again).hexdigest()


def test_the_archive_names_no_path_of_the_machine(network: Autoencoder, items: torch.Tensor) -> None:
    """Source positions of the exporting machine stay out of the file."""
    with zipfile.ZipFile(io.BytesIO(export(network, items, generator(0, "check")))) as archive:
        assert not [name for name in archive.namelist() if "debug" in name]
        assert __file__.rsplit("/tests/", 1)[0].encode() not in b"".join(map(archive.read, archive.namelist()))


def test_a_batch_dependent_network_is_refused(items: torch.Tensor) -> None:
    """A network whose answer for one row depends on the others is not exported."""

    class BatchDependent(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.latent_dim = 64

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) - x.flatten(1).mean(0)

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z.reshape(-1, 1, 8, 8)

    with pytest.raises(TrainingError, match=r"export: encode in batches of 1: .* a difference of"):
        export(BatchDependent(), items, generator(0, "check"))


def test_large_codes_are_compared_by_their_size(items: torch.Tensor) -> None:
    """Codes of any scale are exported: float32 keeps digits of a number, not places behind the point."""
    network = build_network(get_preset("basic-tutorial"), (1, 8, 8), 0)
    code, back = network.bottleneck.code, network.bottleneck.out
    with torch.no_grad():
        code.weight.mul_(1e4)
        back.weight.div_(1e4)
    exported = ExportedModule(export(network, items, generator(0, "check")))
    assert float(exported.run(Capability.ENCODE, items).max()) > 100


def test_bytes_that_are_no_module_are_refused() -> None:
    """Damaged bytes are one clear error."""
    with pytest.raises(TrainingError, match="not a TorchScript archive"):
        ExportedModule(b"no archive")


def test_self_test_vectors_round_trip(network: Autoencoder, items: torch.Tensor) -> None:
    """The vectors are the same bytes each time, and the module that made them reproduces them."""
    exported = ExportedModule(export(network, items, generator(0, "check")))
    methods = signatures(network.capabilities, (1, 8, 8), network.latent_dim)
    data = self_test_vectors(exported, methods, inputs_of(network, items[:5]))
    assert data == self_test_vectors(exported, methods, inputs_of(network, items[:5]))
    with np.load(io.BytesIO(data)) as archive:
        vectors = {key: archive[key] for key in archive.files}
    differences = list(self_test_differences(exported, methods, vectors))
    assert [capability for capability, _, _ in differences] == list(network.capabilities)
    for _, found, expected in differences:
        np.testing.assert_allclose(found, expected, atol=1e-6)
    key = next(key for key in vectors if key.endswith("/in/x"))
    del vectors[key]
    with pytest.raises(TrainingError, match=key):
        list(self_test_differences(exported, methods, vectors))
