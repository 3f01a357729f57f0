from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console

from training.data import Dataset
from training.loop import Epoch, train
from training.presets import build_network, get_preset, override
from training.progress import Bar, Lines, Silent

EPOCH = Epoch(number=1, loss=0.5, validation_loss=0.3, validation_mse=0.25, learning_rate=1e-3, images_per_s=1000)


def test_lines_are_one_per_epoch() -> None:
    """A log gets one plain line per epoch with loss, validation error and speed, and none per step."""
    out = io.StringIO()
    lines = Lines(Console(file=out, width=120))
    lines.begin(100, 2)
    lines.step(100, 0.5)
    lines.epoch(EPOCH)
    assert out.getvalue() == "epoch 1/2  loss 0.5  validation MSE 0.25000  1,000 items/s\n"


def test_bar_shows_what_is_known() -> None:
    """On a terminal there is one bar with the epoch, the figures and the time left."""
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=140)) as bar:
        bar.begin(100, 2)
        bar.step(100, 0.5)
        bar.epoch(EPOCH)
    for part in ("epoch 2/2", "loss 0.5", "validation MSE 0.25000", "1,000 items/s", "left"):
        assert part in out.getvalue()


def test_a_bar_costs_nothing_measurable(digits: Dataset, record_property: pytest.RecordProperty) -> None:
    """A training under a bar takes as long as a silent one, in seconds of CPU, the display's own thread included."""
    preset = override(get_preset("basic"), ["epochs=4"])

    def seconds(progress: Bar | Silent) -> float:
        start = time.process_time()
        train(
            build_network(preset, (1, 8, 8), 0),
            digits.items,
            digits.items[:100],
            preset.optimisation,
            preset.corruption,
            seed=0,
            device=torch.device("cpu"),
            progress=progress,
        )
        return time.process_time() - start

    with Bar(Console(file=io.StringIO(), force_terminal=True, width=140)) as bar:
        pairs = [(seconds(Silent()), seconds(bar)) for _ in range(5)]
    silent, shown = (min(pair[i] for pair in pairs) for i in (0, 1))
    record_property("measured", f"a training under a progress bar: {100 * (shown / silent - 1):+.1f} % of CPU time")
    assert shown < 1.25 * silent  # a busy machine's noise; a bar drawn at every step doubles it
