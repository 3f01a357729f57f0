"""From a trained network to the module as served, and back: the one file of this package that names `torch.jit`."""

from __future__ import annotations

import functools
import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.artifacts.manifest import Capability, InputSpec, Method, TensorSpec
from training.autoencoders import Autoencoder
from training.errors import TrainingError
from training.sampler import Sampler, prior_sampler
from training.scores import Scorer

TOLERANCE = 1e-5
"""Largest difference between the eager module and the exported one, of records in units of a feature's size."""

CHECKED_BATCH_SIZES = (1, 2, 7, 64)


class _Method(nn.Module):
    if TYPE_CHECKING:  # TorchScript would take the annotation for a type of its own
        network: Autoencoder
        scorer: Scorer


class _Encode(_Method):
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, latent_dim); a variational autoencoder's mu."""
        return self.network.encode(x)


class _Decode(_Method):
    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, *item)."""
        return self.network.decode(z)


class _Reconstruct(_Method):
    @torch.jit.export
    def reconstruct(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, *item)."""
        return self.network.reconstruct(x)


class _Denoise(_Method):
    @torch.jit.export
    def denoise(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, *item): the reconstruction of a network that learnt to answer for clean items."""
        return self.network.reconstruct(x)


class _Inpaint(_Method):
    @torch.jit.export
    def inpaint(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, *item), (batch, 1, height, width) or (batch, features), 1 = missing → (batch, *item).

        What is missing is blanked before the network sees it; what is known comes back as it is.
        """
        restored = self.network.restore(self.network.blank(x, mask), mask)
        return torch.where((mask > 0).expand_as(x), restored, x)


class _AnomalyScore(_Method):
    @torch.jit.export
    def anomaly_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, *item) → (batch,), higher is more anomalous, and what it is the weighted mean of, (batch, parts)."""
        scorer = self.scorer
        seen = self.network.observe(x, scorer.noise, scorer.sigma, scorer.wants)
        parts = scorer.evidence(scorer.complete(x, seen))
        return (parts * scorer.weights).sum(1), parts


class _AnomalyMap(_Method):
    @torch.jit.export
    def anomaly_map(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, 1, height, width) or (batch, features): how unusual each place is.

        Few normal items exceed 1 anywhere.
        """
        scorer = self.scorer
        if scorer.maps_patches:  # whatever the network answers
            places: Tensor = scorer.patches(x)
        else:
            answer = self.network.standardise(self.network.reconstruct(x)).flatten(1)
            places = scorer.map(self.network.standardise(x).flatten(1), answer)
        return places.reshape([x.shape[0]] + scorer.places)  # noqa: RUF005  TorchScript has no stars


class _Sample(_Method):
    if TYPE_CHECKING:
        sampler: Sampler

    @torch.jit.export
    def sample(self, u: Tensor, eps: Tensor) -> Tensor:
        """(batch,), (batch, latent_dim) → (batch, *item).

        `u`, in [0, 1), chooses the component of a mixture; `eps` is standard normal.
        """
        return self.network.decode(self.sampler(u, eps, torch.full_like(u, -1.0)))


class _SampleOfClass(_Method):
    if TYPE_CHECKING:
        sampler: Sampler

    @torch.jit.export
    def sample(self, u: Tensor, eps: Tensor, label: Tensor) -> Tensor:
        """(batch,), (batch, latent_dim), (batch,) → (batch, *item): as `_Sample`; -1 for any class."""
        return self.network.decode(self.sampler(u, eps, label))


METHODS: dict[Capability, type[nn.Module]] = {
    Capability.ENCODE: _Encode,
    Capability.DECODE: _Decode,
    Capability.RECONSTRUCT: _Reconstruct,
    Capability.DENOISE: _Denoise,
    Capability.INPAINT: _Inpaint,
    Capability.ANOMALY_SCORE: _AnomalyScore,
    Capability.ANOMALY_MAP: _AnomalyMap,
    Capability.SAMPLE: _Sample,
}
"""What each capability exports. A class each, so that a module has the methods of its capabilities and no others."""


class Servable(nn.Module):
    """The module as served: a network, with one exported method per capability.

    Made by `servable`, whose class for a set of capabilities inherits their methods.
    """

    def __init__(self, network: Autoencoder, sampler: Sampler | None, scorer: Scorer | None) -> None:
        super().__init__()
        self.network = network
        if scorer is not None:
            self.scorer = scorer
        if sampler is not None:
            self.sampler = sampler


def servable(
    network: Autoencoder, scorer: Scorer | None = None, sampler: Sampler | None = None, classes: int = 0
) -> Servable:
    """The network with the methods of its capabilities, on the CPU in evaluation mode.

    Args:
        scorer: of a network that gives scores.
        sampler: of latent vectors, by default the prior N(0, I).
        classes: how many classes `sample` can be asked for; 0: it takes no label.
    """
    samples = Capability.SAMPLE in network.capabilities
    if samples and sampler is None and network.latent_dim is not None:
        sampler = prior_sampler(network.latent_dim)
    kind = _servable_class(tuple(network.capabilities), of_class=classes > 0)
    return kind(network.cpu().eval(), sampler if samples else None, scorer).eval()


@functools.cache
def _servable_class(capabilities: tuple[Capability, ...], *, of_class: bool) -> type[Servable]:
    methods = METHODS | ({Capability.SAMPLE: _SampleOfClass} if of_class else {})
    return type("Servable", (Servable, *(methods[capability] for capability in capabilities)), {})


class ExportedModule:
    """A module as the artifact's file holds it; owns its weights, on one device."""

    def __init__(self, data: bytes, device: torch.device | str = "cpu") -> None:
        """Loads the bytes of `model.pt`. Raises TrainingError if they are none."""
        self.device = torch.device(device)
        with _deprecation_silenced():
            try:
                self._module = torch.jit.load(io.BytesIO(data), map_location=self.device).eval()  # type: ignore[no-untyped-call]  # torch's
            except RuntimeError as error:
                raise TrainingError(f"model.pt: not a TorchScript archive: {str(error).splitlines()[0]}") from error

    def __repr__(self) -> str:
        return f"ExportedModule({', '.join(self.methods)}; {self.device})"

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the exported methods, sorted."""
        return tuple(sorted(str(name) for name in self._module._c._method_names()))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's parameters and constants by name, as its `load_state_dict` takes them."""
        prefix = "network."
        state = self._module.state_dict()
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    @property
    def scorer(self) -> dict[str, Tensor]:
        """The score's constants by name, as `Scorer.take` takes them."""
        prefix = "scorer."
        state = self._module.state_dict()
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    def freeze(self) -> ExportedModule:
        """Freezes the module as the service does after loading."""
        with _deprecation_silenced():
            self._module = torch.jit.freeze(self._module, preserved_attrs=list(self.methods))
        return self

    def run(self, method: str, *inputs: Tensor, batch_size: int = 256) -> Tensor:
        """The method's first output for inputs of any number of rows; as `outputs`."""
        return self.outputs(method, *inputs, batch_size=batch_size)[0]

    @torch.inference_mode()
    def outputs(self, method: str, *inputs: Tensor, batch_size: int = 256) -> list[Tensor]:
        """The method's outputs for inputs of any number of rows, on the CPU, in batches.

        Raises TrainingError if there is no such method.
        """
        if method not in self.methods:
            raise TrainingError(f"model.pt: expected a method {method}, found {', '.join(self.methods)}")
        call = getattr(self._module, method)
        batches = []
        for start in range(0, len(inputs[0]), batch_size):
            output = call(*(tensor[start : start + batch_size].to(self.device) for tensor in inputs))
            batches.append([part.cpu() for part in ((output,) if isinstance(output, Tensor) else output)])
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def signatures(
    capabilities: Sequence[Capability],
    item_shape: tuple[int, ...],
    latent_dim: int | None,
    classes: int = 0,
    parts: int = 1,
) -> dict[Capability, Method]:
    """Inputs and outputs of each method, as the manifest states them.

    Args:
        latent_dim: None where none has latents.
        classes: how many `sample` can be asked for.
        parts: how many a score has.
    """
    latent = (1 if latent_dim is None else latent_dim,)
    x, z = ("x", item_shape), ("z", latent)
    noise: list[tuple[str, tuple[int, ...]]] = [("u", ()), ("eps", latent), *([("label", ())] if classes else [])]
    places = InputSpec(shape=item_shape).mask_shape
    mask = ("mask", places)
    table: dict[Capability, tuple[list[tuple[str, tuple[int, ...]]], tuple[str, tuple[int, ...]]]] = {
        Capability.ENCODE: ([x], ("latent", latent)),
        Capability.DECODE: ([z], ("reconstruction", item_shape)),
        Capability.RECONSTRUCT: ([x], ("reconstruction", item_shape)),
        Capability.DENOISE: ([x], ("denoised", item_shape)),
        Capability.INPAINT: ([x, mask], ("inpainted", item_shape)),
        Capability.ANOMALY_SCORE: ([x], ("score", ())),
        Capability.ANOMALY_MAP: ([x], ("map", places)),
        Capability.SAMPLE: (noise, ("sample", item_shape)),
    }
    return {
        capability: Method(
            inputs=tuple(TensorSpec(name=name, shape=shape) for name, shape in table[capability][0]),
            outputs=(
                TensorSpec(name=table[capability][1][0], shape=table[capability][1][1]),
                *([TensorSpec(name="parts", shape=(parts,))] if capability is Capability.ANOMALY_SCORE else []),
            ),
        )
        for capability in capabilities
    }


def export(
    network: Autoencoder,
    items: Tensor,
    noise: torch.Generator,
    scorer: Scorer | None = None,
    sampler: Sampler | None = None,
    classes: int = 0,
) -> bytes:
    """The bytes of `model.pt`, checked against the eager network; the same network gives the same bytes.

    Args:
        network: trained.
        items: float32 items to check with, (at least 64, *item).
        noise: where the other methods' inputs are drawn from.
        scorer: by default the plain mean squared error.
        sampler, classes: what `sample` draws from, and of how many classes; by default the prior, without classes.

    Raises TrainingError if an exported method differs from the eager one by more than TOLERANCE, or if a row's
    answer depends by more than that on how many rows share its batch.
    """
    if scorer is None and Capability.ANOMALY_SCORE in network.capabilities:
        scorer = Scorer(tuple(items.shape[1:]))
    eager = servable(network, scorer, sampler, classes)
    with _deprecation_silenced():
        _forget_scripted_classes()
        scripted = torch.jit.script(eager)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
    data = _canonical(buffer.getvalue())
    exported = ExportedModule(data)
    expected_methods = tuple(sorted(network.capabilities))
    if exported.methods != expected_methods:
        raise TrainingError(f"export: expected the methods {expected_methods}, found {exported.methods}")
    for method, inputs in method_inputs(network.capabilities, network.latent_dim, items, noise, classes).items():
        with torch.inference_mode():
            expected = getattr(eager, method)(*inputs)
        for batch_size in CHECKED_BATCH_SIZES:
            outputs = exported.outputs(method, *inputs, batch_size=batch_size)
            for found, wanted in zip(outputs, [expected] if isinstance(expected, Tensor) else expected, strict=True):
                # Records have units of their own, and so have codes that no training scales (of ReLU units, say):
                # float32 keeps so many digits of a number, whatever its size.
                own_units = items.dim() == 2 or method is Capability.ENCODE
                scale = wanted.abs().amax(0).clamp_min(1) if own_units else torch.ones(())
                if method is Capability.ANOMALY_SCORE:
                    # Evidence grows without bound, and is steep where normal items hardly differ.
                    scale = 5 * wanted.abs().clamp_min(1)
                difference = float(((found - wanted).abs() / scale).max())
                if not difference <= TOLERANCE:
                    raise TrainingError(
                        f"export: {method} in batches of {batch_size}: expected the eager network's answer within "
                        f"{TOLERANCE}, found a difference of {difference:.2g}"
                    )
    return data


def method_inputs(
    capabilities: Sequence[Capability],
    latent_dim: int | None,
    items: Tensor,
    noise: torch.Generator,
    classes: int = 0,
) -> dict[Capability, tuple[Tensor, ...]]:
    """Inputs for every method, as many rows as `items`: the items themselves where it takes items, else noise."""
    rows = len(items)
    z, eps = (torch.randn(rows, latent_dim or 1, generator=noise) for _ in range(2))
    u = torch.rand(rows, generator=noise)
    label = (torch.arange(rows) % (classes + 1) - 1).float()  # any, then each class
    mask_shape = InputSpec(shape=tuple(items.shape[1:])).mask_shape
    mask = torch.rand(rows, *mask_shape, generator=noise).round()
    special = {
        Capability.DECODE: (z,),
        Capability.SAMPLE: (u, eps, label) if classes else (u, eps),
        Capability.INPAINT: (items, mask),
    }
    return {capability: special.get(capability, (items,)) for capability in capabilities}


def self_test_vectors(
    exported: ExportedModule, methods: Mapping[Capability, Method], inputs: Mapping[Capability, tuple[Tensor, ...]]
) -> bytes:
    """The bytes of an .npz with each method's inputs and answers, as the manifest's SelfTest describes it."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for capability, method in methods.items():
        for spec, tensor in zip(method.inputs, inputs[capability], strict=True):
            arrays[f"{capability}/in/{spec.name}"] = tensor.numpy()
        for spec, tensor in zip(method.outputs, exported.outputs(capability, *inputs[capability]), strict=True):
            arrays[f"{capability}/out/{spec.name}"] = tensor.numpy()
    return npz_bytes({key: array.astype("<f4") for key, array in arrays.items()})


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of an .npz; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key in sorted(arrays):
            member = io.BytesIO()
            np.save(member, np.ascontiguousarray(arrays[key]), allow_pickle=False)
            archive.writestr(_undated(f"{key}.npy", zipfile.ZIP_DEFLATED), member.getvalue())
    return buffer.getvalue()


def self_test_differences(
    exported: ExportedModule, methods: Mapping[Capability, Method], vectors: Mapping[str, NDArray[np.float32]]
) -> Iterator[tuple[Capability, NDArray[np.float32], NDArray[np.float32]]]:
    """Runs the stored inputs of every method: (method, found, expected). Raises TrainingError if one is missing."""
    for capability, method in methods.items():
        keys = [f"{capability}/in/{spec.name}" for spec in method.inputs]
        outputs = [f"{capability}/out/{spec.name}" for spec in method.outputs]
        if missing := [key for key in (*keys, *outputs) if key not in vectors]:
            raise TrainingError(f"self-test: expected the arrays {missing}, found {sorted(vectors)}")
        found = exported.outputs(capability, *(torch.from_numpy(vectors[key].copy()) for key in keys))
        together = [
            np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)
            for arrays in ([tensor.numpy() for tensor in found], [vectors[key] for key in outputs])
        ]
        yield capability, together[0], together[1]


class _Classify(nn.Module):
    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, classes): probabilities."""
        return torch.softmax(self.head(self.encoder.encode(x)), dim=1)  # type: ignore[operator]


def export_classifier(model: bytes, head: nn.Module) -> bytes:
    """A TorchScript module of an artifact's encoder and a head: float32 items → class probabilities.

    Args:
        model: the artifact's `model.pt`, which has `encode`.
        head: (batch, latent_dim) → (batch, classes), logits.
    """
    with _deprecation_silenced():
        encoder = torch.jit.load(io.BytesIO(model)).eval()  # type: ignore[no-untyped-call]  # torch's
        scripted = torch.jit.script(_Classify(encoder, head).eval())
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
    return _canonical(buffer.getvalue())


def _forget_scripted_classes() -> None:
    """Has TorchScript name classes as a fresh process would. What was scripted before must not be called any more."""
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()


def _canonical(data: bytes) -> bytes:
    """A TorchScript archive without what differs between equal modules.

    Source positions name files of the exporting machine, and a class whose name is taken gets a number from a counter
    that the process never resets. Members stay uncompressed, as torch writes them.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    numbers: dict[bytes, bytes] = {}

    def renumber(match: re.Match[bytes]) -> bytes:
        return match[1] + numbers.setdefault(match[2], str(len(numbers)).encode())

    mangled = re.compile(rb"(___torch_mangle_)(\d+)")
    canonical = {}
    for name, content in members.items():
        if name.endswith(".debug_pkl") or name == ".data/serialization_id":
            continue
        # In code and in pickles such a name ends at a dot or a line's end, so its length may change.
        is_text = name.endswith((".py", ".pkl"))
        new_name = mangled.sub(renumber, name.encode()).decode()
        canonical[new_name] = mangled.sub(renumber, content) if is_text else content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(canonical):
            archive.writestr(_undated(f"model/{name}", zipfile.ZIP_STORED), canonical[name])
    return buffer.getvalue()


def _undated(name: str, compression: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = compression
    return entry


@contextmanager
def _deprecation_silenced() -> Iterator[None]:
    """Silences TorchScript's own deprecation, and no other warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=re.escape("`torch.jit.") + ".*is deprecated")
        yield
