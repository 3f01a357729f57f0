"""Figures of trained artifacts and of baselines, each with its protocol: what the parts of `make quality` measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.artifacts.manifest import Capability
from app.artifacts.store import Artifact
from training.autoencoders.hourglass import VariationalHourglass
from training.evaluate import add_noise, psnr_db, psnr_inside_db
from training.export import ExportedModule
from training.noise import Noise, generator
from training.transfer import accuracy, train_head

Pictures = NDArray[np.float32]


def reconstruction_mse(artifact: Artifact, x: Tensor) -> float:
    """Mean squared error per pixel of the served reconstruction."""
    found = ExportedModule(artifact.model).run(Capability.RECONSTRUCT, x)
    return float((found - x).square().double().mean())


def pca(train: Tensor, components: int) -> Any:
    """PCA fitted on float pictures."""
    from sklearn.decomposition import PCA  # noqa: PLC0415  # slow to import

    return PCA(components, svd_solver="covariance_eigh").fit(train.flatten(1).numpy())


def pca_mse(fitted: Any, x: Tensor) -> float:
    """Mean squared error per pixel of PCA's reconstruction."""
    flat = x.flatten(1).numpy()
    return float(((fitted.inverse_transform(fitted.transform(flat)) - flat) ** 2).astype(np.float64).mean())


def knn_accuracy(train: Pictures, labels: Tensor, test: Pictures, test_labels: Tensor) -> float:
    """Of the majority among the 5 nearest training codes, Euclidean."""
    from sklearn.neighbors import KNeighborsClassifier  # noqa: PLC0415  slow to import, for one figure

    model = KNeighborsClassifier(5, algorithm="brute").fit(train, labels.numpy())
    return float(model.score(test, test_labels.numpy()))


def linear_probe_error(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, weight_decay: float) -> float:
    """Share of test items that multinomial logistic regression on codes gets wrong."""
    return 1 - accuracy(train_head(train, labels, 10, weight_decay=weight_decay, alike=True), test, test_labels)


def binarised(x: Tensor, key: str) -> Tensor:
    """Bits drawn from grey levels, always the same for the same key."""
    return (torch.rand(x.shape, generator=generator(0, f"binarised {key}")) < x).float()


@torch.inference_mode()
def likelihood(network: VariationalHourglass, bits: Tensor, samples: int) -> tuple[float, float]:
    """−ELBO and −log p(x) by importance sampling, in nats per picture, means over all."""
    noise = Noise(generator(0, "importance samples"))
    elbos, bounds = [], []
    for x in torch.split(bits, 20):
        weights = network.log_weights(x, x, samples, noise)
        elbos.append(-weights.double().mean(1))
        bounds.append(math.log(samples) - weights.double().logsumexp(1))
    return float(torch.cat(elbos).mean()), float(torch.cat(bounds).mean())


def tuned(candidates: dict[str, Callable[[Pictures], Pictures]], noisy: Tensor, clean: Tensor) -> str:
    """The candidate with the best mean PSNR."""
    results = {name: mean_psnr(apply(noisy.numpy()), clean) for name, apply in candidates.items()}
    return max(results, key=lambda name: results[name])


def mean_psnr(found: Pictures | Tensor, clean: Tensor) -> float:
    """Mean of the pictures' PSNR, in dB."""
    return float(psnr_db(torch.as_tensor(np.asarray(found)).float(), clean).double().mean())


def denoisers() -> dict[str, dict[str, Callable[[Pictures], Pictures]]]:
    """scikit-image's, each with its grid of strengths; what clipping added to the black is subtracted again."""
    from skimage.restoration import (  # noqa: PLC0415  slow to import, for one figure
        denoise_nl_means,
        denoise_tv_chambolle,
        denoise_wavelet,
    )

    def each(apply: Callable[[Any], Any], black: float) -> Callable[[Pictures], Pictures]:
        def run(pictures: Pictures) -> Pictures:
            restored = np.stack([apply(picture[0]) for picture in pictures])[:, None]
            return np.clip((restored - black) / (1 - black), 0, 1).astype(np.float32)

        return run

    blacks = (0.0, 0.1, 0.2, 0.3)
    return {
        "TV": {
            f"weight {w}, black {b}": each(partial(denoise_tv_chambolle, weight=w), b)
            for w in (0.1, 0.2, 0.3, 0.5, 0.8)
            for b in blacks
        },
        "NLM": {
            f"h {h}, black {b}": each(partial(denoise_nl_means, h=h, patch_size=5, patch_distance=6, sigma=0.5), b)
            for h in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
            for b in blacks
        },
        "wavelet": {
            f"sigma {s}, black {b}": each(partial(denoise_wavelet, sigma=s), b)
            for s in (0.2, 0.3, 0.4, 0.5, 0.7)
            for b in blacks
        },
    }


def noisy_psnr(exported: ExportedModule, x: Tensor, kind: str) -> tuple[float, float]:
    """PSNR in and out at a noise of training.evaluate.NOISES, or `clean`."""
    noisy = x if kind == "clean" else add_noise(x, kind)
    return mean_psnr(noisy, x), mean_psnr(exported.run(Capability.DENOISE, noisy), x)


def biharmonic_psnr(x: Tensor, mask: Tensor) -> float:
    """Of scikit-image's biharmonic inpainting, in the holes."""
    from skimage.restoration import inpaint_biharmonic  # noqa: PLC0415  slow to import, for one figure

    filled = [inpaint_biharmonic(item[0].numpy(), hole[0].numpy() > 0) for item, hole in zip(x, mask, strict=True)]
    return psnr_inside_db(torch.from_numpy(np.stack(filled)[:, None]).float().clamp(0, 1), x, mask)
