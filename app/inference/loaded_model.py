"""One TorchScript module on one device: load, self-test, warm up, run. Knows nothing of HTTP, queues or asyncio.

The only file of the service that names `torch.jit`.
"""

from __future__ import annotations

import io
import re
import threading
import time
import warnings
import zipfile
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from app.artifacts.manifest import Capability, Manifest, Method, TensorSpec
from app.artifacts.store import Artifact
from app.errors import ArtifactRefused, DeviceLost, OutOfMemory

Row = tuple[NDArray[np.float32], ...]
"""A method's arguments, or its outputs, for one item: float32 arrays without the batch axis."""

# torch.jit.load is not thread-safe, and neither is the warnings filter.
_LOAD_LOCK = threading.Lock()
_WARM_UP_CALLS = 4  # the profiling executor specialises on the second call of a shape
_HARDLY_LONGER, _CLEARLY_LONGER = 1.1, 1.5  # ratios of times for a row
_SOON_S = 0.01


# After one of these no call on the device succeeds any more until the process has ended: CUDA's sticky errors.
_STICKY_CODES = frozenset({46, 100, 214, 220, 221, 226, *range(700, 721), 802, 803, 999})
_STICKY_MESSAGE = re.compile(
    r"CUDA error: (?!out of memory|invalid (argument|configuration|value))|device-side assert|illegal memory access"
    r"|illegal instruction|misaligned address|unspecified launch failure|uncorrectable ECC|fallen off the bus"
    r"|launch timed out|device (is|was)? ?lost|hardware stack error"
    r"|(CUDNN|CUBLAS)_STATUS_EXECUTION_FAILED",
    re.IGNORECASE,
)


_TENSOR_FILE = re.compile(r"/(data|constants)/\d+$")


class NotFiniteError(ArithmeticError):
    """A model's output for one item holds NaN or an infinity."""


def select_devices(wanted: str) -> list[torch.device]:
    """The devices of that name: `auto` is every CUDA device, or the CPU where there is none; `cuda` is every one.

    Raises ValueError if the machine has no such device.
    """
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted in ("auto", "cuda") and count:
        return [torch.device("cuda", index) for index in range(count)]
    if wanted in ("auto", "cpu"):
        return [torch.device("cpu")]
    device = torch.device(wanted)
    if (device.index or 0) >= count:
        raise ValueError(f"device: {wanted} was asked for, but {count} CUDA devices are available")
    return [device]


def is_sticky(error: BaseException) -> bool:
    """Whether an error says that the device is lost to this process, by its code or, where it has none, its message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return False
    code = getattr(error, "error_code", None)
    if isinstance(code, int):
        return code in _STICKY_CODES
    return isinstance(error, RuntimeError) and _STICKY_MESSAGE.search(str(error)) is not None


def use_threads(count: int) -> None:
    """Lets forward passes of the calling thread use that many threads of a CPU."""
    torch.set_num_threads(count)


def tensor_bytes(artifact: Artifact) -> int:
    """How much memory the module's parameters and buffers will take, from the directory of its archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(artifact.model)) as archive:
            return sum(entry.file_size for entry in archive.infolist() if _TENSOR_FILE.search(entry.filename))
    except zipfile.BadZipFile:
        return len(artifact.model)  # nothing that could be loaded


class LoadedModel:
    """A frozen module on its device. All of its methods run on the device's one worker thread."""

    def __init__(
        self, manifest: Manifest, module: torch.jit.ScriptModule, device: torch.device, memory_bytes: int
    ) -> None:
        self.manifest = manifest
        self.device = device
        self.memory_bytes = memory_bytes
        # Only its methods: the Python object around the module is part of a cycle, and would stay until collected.
        self._methods = {capability: getattr(module, capability) for capability in manifest.capabilities}

    def __repr__(self) -> str:
        return f"<LoadedModel {self.manifest.name}:{self.manifest.version} on {self.device}>"

    @classmethod
    def load(cls, artifact: Artifact, device: torch.device) -> LoadedModel:
        """The artifact's module on `device`, loaded from the verified bytes.

        Raises ArtifactRefused if torch is older than the exporting one, cannot read it, or a method is missing.
        """
        manifest = artifact.manifest
        if _release(torch.__version__) < _release(manifest.torch_version):
            raise ArtifactRefused(
                f"{manifest.model_file}: exported with torch {manifest.torch_version}, "
                f"this service runs {torch.__version__}, which is older"
            )
        names = [str(capability) for capability in manifest.capabilities]
        with _LOAD_LOCK, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
            try:
                module = torch.jit.load(io.BytesIO(artifact.model), map_location=device)  # type: ignore[no-untyped-call]  # torch
            except Exception as error:  # torch raises whatever the bytes lead it to
                raise ArtifactRefused(f"{manifest.model_file}: torch cannot load it: {_first_line(error)}") from error
            for name in names:
                if not callable(getattr(module, name, None)):
                    raise ArtifactRefused(f"{manifest.model_file}: method {name} is missing")
            # Before freezing, which makes constants of them.
            tensors = [*module.parameters(), *module.buffers()]
            memory_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            try:
                module = torch.jit.freeze(module.eval(), preserved_attrs=names)
            except Exception as error:
                raise ArtifactRefused(f"{manifest.model_file}: cannot be frozen: {_first_line(error)}") from error
        return cls(manifest, module, device, memory_bytes)

    def run(self, capability: Capability, rows: Sequence[Row]) -> list[Row | Exception]:
        """The method's outputs for each row; a row whose outputs are not finite gets a NotFiniteError in their place.

        Raises whatever the module raises, for the whole batch, and ValueError if an output has another shape than
        the manifest says; OutOfMemory; DeviceLost after a sticky error.
        """
        method = self.manifest.capabilities[capability]
        arguments = [_stacked(column) for column in zip(*rows, strict=True)]  # each (batch, …)
        try:
            outputs = self.forward(capability, arguments)
        except (MemoryError, torch.OutOfMemoryError) as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(f"{capability}: {len(rows)} rows: {_first_line(error)}") from error
        except Exception as error:
            if is_sticky(error):
                raise DeviceLost(f"{self.device} is lost: {_first_line(error)}") from error
            raise
        _check_shapes(method, outputs, len(rows))
        results: list[Row] = list(zip(*outputs, strict=True))
        if all(np.isfinite(output).all() for output in outputs):
            return [*results]
        failure = NotFiniteError(f"{capability} gave a number that is not finite")
        return [row if all(np.isfinite(output).all() for output in row) else failure for row in results]

    def forward(self, capability: Capability, arguments: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """One call of the exported method: arrays with a batch axis in, arrays with a batch axis out."""
        with torch.inference_mode():
            tensors = [self._to_device(argument) for argument in arguments]
            given = self._methods[capability](*tensors)
            outputs = given if isinstance(given, tuple) else (given,)
            return [_to_array(output) for output in outputs]

    def self_test(self, artifact: Artifact) -> dict[Capability, float]:
        """Runs every method on the artifact's own vectors, alone and batched, and compares.

        Returns the largest absolute difference by method. Raises ArtifactRefused beyond the manifest's tolerance.
        """
        vectors = artifact.self_test_vectors()
        tolerance = self.manifest.self_test
        worst: dict[Capability, float] = {}
        for capability, method in self.manifest.capabilities.items():
            arguments = _vectors(vectors, method.inputs, f"{capability}/in/", tolerance.file)
            expected = _vectors(vectors, method.outputs, f"{capability}/out/", tolerance.file)
            batch_sizes = {len(array) for array in (*arguments, *expected)}
            if len(batch_sizes) != 1 or 0 in batch_sizes:
                raise ArtifactRefused(f"{tolerance.file}: {capability}: vectors of unequal or no rows")
            for rows in (slice(None), slice(0, 1)):
                found = self._self_test_outputs(capability, method, [a[rows] for a in arguments])
                for spec, got, want in zip(method.outputs, found, expected, strict=True):
                    off = np.abs(got - want[rows])
                    allowed = tolerance.absolute_tolerance + tolerance.relative_tolerance * np.abs(want[rows])
                    if not (off <= allowed).all():  # a NaN is not ≤ either
                        raise ArtifactRefused(
                            f"self-test: {capability}: {spec.name} is off by {off.max():.3g}, "
                            f"expected at most {tolerance.absolute_tolerance:g}"
                        )
                    worst[capability] = max(worst.get(capability, 0.0), float(off.max(initial=0.0)))
        return worst

    def warm_up(self, max_batch_size: int) -> dict[Capability, int]:
        """Runs every method at growing batch sizes, so that no caller pays for compilation, and times them.

        Returns each method's best batch size on this machine, at most `max_batch_size`: the largest that takes hardly
        longer for each row than the best one does. Batching does not always pay: a network whose activations leave the
        processor's cache takes longer for each row of a batch than for a row alone.
        """
        return {capability: self._best_batch_size(capability, max_batch_size) for capability in self._methods}

    def _best_batch_size(self, capability: Capability, most: int) -> int:
        best_s, best_size, size = float("inf"), 1, 1
        while True:
            batch_s = self._time(capability, size)
            row_s = batch_s / size
            # A batch that is over soon costs nobody anything, and what it takes is too short to be told from noise.
            if row_s <= best_s * _HARDLY_LONGER or batch_s < _SOON_S:
                best_size = size
            best_s = min(best_s, row_s)
            if size == most or (row_s > best_s * _CLEARLY_LONGER and batch_s >= _SOON_S):
                return best_size
            size = min(2 * size, most)

    def _time(self, capability: Capability, batch_size: int) -> float:
        """Seconds of the fastest of some calls: whatever else the machine does only makes a call slower."""
        low, high = self.manifest.input.range or (-1.0, 1.0)
        middle = np.float32((low + high) / 2)
        inputs = self.manifest.capabilities[capability].inputs
        arguments = [np.full((batch_size, *spec.shape), middle, np.float32) for spec in inputs]
        times = []
        for _ in range(_WARM_UP_CALLS):
            started = time.perf_counter()
            self.forward(capability, arguments)
            times.append(time.perf_counter() - started)
        return min(times)

    def _to_device(self, array: NDArray[np.float32]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _self_test_outputs(
        self, capability: Capability, method: Method, arguments: list[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        try:
            outputs = self.forward(capability, arguments)
            _check_shapes(method, outputs, len(arguments[0]))
        except Exception as error:  # whatever the module raises, the artifact is refused for it
            raise ArtifactRefused(f"self-test: {capability}: {_first_line(error)}") from error
        return outputs


def _stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows of one shape, each contiguous in memory, as one writable array.

    np.stack copies them one by one, and for each lets go of the interpreter, which the event loop's thread then keeps
    for a while.
    """
    together = np.frombuffer(bytearray().join(row.data for row in rows), np.float32)
    return together.reshape(len(rows), *rows[0].shape)


def _to_array(output: torch.Tensor) -> NDArray[np.float32]:
    # Not even asked to do nothing: each call of torch gives the interpreter to the event loop's thread, and waits for
    # it to come back.
    if output.dtype != torch.float32:
        output = output.float()
    if not output.is_cpu:
        output = output.cpu()
    return cast("NDArray[np.float32]", output.numpy())


def _check_shapes(method: Method, outputs: Sequence[NDArray[np.float32]], batch_size: int) -> None:
    expected = [(batch_size, *spec.shape) for spec in method.outputs]
    found = [output.shape for output in outputs]
    if found != expected:
        raise ValueError(f"outputs: expected {expected}, got {found}")


def _vectors(
    vectors: dict[str, NDArray[np.float32]], specs: Sequence[TensorSpec], prefix: str, file: str
) -> list[NDArray[np.float32]]:
    found = []
    for spec in specs:
        key = f"{prefix}{spec.name}"
        if key not in vectors:
            raise ArtifactRefused(f"{file}: vectors {key} are missing")
        array = vectors[key]
        if array.ndim != len(spec.shape) + 1 or array.shape[1:] != spec.shape:
            raise ArtifactRefused(f"{file}: {key}: expected {('n', *spec.shape)}, found {array.shape}")
        found.append(array)
    return found


def _release(version: str) -> tuple[int, ...]:
    """Major and minor of a version such as 2.14.1+cpu."""
    return tuple(int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:2])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
