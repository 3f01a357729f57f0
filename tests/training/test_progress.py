from __future__ import annotations

import io

from rich.console import Console

from training.loop import Epoch
from training.progress import Bar, Lines

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
