"""Data and networks small enough to train in a test."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.autoencoders import Autoencoder
from training.data import Dataset, load_dataset
from training.presets import PRESETS, Preset, build_network, override

SMALL = ("optimisation.epochs=1",)


def small(preset: Preset) -> Preset:
    """The preset as it is, for one epoch, with a code no wider than an 8×8 picture."""
    wide = {"sparse": ["latent_dim=48"], "sparse-topk": ["latent_dim=48"]}
    return override(preset, [*SMALL, *wide.get(preset.name, [])])


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", Path("unused"))


@pytest.fixture(params=list(PRESETS))
def preset(request: pytest.FixtureRequest) -> Preset:
    """Every preset in turn, for one epoch."""
    return small(PRESETS[request.param])


@pytest.fixture
def network(preset: Preset) -> Autoencoder:
    """The preset's network for 1×8×8, untrained: its answers are no smoother than a trained one's."""
    return build_network(preset, (1, 8, 8), seed=0).eval()


@pytest.fixture(scope="session")
def records() -> Dataset:
    """569 records of 30 features in very different units, of two classes: scikit-learn's breast-cancer data."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    return Dataset(
        name="breast-cancer",
        items=torch.from_numpy(bunch.data.astype(np.float32)),
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        label_names=("malignant", "benign"),
        is_official_test=None,
        features=tuple(str(name) for name in bunch.feature_names),
    )


@pytest.fixture
def items() -> torch.Tensor:
    """64 items of 1×8×8 in [0, 1]."""
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """60 colour pictures of two kinds in sub-folders, a text file named .png and a truncated picture."""
    random = np.random.default_rng(0)
    for label in ("bolts", "nuts"):
        (tmp_path / label).mkdir()
        for i in range(30):
            size = (24, 20) if i % 3 else (48, 40)  # (width, height)
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    (tmp_path / "nuts" / "text.png").write_text("no picture")
    whole = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(whole, "PNG")
    (tmp_path / "nuts" / "cut.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return tmp_path
