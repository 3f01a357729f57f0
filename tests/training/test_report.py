from __future__ import annotations

import re
from pathlib import Path

from training.data import Dataset
from training.report import report
from training.run import open_artifact

EPOCHS = [
    {
        "number": n,
        "loss": 1 / n,
        "validation_loss": 2 / n,
        "validation_mse": 3 / n,
        "learning_rate": 0.1,
        "images_per_s": 1,
    }
    for n in (1, 2, 3)
]


def test_a_report_is_one_file_with_all_its_pictures(tiny_store: Path, digits: Dataset) -> None:
    """Every section that the artifact's capabilities allow is there, and nothing is loaded from elsewhere."""
    page = report(open_artifact("tiny-variational", tiny_store), digits, EPOCHS)
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "Training",
        "Reconstruction of test pictures",
        "Samples",
        "From one test picture to another",
        "Latent map",
        "Anomaly scores",
        "Figures",
        "Origin",
    ]
    assert page.count("data:image/png;base64,") > 10
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "Denoising" in re.findall("<h2>(.*?)</h2>", report(open_artifact("tiny-denoising", tiny_store), digits, []))


def test_a_report_is_the_same_each_time(tiny_store: Path, digits: Dataset) -> None:
    """Nothing in it is drawn anew."""
    artifact = open_artifact("tiny-variational", tiny_store)
    assert report(artifact, digits, EPOCHS) == report(artifact, digits, EPOCHS)
