"""The artifacts that the project ships: the one table of how each of them is made."""

from __future__ import annotations

from dataclasses import dataclass

from app.artifacts.manifest import Capability


@dataclass(frozen=True)
class ShippedModel:
    """One shipped artifact; its preset, data and seed say everything."""

    name: str
    preset: str
    data: str
    seed: int
    default_for: tuple[Capability, ...] = ()
    threads: int = 1  # results depend on it, and every machine has one


SHIPPED_MODELS = (
    ShippedModel("mnist-basic", preset="basic", data="mnist", seed=0),
    ShippedModel(
        "mnist-conv",
        preset="conv",
        data="mnist",
        seed=0,
        default_for=(
            Capability.ENCODE,
            Capability.DECODE,
            Capability.RECONSTRUCT,
            Capability.INPAINT,
            Capability.ANOMALY_SCORE,
            Capability.ANOMALY_MAP,
        ),
    ),
    ShippedModel("mnist-denoising", preset="denoising", data="mnist", seed=0, default_for=(Capability.DENOISE,)),
    ShippedModel("mnist-variational", preset="vae", data="mnist", seed=0, default_for=(Capability.SAMPLE,)),
)
"""In the order in which they are trained."""
