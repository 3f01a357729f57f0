"""What an artifact says about itself. Knows neither torch nor HTTP; training writes it, the service reads it."""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, StringConstraints, model_validator

SCHEMA_VERSION: Literal[1] = 1
"""Raised whenever a reader of the previous one could misread a manifest."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
FILE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # a plain name: no separators, so no way out of the folder

ModelName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
FileName = Annotated[str, StringConstraints(pattern=FILE_NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Shape = tuple[PositiveInt, ...]


class Capability(StrEnum):
    """What an artifact may be able to do. The value is the exported method's name; routes write `-` for `_`."""

    ENCODE = "encode"
    DECODE = "decode"
    RECONSTRUCT = "reconstruct"
    DENOISE = "denoise"
    INPAINT = "inpaint"
    ANOMALY_SCORE = "anomaly_score"
    ANOMALY_MAP = "anomaly_map"
    SAMPLE = "sample"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class FileEntry(_Strict):
    """One file of the artifact's folder."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class TensorSpec(_Strict):
    """A float32 tensor that a method takes or gives; `shape` is that of one row, without the batch axis."""

    name: str
    shape: Shape


class Method(_Strict):
    """Signature of an exported method: positional inputs and outputs in order, each with a leading batch axis."""

    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]


class PictureSpec(_Strict):
    """How any picture is brought to the model's input. `app.artifacts.pictures` holds the one implementation."""

    fit: Literal["pad", "stretch", "crop"] = Field(
        "pad", description="Another aspect ratio is padded with the background, stretched, or cropped at the centre."
    )
    resample: Literal["box", "bilinear", "bicubic", "lanczos"] = Field(
        "bilinear", description="Resampling filter; always with antialiasing when the picture shrinks."
    )
    polarity: Literal["light_on_dark"] | None = Field(
        None,
        description="Set where the model was trained on one polarity: a picture whose border is light is then "
        "inverted. None: pictures are never inverted unless the caller asks.",
    )


class InputSpec(_Strict):
    """What one item looks like: a picture (channels, height, width) or a record (features,)."""

    shape: Shape
    range: tuple[float, float] | None = Field(
        None, description="Lowest and highest value of an item; null: any finite number."
    )
    picture: PictureSpec | None = None
    features: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """Number of values in one item."""
        return math.prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """Of a record's features: x0, x1, … where the manifest has none."""
        return self.features or tuple(f"x{index}" for index in range(self.size))

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of the mask that goes with one item: 1 where a value is missing, the same for all channels."""
        return (1, *self.shape[1:]) if len(self.shape) == 3 else self.shape

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.picture is not None:
            if len(self.shape) != 3 or self.shape[0] not in (1, 3):
                raise ValueError(f"shape: a picture is (1 or 3, height, width), found {self.shape}")
            if self.range is None:
                raise ValueError("range: a picture needs one, found null")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range: expected lowest < highest, found {self.range}")
        if self.features is not None and self.shape != (len(self.features),):
            raise ValueError(f"features: {len(self.features)} names for an item of shape {self.shape}")
        return self


class TailEntry(_Strict):
    """How scores go on above the calibration's own: a share `share` lies above `start`, and above s in all
    share · exp(−(s − start) / scale).
    """

    start: float
    scale: float = Field(gt=0)
    share: float = Field(gt=0, lt=1)


class MapScale(_Strict):
    """What values of `anomaly_map` mean, the same for every item: `typical` is shown as 0, `threshold` as 1.

    `typical` is the median over all places of normal items; no more than the share `target_fpr` of normal items
    exceeds `threshold` anywhere.
    """

    typical: float
    threshold: float
    target_fpr: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.typical < self.threshold:
            raise ValueError(f"map: expected typical < threshold, found {self.typical:g} and {self.threshold:g}")
        return self


class CalibrationEntry(_Strict):
    """Which normal data verdicts are measured against. The sorted scores lie in `file`, a float32 .npy of (count,)."""

    id: str
    file: FileName
    count: PositiveInt
    source: str = Field(description="The data set and the part of it that was scored.")
    default_target_fpr: float = Field(0.01, gt=0, lt=1)
    tail: TailEntry | None = Field(
        None, description="For rates finer than the scores support; null: those are refused."
    )
    map: MapScale | None = Field(None, description="Needed for anomaly_map.")


class FusionEntry(_Strict):
    """Weights of a score's parts that were learnt from labelled anomalies: the score is the parts' mean by them."""

    weights: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    source: str = Field(description="The items that they were chosen on.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not sum(self.weights) > 0:
            raise ValueError("fusion.weights: expected at least one above 0")
        return self

    def fuse(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, parts) → scores, (batch,)."""
        weights = np.asarray(self.weights, dtype=np.float32)
        # Row by row: a product's last digits depend on how many rows share it.
        return np.asarray((parts * (weights / weights.sum())).sum(1), dtype=np.float32)


class ProjectionEntry(_Strict):
    """How latent vectors become points of a map: (z − mean) · componentsᵀ, with reference points to draw around them.

    `file` is an .npz with float32 arrays `mean` (latent_dim,), `components` (2, latent_dim), `points` (count, 2) of
    held-out items, and int32 `labels` (count,), indices into the manifest's `labels`, -1 where an item has none.
    """

    file: FileName
    method: str = Field(description="How the components were found, such as pca.")
    count: PositiveInt = Field(description="Number of reference points.")


class Metric(_Strict):
    """A measured quality figure, with what it was measured against and how."""

    value: float
    unit: str
    protocol: str
    baselines: dict[str, float] = Field(default_factory=dict)


class DataProvenance(_Strict):
    """The data that an artifact was made from, and how it was split."""

    name: str
    sha256: Sha256
    split_sha256: Sha256
    counts: dict[str, int]


class TrainingProvenance(_Strict):
    """How the artifact was made; enough to make it again."""

    preset: str
    data: DataProvenance
    seed: int
    config: dict[str, Any]
    epochs: int
    wall_time_s: float
    threads: PositiveInt
    device: str
    parameters: int


class SelfTest(_Strict):
    """Vectors that the served module must reproduce on the machine that serves it.

    `file` is an .npz with arrays `<method>/in/<name>` and `<method>/out/<name>`, each with the batch axis. A value v
    passes against the expected e if |v − e| ≤ absolute_tolerance + relative_tolerance · |e|.
    """

    file: FileName
    absolute_tolerance: float = Field(1e-5, gt=0)
    relative_tolerance: float = Field(1e-4, ge=0)


class Manifest(_Strict):
    """The file `manifest.json` of an artifact."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: ModelName
    version: PositiveInt
    description: str
    created_at: datetime
    torch_version: str = Field(description="The torch that exported the module; an older one may not read it.")
    files: dict[FileName, FileEntry]
    model_file: FileName = "model.pt"
    input: InputSpec
    latent_dim: PositiveInt | None
    capabilities: dict[Capability, Method]
    unsupported: dict[Capability, str] = Field(
        default_factory=dict, description="What the artifact was found unable to do, each with the measured reason."
    )
    default_for: tuple[Capability, ...] = ()
    labels: tuple[str, ...] | None = Field(
        None, description="Names of the classes that `sample` takes the indices of, as a third input."
    )
    interpolation: Literal["linear", "spherical"] = Field(
        "linear", description="The way from one latent vector to another that stays among likely ones."
    )
    components: tuple[str, ...] = Field(
        (),
        description="Names of the score's parts, the columns of the second output of `anomaly_score`: each −log10 of "
        "the share of normal items that are so unusual in it.",
    )
    fusion: FusionEntry | None = Field(
        None, description="Weights of the parts in place of the module's own; null: its own, set without any anomaly."
    )
    projection: ProjectionEntry | None = None
    max_batch_size: PositiveInt = 64
    calibration: CalibrationEntry | None = None
    self_test: SelfTest
    metrics: dict[str, Metric] = Field(default_factory=dict)
    training: TrainingProvenance

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = {"model_file": self.model_file, "self_test.file": self.self_test.file}
        if self.calibration is not None:
            named["calibration.file"] = self.calibration.file
        if self.projection is not None:
            named["projection.file"] = self.projection.file
        calibration = self.calibration
        if calibration is not None and calibration.default_target_fpr < 1 / (calibration.count + 1):
            raise ValueError(
                f"calibration.default_target_fpr: {calibration.count} scores support rates down to "
                f"1/{calibration.count + 1}, found {calibration.default_target_fpr:g}"
            )
        for field, file in named.items():
            if file not in self.files:
                raise ValueError(f"{field}: {file} is not listed under files")
        if not self.capabilities:
            raise ValueError("capabilities: expected at least one")
        for capability in self.default_for:
            if capability not in self.capabilities:
                raise ValueError(f"default_for: {capability} is not among the capabilities")
        if both := self.capabilities.keys() & self.unsupported.keys():
            raise ValueError(f"unsupported: {sorted(both)} are among the capabilities too")
        self._check_scores()
        self._check_signatures()
        return self

    def _check_scores(self) -> None:
        """What verdicts and heat-maps need."""
        if Capability.ANOMALY_SCORE in self.capabilities and self.calibration is None:
            raise ValueError("calibration: needed for anomaly_score, found none")
        if Capability.ANOMALY_MAP in self.capabilities and (self.calibration is None or self.calibration.map is None):
            raise ValueError("calibration.map: needed for anomaly_map, found none")
        if self.components:
            parts = [] if (score := self.capabilities.get(Capability.ANOMALY_SCORE)) is None else score.outputs[1:]
            if [part.shape for part in parts] != [(len(self.components),)]:
                raise ValueError(f"components: {len(self.components)} names, but anomaly_score gives {list(parts)}")
        if self.fusion is not None and len(self.fusion.weights) != len(self.components):
            raise ValueError(f"fusion.weights: expected one for each of the components {self.components}")

    def _check_signatures(self) -> None:
        """The shapes that the service relies on; further outputs after the first are the artifact's own."""
        item, latent = self.input.shape, (self.latent_dim,)
        # The label, an index or -1 for any, comes third where there are labels.
        noise = [(), latent] if self.labels is None else [(), latent, ()]
        expected: dict[Capability, tuple[list[tuple[int | None, ...]], tuple[int | None, ...]]] = {
            Capability.ENCODE: ([item], latent),
            Capability.DECODE: ([latent], item),
            Capability.RECONSTRUCT: ([item], item),
            Capability.DENOISE: ([item], item),
            Capability.INPAINT: ([item, self.input.mask_shape], item),
            Capability.ANOMALY_SCORE: ([item], ()),
            Capability.ANOMALY_MAP: ([item], self.input.mask_shape),
            Capability.SAMPLE: (noise, item),
        }
        for capability, method in self.capabilities.items():
            inputs, output = expected[capability]
            found = [tensor.shape for tensor in method.inputs]
            first = method.outputs[0].shape
            if found != inputs or first != output:
                raise ValueError(f"capabilities.{capability}: expected {inputs} → {output}, found {found} → {first}")
