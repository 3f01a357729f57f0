"""What tests of both packages share: real, tiny artifacts, trained by the real training code once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY_SETTINGS = ("hidden_sizes=[16]", "latent_dim=4", "epochs=1", "ema_decay=0")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, not to be written to, of artifacts 1×8×8 with latent_dim 4, trained for an epoch on digits.

    `tiny-variational` can encode, decode, reconstruct, anomaly_score and sample; `tiny-denoising` can denoise instead
    of sample.
    """
    import torch

    from training.data import load_dataset
    from training.presets import get_preset, override
    from training.progress import Silent
    from training.run import make_artifact

    store = tmp_path_factory.mktemp("tiny_store")
    digits = load_dataset("digits", Path("unused"))
    for name, preset in (("tiny-variational", "vae"), ("tiny-denoising", "denoising")):
        make_artifact(
            override(get_preset(preset), TINY_SETTINGS),
            digits,
            name=name,
            store=store,
            seed=0,
            device=torch.device("cpu"),
            progress=Silent(),
        )
    return store
