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
from training.corruptions import gaussian_noise, hole, masking, salt_pepper
from training.data import to_float
from training.export import ExportedModule
from training.loop import EVALUATION_BATCH_SIZE
from training.noise import Noise, generator

NOISE_SEED = 0
"""Of all noise in evaluation, whatever the training's seed: figures of two artifacts see the same noise."""

NOISES = {
    "sigma_0.1": "Gaussian noise of sigma 0.1",
    "sigma_0.25": "Gaussian noise of sigma 0.25",
    "sigma_0.5": "Gaussian noise of sigma 0.5",
    "sigma_0.75": "Gaussian noise of sigma 0.75",
    "salt_pepper_0.3": "salt and pepper on 30 % of the values",
    "masking_0.5": "half of the values at zero",
}
RECORD_NOISES = {key: f"{words} of each feature's deviation" for key, words in NOISES.items() if "sigma" in key}
HOLE_SIDE = 12 / 28
"""Of the hole to fill, as a part of the picture's shorter side: 12 pixels of 28."""
HIDDEN_SHARE = 0.3  # of a record's features
TARGET_FPRS = (0.01, 0.05)
EXACT_PCA_FEATURES = 2048
PCA_ITEMS = 5000
SAMPLES = 1000
NEIGHBOURS_AMONG = 20_000


def add_noise(x: Tensor, kind: str) -> Tensor:
    """x, (batch, *item) in [0, 1], with a noise of NOISES, always the same for the same shape."""
    noise = generator(NOISE_SEED, f"evaluation {kind}")
    family, _, strength = kind.rpartition("_")
    if family == "sigma":
        return gaussian_noise(x, float(strength), noise)
    return (salt_pepper if family == "salt_pepper" else masking)(x, float(strength), noise)


def psnr_db(found: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of values in [0, 1], in dB: one per item, (batch,); at most 100."""
    mse = (found - clean).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()  # (batch,)


@dataclass(frozen=True)
class Scale:
    """Units in which errors count: a picture's as they are, a record's features in their training deviation."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, train: Tensor) -> Scale:
        """The units of items like these."""
        if train.dim() != 2:
            return cls(torch.zeros(()), torch.ones(()))
        deviation = train.double().std(0, correction=0)
        return cls(train.double().mean(0).float(), torch.where(deviation > 0, deviation, 1.0).float())

    def apply(self, x: Tensor) -> Tensor:
        """Float items in these units."""
        return (x - self.mean) / self.deviation


@dataclass(frozen=True)
class Denoising:
    """Mean PSNR of noisy items before and after the way through a model, in dB."""

    before_db: float
    after_db: float


def measure_denoising(exported: ExportedModule, test: Tensor, kind: str, scale: Scale | None = None) -> Denoising:
    """PSNR of float32 test items with a noise of NOISES; a model that does not offer `denoise` reconstructs.

    Of records, the ratio is that of a feature's variance to the error's, and noise is in units of its deviation.
    """
    method = Capability.DENOISE if Capability.DENOISE in exported.methods else Capability.RECONSTRUCT
    if scale is None or scale.mean.dim() == 0:
        noisy = add_noise(test, kind)
        denoised = exported.run(method, noisy)
        return Denoising(float(psnr_db(noisy, test).double().mean()), float(psnr_db(denoised, test).double().mean()))
    noise = generator(NOISE_SEED, f"evaluation {kind}")
    sigma = float(kind.rpartition("_")[2])
    noisy = test + sigma * scale.deviation * torch.randn(test.shape, generator=noise)
    clean = scale.apply(test)
    before, after = (psnr_db(scale.apply(x), clean) for x in (noisy, exported.run(method, noisy)))
    return Denoising(float(before.double().mean()), float(after.double().mean()))


def evaluation_mask(x: Tensor) -> Tensor:
    """What is hidden for the measurement of inpainting: a square hole, or features at random; the same each time."""
    noise = generator(NOISE_SEED, "evaluation holes")
    if x.dim() == 4:
        return hole(x, max(1, round(HOLE_SIDE * min(x.shape[2:]))), noise)
    return (torch.rand(x.shape, generator=noise) < HIDDEN_SHARE).float()


def psnr_inside_db(found: Tensor, clean: Tensor, mask: Tensor) -> float:
    """Mean over the items of the PSNR of hidden values alone, in dB; items with none are left out."""
    mask = mask.expand_as(clean)
    hidden = mask.flatten(1).sum(1)
    mse = ((found - clean).square() * mask).flatten(1).sum(1)[hidden > 0] / hidden[hidden > 0]
    return float((-10 * mse.clamp_min(1e-10).log10()).double().mean())


def measure_inpainting(exported: ExportedModule, test: Tensor, scale: Scale) -> Denoising:
    """PSNR of hidden values when left blank and when filled in; without `inpaint` the reconstruction fills them."""
    mask = evaluation_mask(test)
    blank = test * (1 - mask) + scale.mean * mask
    if Capability.INPAINT in exported.methods:
        filled = exported.run(Capability.INPAINT, test, mask)
    else:
        filled = exported.run(Capability.RECONSTRUCT, blank)
    clean = scale.apply(test)
    before, after = (psnr_inside_db(scale.apply(x), clean, mask) for x in (blank, filled))
    return Denoising(before, after)


def nearest_distances(x: Tensor, train: Tensor) -> Tensor:
    """Euclidean distance of each float item to the nearest of float training items, (batch,)."""
    train = train.flatten(1)
    squares = train.square().sum(1)
    parts = []
    for batch in torch.split(x.flatten(1), EVALUATION_BATCH_SIZE):
        squared = batch.square().sum(1, keepdim=True) + squares - 2 * batch @ train.T
        parts.append(squared.min(1).values.clamp_min(0).sqrt())
    return torch.cat(parts)


def draw_samples(exported: ExportedModule, latent_dim: int, count: int, classes: int, label: int = -1) -> Tensor:
    """`count` samples at temperature 1, always from the same noise."""
    noise = generator(NOISE_SEED, "evaluation samples")
    u, eps = torch.rand(count, generator=noise), torch.randn(count, latent_dim, generator=noise)
    of_class = (torch.full((count,), float(label)),) if classes else ()
    return exported.run(Capability.SAMPLE, u, eps, *of_class)


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
    pca.fit(to_float(fitted_on).flatten(1).numpy())
    errors = []
    for batch in torch.split(test, EVALUATION_BATCH_SIZE):
        x = to_float(batch).flatten(1).numpy()
        errors.append(((pca.inverse_transform(pca.transform(x)) - x) ** 2).mean(1))
    return float(np.concatenate(errors).astype(np.float64).mean())


def evaluate(
    exported: ExportedModule,
    *,
    train: Tensor,
    test: Tensor,
    latent_dim: int | None,
    calibration: Calibration | None,
    protocol: str,
    classes: int = 0,
) -> dict[str, Metric]:
    """What can be measured of any artifact by its exported methods alone.

    Args:
        exported: the module as served.
        train, test: (items, *item); `train` fits the baselines and is what samples must not repeat.
        calibration: of the artifact's scores, if it gives any.
        protocol: data set, part and seed, to be stated beside every figure.
        classes: how many `sample` can be asked for.
    """
    x, scale = to_float(test), Scale.of(train)
    records = test.dim() == 2
    unit = "squared error per value" + (", in units of each feature's variance" if records else "")
    metrics: dict[str, Metric] = {}
    if Capability.RECONSTRUCT in exported.methods:
        errors = (scale.apply(exported.run(Capability.RECONSTRUCT, x)) - scale.apply(x)).square().flatten(1).mean(1)
        standard = (scale.apply(train), scale.apply(test)) if records else (train, test)
        baseline = None if latent_dim is None else pca_mse(*standard, latent_dim)
        metrics["test_mse"] = Metric(
            value=float(errors.double().mean()),
            unit=unit,
            protocol=f"{protocol}; reconstruct"
            + ("" if latent_dim is None else f"; PCA of {latent_dim} components fitted on the training part"),
            baselines={} if baseline is None else {"pca": baseline},
        )
    for kind, words in (RECORD_NOISES if records else NOISES).items():
        if not {Capability.DENOISE, Capability.RECONSTRUCT} & set(exported.methods):
            break
        denoising = measure_denoising(exported, x, kind, scale)
        name = "psnr" if Capability.DENOISE in exported.methods else "psnr_of_reconstruction"
        how = "feature variance over squared error" if records else "clipped to 0…1"
        metrics[f"{name}_{kind}"] = Metric(
            value=denoising.after_db,
            unit="dB",
            protocol=f"{protocol}; {words}, {how}, noise seed {NOISE_SEED}; mean of the items' PSNR",
            baselines={"noisy_input": denoising.before_db},
        )
    if {Capability.INPAINT, Capability.RECONSTRUCT} & set(exported.methods):
        inpainting = measure_inpainting(exported, x, scale)
        name = "psnr_inpainted" if Capability.INPAINT in exported.methods else "psnr_of_reconstruction_inpainted"
        what = f"{HIDDEN_SHARE:.0%} of the features" if records else "a square of 3/7 of the shorter side"
        metrics[name] = Metric(
            value=inpainting.after_db,
            unit="dB",
            protocol=f"{protocol}; {what} hidden at random, noise seed {NOISE_SEED}; PSNR of hidden values alone",
            baselines={"left_blank": inpainting.before_db},
        )
    if Capability.SAMPLE in exported.methods and latent_dim is not None:
        among = scale.apply(to_float(train[:NEIGHBOURS_AMONG]))
        samples = scale.apply(draw_samples(exported, latent_dim, SAMPLES, classes))
        metrics["sample_distance_to_training"] = Metric(
            value=float(nearest_distances(samples, among).median()),
            unit="median Euclidean distance to the nearest training item",
            protocol=f"{protocol}; {SAMPLES} samples, temperature 1, among {len(among)} training items; much below "
            "that of test items would be memorisation",
            baselines={"test_items": float(nearest_distances(scale.apply(x[:SAMPLES]), among).median())},
        )
    if Capability.ANOMALY_SCORE not in exported.methods or calibration is None:
        return metrics
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
    """What only the trained network's family has, such as a variational autoencoder's ELBO."""
    noise = Noise(generator(NOISE_SEED, "evaluation figures"))
    network = network.cpu().eval()
    batches = [network.figures(to_float(batch), noise) for batch in torch.split(test, EVALUATION_BATCH_SIZE)]
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

    The criterion for `denoise` and `inpaint`: the network was trained for it. What its reconstruction does to noisy
    and to incomplete items is measured all the same, and stated.
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
        hidden = metrics.get("psnr_of_reconstruction_inpainted")
        reasons[Capability.INPAINT] = "not trained to fill in missing values" + (
            ""
            if hidden is None
            else f": its reconstruction takes the PSNR of hidden values of test items from "
            f"{hidden.baselines['left_blank']:.1f} to {hidden.value:.1f} dB"
        )
    for capability in Capability:
        if capability not in capabilities and capability not in reasons:
            reasons[capability] = (
                "has no bottleneck: an item's details reach the output past any latent vector, so that there is none "
                "to give, to decode or to draw, and whatever is strange about an item is rebuilt with it"
            )
    return reasons
