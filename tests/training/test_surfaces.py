"""Drawn surfaces: the seed decides, defects lie in their masks, and inspection answers from surroundings alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.autoencoders.unet import InspectingUNet
from training.presets import PRESETS, build_network
from training.surfaces import AREAS, KINDS, defective_surface, good_surface, write_surfaces


def test_the_seed_decides() -> None:
    """The same seed draws the same surface, another seed another one; a good one has no defect."""
    first, again, other = (good_surface(64, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert (first.pixels != other.pixels).any()
    assert not first.mask.any()
    assert first.pixels.shape == (64, 64, 3)


def test_defects_have_the_areas_and_kinds_that_are_told() -> None:
    """Masks cover the stated share of the picture, give or take a pixel's width, and all kinds come up."""
    defects = [defective_surface(128, seed) for seed in range(60)]
    shares = np.array([defect.mask.mean() for defect in defects])
    assert ((shares > 0.4 * AREAS[0]) & (shares < 1.3 * AREAS[1])).all()
    assert {defect.kind for defect in defects} == set(KINDS)


def test_a_folder_to_train_on(tmp_path: Path) -> None:
    """Good ones, defective ones and their masks lie side by side."""
    write_surfaces(tmp_path, good=3, defective=2, side=40, seed=0)
    assert len(list((tmp_path / "good").iterdir())) == 3
    for picture, mask in zip(*(sorted((tmp_path / n).iterdir()) for n in ("defective", "masks")), strict=True):
        with Image.open(picture) as shown, Image.open(mask) as defect:
            assert shown.size == defect.size == (40, 40)
            assert set(np.unique(np.asarray(defect))) == {0, 255}


def test_what_is_in_a_square_has_no_say_in_its_answer() -> None:
    """Inspection tells each square from its surroundings: whatever the square holds, the answer in it is the same."""
    network = build_network(PRESETS["inspection"], (3, 32, 32), seed=0).eval()
    assert isinstance(network, InspectingUNet)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, :, 8:16, 16:24] = 0.9
    with torch.inference_mode():
        before, after = network.reconstruct(x), network.reconstruct(changed)
    torch.testing.assert_close(before[:, :, 8:16, 16:24], after[:, :, 8:16, 16:24])
    assert (before[:, :, 16:24, 16:24] != after[:, :, 16:24, 16:24]).any()
