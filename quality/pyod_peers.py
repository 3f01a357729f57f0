"""PyOD's detectors with their defaults on the one-class splits: a part of `python -m quality.anomaly`."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.peers import python_of, version_of
from quality.models import FOLDER
from quality.pyod_defaults import DETECTORS


def scores(train: Tensor, test: Tensor) -> tuple[dict[str, Any], str]:
    """What each detector says of the test items, with its seconds of CPU, and PyOD's version.

    Items are float32, (items, *item). Raises benchmarks.peers.PeerUnavailable.
    """
    python = python_of("pyod", (FOLDER / "venvs").resolve())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, train=train.flatten(1).numpy(), test=test.flatten(1).numpy())
        for name in DETECTORS:
            command = [str(python), str(Path(__file__).with_name("pyod_defaults.py")), name, str(data)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found, version_of("pyod", python)


def lines(found: dict[str, Any], ours: dict[int, float]) -> list[str]:
    """The section of the page: AUROC by digit, beside the score's."""
    digits = sorted(map(int, found))
    versions = ", ".join(sorted({run["version"] for run in found.values()}))
    return [
        "## PyOD with its defaults",
        "",
        f"PyOD {versions} on the same training and test pictures as the first table, one thread; seconds are the CPU's",
        "for fitting and asking, a digit.",
        "",
        f"| | {' | '.join(map(str, digits))} | mean | worst | s |",
        f"| --- |{' --- |' * (len(digits) + 3)}",
        _row("**score**", [ours.get(digit, float("nan")) for digit in digits], "–"),
        *(
            _row(
                name,
                [found[str(digit)]["auroc"][name] for digit in digits],
                f"{np.mean([found[str(digit)]['cpu_s'][name] for digit in digits]):.0f}",
            )
            for name in DETECTORS
        ),
        "",
    ]


def _row(name: str, values: Sequence[float], seconds: str) -> str:
    cells = " | ".join(f"{value:.3f}" for value in values)
    return f"| {name} | {cells} | {np.mean(values):.4f} | {min(values):.3f} | {seconds} |"
