"""Runs in PyOD's own environment, without the project: one detector with its defaults, fitted and asked for scores.

Usage: python pyod_defaults.py DETECTOR DATA.npz, with arrays `train` and `test`, one row per item.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch

DETECTORS = {
    "AutoEncoder": "auto_encoder",
    "VAE": "vae",
    "DeepSVDD": "deep_svdd",
    "KNN": "knn",
    "LOF": "lof",
}


def detector(name: str, columns: int) -> Any:
    """With its defaults; what it cannot do without is given: the number of columns, the CPU, a seed."""
    made = getattr(importlib.import_module(f"pyod.models.{DETECTORS[name]}"), name)
    if name in ("KNN", "LOF"):
        return made()
    if name == "DeepSVDD":
        return made(n_features=columns, random_state=0, verbose=0)
    return made(random_state=0, verbose=0, device=torch.device("cpu"))


def main() -> None:
    """Prints scores and seconds of CPU."""
    name, data = sys.argv[1:3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arrays = np.load(data)
    start = time.process_time()
    fitted = detector(name, arrays["train"].shape[1])
    fitted.fit(arrays["train"])
    scores = np.asarray(fitted.decision_function(arrays["test"]), dtype=float)
    print(json.dumps({"scores": scores.tolist(), "cpu_s": time.process_time() - start}))


if __name__ == "__main__":
    main()
