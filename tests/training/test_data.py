from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import training.folders
from app.artifacts.pictures import open_picture, picture_to_input
from training.data import Dataset, load_dataset, to_float
from training.errors import TrainingError

ROOT = os.environ.get("HOURGLASS_DATA_ROOT")


def test_digits_are_quantised(digits: Dataset) -> None:
    """scikit-learn's digits come as 1×8×8 uint8 over the whole range, with labels."""
    assert digits.items.dtype == torch.uint8
    assert digits.items.shape == (1797, 1, 8, 8)
    assert (int(digits.items.min()), int(digits.items.max())) == (0, 255)
    assert digits.labels is not None
    assert digits.input_spec.picture is not None
    assert digits.input_spec.picture.polarity == "light_on_dark"


@pytest.mark.skipif(not ROOT, reason="needs HOURGLASS_DATA_ROOT with MNIST")
def test_mnist_keeps_its_official_test_part() -> None:
    """MNIST comes whole, its last 10 000 as test part."""
    mnist = load_dataset("mnist", Path(ROOT or ""))
    assert mnist.items.shape == (70_000, 1, 28, 28)
    assert mnist.is_official_test is not None
    assert int(mnist.is_official_test.sum()) == 10_000


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision's files are missing and the network fails, the error names the folder and the way out."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fail)
    with pytest.raises(TrainingError, match=f"not found under {tmp_path}.*no network.*--data-root"):
        load_dataset("mnist", tmp_path)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    """A name that is neither a set nor a folder is answered with those there are."""
    with pytest.raises(TrainingError, match=r"expected one of digits, mnist.*a folder of pictures"):
        load_dataset(str(tmp_path / "nowhere"), tmp_path)


def test_folder_reads_every_picture_as_serving_does(picture_folder: Path) -> None:
    """A folder's pictures go through the service's own function; unreadable files are listed and skipped."""
    dataset = load_dataset(str(picture_folder), Path("unused"))
    assert dataset.items.shape == (60, 3, 20, 24)
    assert dataset.items.is_contiguous()
    assert dataset.label_names == ("bolts", "nuts")
    assert dataset.labels is not None
    assert dataset.labels.bincount().tolist() == [30, 30]
    assert [line.split(":")[0] for line in dataset.skipped] == ["nuts/cut.png", "nuts/text.png"]
    path = sorted((picture_folder / "bolts").glob("*.png"))[0]
    served = picture_to_input(open_picture(path.read_bytes()), dataset.input_spec)
    np.testing.assert_array_equal(to_float(dataset.items[0]).numpy(), served)


def test_folder_options_win(picture_folder: Path) -> None:
    """Size and channels are the caller's where given."""
    dataset = load_dataset(str(picture_folder), Path("unused"), image_size_px=(12, 16), channels=1)
    assert dataset.items.shape == (60, 1, 12, 16)


def test_grey_pictures_stored_as_rgb_are_grey(tmp_path: Path) -> None:
    """A folder of RGB files without colour becomes one channel, without labels if there are no sub-folders."""
    random = np.random.default_rng(0)
    for i in range(25):
        Image.fromarray(random.integers(0, 256, (10, 10), dtype=np.uint8)).convert("RGB").save(tmp_path / f"{i}.png")
    dataset = load_dataset(str(tmp_path), Path("unused"))
    assert dataset.items.shape == (25, 1, 10, 10)
    assert dataset.labels is None


def test_large_pictures_are_shrunk_by_default(tmp_path: Path) -> None:
    """The default size keeps the aspect and ends at 128 pixels; a picture on its side counts as upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(20):
        Image.new("RGB", (400, 200), (i, 0, 0)).save(tmp_path / f"{i}.jpg", exif=exif)
    assert load_dataset(str(tmp_path), Path("unused")).item_shape == (3, 128, 64)


def test_a_folder_of_few_pictures_is_refused(tmp_path: Path) -> None:
    """Fewer readable pictures than a split needs is one clear error."""
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(TrainingError, match="expected at least 20 readable pictures, found 1"):
        load_dataset(str(tmp_path), Path("unused"))
    (tmp_path / "one.png").unlink()
    with pytest.raises(TrainingError, match=r"expected pictures .*, found none"):
        load_dataset(str(tmp_path), Path("unused"))


def test_too_much_data_is_refused(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would not fit in memory is refused before it is read."""
    monkeypatch.setattr(training.folders, "MOST_BYTES", 1000)
    with pytest.raises(TrainingError, match="smaller --image-size"):
        load_dataset(str(picture_folder), Path("unused"))
