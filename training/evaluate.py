"""Quality figures of an exported module, each beside a baseline and with the protocol that it was measured by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.artifacts.calibration import Calibration, RateTooFine
from app.artifacts.manifest import Capability, Metric
from training.autoencoders import Autoencoder
from training.corruptions import gaussian_noise, salt_pepper
from training.data import to_unit
from training.export import ExportedModule
from training.loop import EVALUATION_BATCH_SIZE, generator

NOISE_SEED = 0
"""Of all noise in evaluation, whatever the training's seed: figures of two artifacts see the same noise."""

NOISES = {
    "sigma_0.1": "Gaussian noise of sigma 0.1",
    "sigma_0.25": "Gaussian noise of sigma 0.25",
    "sigma_0.5": "Gaussian noise of sigma 0.5",
    "salt_pepper_0.3": "salt and pepper on 30 % of the values",
}
TARGET_FPRS = (0.01, 0.05)
EXACT_PCA_FEATURES = 2048
PCA_ITEMS = 5000


def add_noise(x: Tensor, kind: str) -> Tensor:
    """x, (batch, *item) in [0, 1], with a noise of NOISES, always the same for the same shape."""
    noise = generator(NOISE_SEED, f"evaluation {kind}")
    family, _, strength = kind.rpartition("_")
    if family == "sigma":
        return gaussian_noise(x, float(strength), noise)
    return salt_pepper(x, float(strength), noise)


def psnr_db(found: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of values in [0, 1], in dB: one per item, (batch,); at most 100."""
    mse = (found - clean).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()  # (batch,)


@dataclass(frozen=True)
class Denoising:
    """Mean PSNR of noisy items before and after the way through a model, in dB."""

    before_db: float
    after_db: float


def measure_denoising(exported: ExportedModule, test: Tensor, kind: str) -> Denoising:
    """PSNR of float32 test items with a noise of NOISES; a model that does not offer `denoise` reconstructs."""
    method = Capability.DENOISE if Capability.DENOISE in exported.methods else Capability.RECONSTRUCT
    noisy = add_noise(test, kind)
    denoised = exported.run(method, noisy)
    return Denoising(float(psnr_db(noisy, test).double().mean()), float(psnr_db(denoised, test).double().mean()))


def pca_mse(train: Tensor, test: Tensor, components: int) -> float | None:
    """Mean squared error per value of PCA's reconstruction at this many components.

    Exact up to EXACT_PCA_FEATURES values per item, else randomised and fitted on PCA_ITEMS items.

    Args:
        train, test: uint8, (items, *item): PCA is fitted on `train`, judged on `test`.

    Returns:
        None where PCA with so many components would lose nothing: not fewer than values or training items.
    """
    from sklearn.decomposition import PCA  # noqa: PLC0415  # slow to import

    features = math.prod(train.shape[1:])
    if components >= min(features, len(train)):
        return None
    exact = features <= EXACT_PCA_FEATURES
    pca = PCA(components, svd_solver="covariance_eigh" if exact else "randomized", random_state=0)
    fitted_on = train if exact else train[:PCA_ITEMS]
    pca.fit(to_unit(fitted_on).flatten(1).numpy())
    errors = []
    for batch in torch.split(test, EVALUATION_BATCH_SIZE):
        x = to_unit(batch).flatten(1).numpy()
        errors.append(((pca.inverse_transform(pca.transform(x)) - x) ** 2).mean(1))
    return float(np.concatenate(errors).astype(np.float64).mean())


def evaluate(
    exported: ExportedModule,
    *,
    train: Tensor,
    test: Tensor,
    latent_dim: int,
    calibration: Calibration,
    protocol: str,
) -> dict[str, Metric]:
    """What can be measured of any artifact by its exported methods alone.

    Args:
        exported: the module as served.
        train, test: uint8, (items, *item); `train` only fits the baseline.
        protocol: data set, part and seed, to be stated beside every figure.
    """
    x = to_unit(test)
    errors = (exported.run(Capability.RECONSTRUCT, x) - x).square().flatten(1).mean(1)
    baseline = pca_mse(train, test, latent_dim)
    metrics = {
        "test_mse": Metric(
            value=float(errors.double().mean()),
            unit="squared error per value",
            protocol=f"{protocol}; reconstruct; PCA of {latent_dim} components fitted on the training part",
            baselines={} if baseline is None else {"pca": baseline},
        )
    }
    for kind, words in NOISES.items():
        denoising = measure_denoising(exported, x, kind)
        name = "psnr" if Capability.DENOISE in exported.methods else "psnr_of_reconstruction"
        metrics[f"{name}_{kind}"] = Metric(
            value=denoising.after_db,
            unit="dB",
            protocol=f"{protocol}; {words}, clipped to 0…1, noise seed {NOISE_SEED}; mean of the items' PSNR",
            baselines={"noisy_input": denoising.before_db},
        )
    scores = exported.run(Capability.ANOMALY_SCORE, x).numpy()
    for target_fpr in TARGET_FPRS:
        try:
            verdicts = calibration.verdicts(scores, target_fpr)
        except RateTooFine:
            continue
        metrics[f"realised_fpr_at_{target_fpr}"] = Metric(
            value=float(verdicts.is_anomaly.mean()),
            unit="share of normal test items flagged",
            protocol=f"{protocol}; threshold from {len(calibration.scores)} calibration items",
            baselines={"target": target_fpr},
        )
    return metrics


@torch.inference_mode()
def family_figures(network: Autoencoder, test: Tensor, protocol: str) -> dict[str, Metric]:
    """What only the trained network's family has, such as a variational autoencoder's ELBO. `test` is uint8."""
    noise = generator(NOISE_SEED, "evaluation figures")
    network = network.cpu().eval()
    batches = [network.figures(to_unit(batch), noise) for batch in torch.split(test, EVALUATION_BATCH_SIZE)]
    return {
        name: Metric(
            value=float(torch.cat([batch[name].values for batch in batches]).double().mean()),
            unit=figure.unit,
            protocol=f"{protocol}; {figure.protocol}, noise seed {NOISE_SEED}",
        )
        for name, figure in batches[0].items()
    }


def unsupported(capabilities: Sequence[Capability], metrics: dict[str, Metric]) -> dict[Capability, str]:
    """What an artifact cannot do, each with the reason that the service gives to whoever asks.

    The criterion for `denoise`: the network was trained to remove noise. What its reconstruction does to noisy items
    is measured all the same, and stated.
    """
    reasons = {}
    if Capability.DENOISE not in capabilities:
        figures = [
            f"from {metric.baselines['noisy_input']:.1f} to {metric.value:.1f} dB under {words}"
            for kind, words in NOISES.items()
            if (metric := metrics.get(f"psnr_of_reconstruction_{kind}")) is not None
        ]
        reasons[Capability.DENOISE] = (
            "not trained to remove noise: its reconstruction takes the PSNR of test items " + ", ".join(figures)
        )
    if Capability.INPAINT not in capabilities:
        reasons[Capability.INPAINT] = "not trained to fill holes"
    if Capability.SAMPLE not in capabilities:
        reasons[Capability.SAMPLE] = "no prior was learnt: latent vectors drawn at random decode to no item"
    return reasons
