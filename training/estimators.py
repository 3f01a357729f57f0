"""Autoencoders as scikit-learn has its estimators: a transformer and an outlier detector, for pipelines and searches.

Both wrap an artifact where one is named; else `fit` trains a small autoencoder on the records it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, OutlierMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from app.artifacts.manifest import Capability
from app.artifacts.store import Artifact
from training.autoencoders import Autoencoder
from training.calibrate import scores_of
from training.errors import TrainingError
from training.export import ExportedModule
from training.loop import train
from training.losses import mean_squared_error
from training.presets import build_network, get_preset, override
from training.progress import Silent
from training.run import open_artifact

Array = NDArray[Any]


class _Estimator(BaseEstimator):
    """What both have in common: where the network comes from, and how records reach it.

    Args:
        artifact: `name` or `name:version`, to be wrapped as it is: `fit` then only checks the records. Pictures are
            rows of their values, 0 to 1, channel by channel, line by line.
        store: the artifact's folder.
        preset, settings: without an artifact, what is trained, as `python -m training train PRESET --set …` takes it.
        latent_dim: by default the preset's, and no more than half of the features, rounded up.
        random_state: the seed.
    """

    def __init__(
        self,
        artifact: str | None = None,
        *,
        store: str | Path = "models_store",
        preset: str = "basic",
        settings: Sequence[str] = (),
        latent_dim: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.artifact = artifact
        self.store = store
        self.preset = preset
        self.settings = settings
        self.latent_dim = latent_dim
        self.random_state = random_state

    def _fit(self, x: Any, needed: Capability) -> Array:
        """Trains or opens the network: `network_` or `artifact_`. Raises ValueError."""
        x = validate_data(self, x, dtype=(np.float64, np.float32), ensure_min_samples=2)
        try:
            if self.artifact is not None:
                self.artifact_ = _open(self.artifact, Path(self.store), needed)
                self._items(x)  # refuses other shapes and ranges
            else:
                self.network_ = self._train(torch.from_numpy(np.array(x, dtype=np.float32)))
        except TrainingError as error:
            raise ValueError(str(error)) from error
        return x

    def _train(self, items: Tensor) -> Autoencoder:
        preset = override(get_preset(self.preset), self.settings)
        own = getattr(preset.bottleneck, "latent_dim", 1)
        latent_dim = self.latent_dim or min(own, (items.shape[1] + 1) // 2)
        preset = override(preset, [f"latent_dim={latent_dim}"])
        network = build_network(preset, tuple(items.shape[1:]), self.random_state)
        network, _ = train(
            network,
            items,
            items,
            preset.optimisation,
            preset.corruption,
            seed=self.random_state,
            device=torch.device("cpu"),
            progress=Silent(),
        )
        network.standardise_latent(items)
        # In double precision no answer depends on how many rows share its batch, not even in the last digit.
        return network.double()

    def _items(self, x: Array) -> Tensor:
        """Rows as the artifact takes them. Raises ValueError."""
        spec = self.artifact_.manifest.input
        if x.shape[1] != int(np.prod(spec.shape)):
            raise ValueError(
                f"X: expected rows of {int(np.prod(spec.shape))} values, an item of {spec.shape} each, "
                f"found {x.shape[1]}"
            )
        if spec.range is not None and (x.min() < spec.range[0] or x.max() > spec.range[1]):
            raise ValueError(f"X: expected values in {spec.range}, found {x.min():g} to {x.max():g}")
        return torch.from_numpy(np.array(x, dtype=np.float32)).view(-1, *spec.shape)

    def _run(self, method: Literal["encode", "score"], x: Any) -> Array:
        check_is_fitted(self, "n_features_in_")
        x = validate_data(self, x, dtype=(np.float64, np.float32), reset=False)
        if self.artifact is not None:
            exported, items = self._exported(), self._items(x)
            if method == "score":
                return scores_of(exported, items, self.artifact_.manifest.fusion).astype(x.dtype)
            found = exported.run(Capability.ENCODE, items)
        else:
            with torch.inference_mode():
                items = torch.from_numpy(np.array(x, dtype=np.float64))
                found = self.network_.encode(items) if method == "encode" else _errors(self.network_, items)
        return found.numpy().astype(x.dtype)

    def _exported(self) -> ExportedModule:
        return ExportedModule(self.artifact_.model)


class AutoencoderTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Estimator):
    """Records to latent vectors, and back."""

    def fit(self, X: Any, y: None = None) -> Self:
        """Trains on X, (samples, features), or opens the artifact. Raises ValueError."""
        del y
        x = self._fit(X, Capability.ENCODE)
        self._n_features_out = self._run("encode", x[:1]).shape[1]
        return self

    def transform(self, X: Any) -> Array:
        """(samples, features) → (samples, latent_dim)."""
        return self._run("encode", X)

    def inverse_transform(self, X: Any) -> Array:
        """(samples, latent_dim) → (samples, features). Raises ValueError for an artifact that cannot decode."""
        check_is_fitted(self, "n_features_in_")
        z = np.asarray(X)
        if self.artifact is None:
            with torch.inference_mode():
                return self.network_.decode(torch.from_numpy(z.astype(np.float64))).numpy()
        try:
            found = self._exported().run(Capability.DECODE, torch.from_numpy(z.astype(np.float32)))
        except TrainingError as error:
            raise ValueError(str(error)) from error
        return found.flatten(1).numpy()


class AutoencoderOutlierDetector(OutlierMixin, _Estimator):
    """Which records are unlike the rest.

    Args:
        contamination: the share of what `fit` was given that is taken for outliers; with an artifact, of normal items,
            judged by its calibration.

    Attributes:
        offset_: `predict` answers -1 where `score_samples` lies below it.
    """

    def __init__(
        self,
        artifact: str | None = None,
        *,
        contamination: float = 0.05,
        store: str | Path = "models_store",
        preset: str = "basic",
        settings: Sequence[str] = (),
        latent_dim: int | None = None,
        random_state: int = 0,
    ) -> None:
        super().__init__(
            artifact, store=store, preset=preset, settings=settings, latent_dim=latent_dim, random_state=random_state
        )
        self.contamination = contamination

    def fit(self, X: Any, y: None = None) -> Self:
        """Trains on X, (samples, features), or opens the artifact. Raises ValueError."""
        del y
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination: expected a share in (0, 0.5], found {self.contamination}")
        x = self._fit(X, Capability.ANOMALY_SCORE)
        if self.artifact is None:
            self.offset_ = float(np.percentile(self.score_samples(x), 100 * self.contamination))
        else:
            self.offset_ = _calibrated_offset(self.artifact_, self.contamination)
        return self

    def score_samples(self, X: Any) -> Array:
        """The opposite of the anomaly score: lower is more anomalous, (samples,)."""
        return -self._run("score", X)

    def decision_function(self, X: Any) -> Array:
        """`score_samples` less `offset_`: negative for outliers, (samples,)."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """1 for inliers, -1 for outliers, (samples,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)


def _errors(network: Autoencoder, x: Tensor) -> Tensor:
    """Mean squared error of the reconstruction in standardised units, (batch,)."""
    return mean_squared_error(network.standardise(network.reconstruct(x)), network.standardise(x))


def _open(reference: str, store: Path, needed: Capability) -> Artifact:
    artifact = open_artifact(reference, store)
    if needed not in artifact.manifest.capabilities:
        raise TrainingError(f"{artifact.ref}: {artifact.manifest.unsupported[needed]}")
    return artifact


def _calibrated_offset(artifact: Artifact, share: float) -> float:
    calibration = artifact.calibration()
    if calibration is None:
        raise ValueError(f"{artifact.ref}: expected an artifact with a calibration, found none")
    return -calibration.verdicts(np.zeros(1, dtype=np.float32), share).threshold
