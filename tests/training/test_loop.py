from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training.autoencoders import Autoencoder
from training.checkpoints import CheckpointFile
from training.corruptions import Corruption
from training.data import Dataset
from training.errors import TrainingError
from training.loop import Epoch, Interrupted, Optimisation, train, validate
from training.noise import generator
from training.presets import PRESETS, build_network

CPU = torch.device("cpu")
OPTIMISATION = Optimisation(epochs=2, batch_size=100)


class Recorder:
    """Keeps what the loop reports."""

    def __init__(self) -> None:
        self.images = 0
        self.epochs: list[Epoch] = []

    def begin(self, images: int, epochs: int, seen: int = 0) -> None:
        self.expected_images = images * epochs

    def step(self, images: int, loss: float | None) -> None:
        self.images += images

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)


def run(
    digits: Dataset, optimisation: Optimisation, seed: int = 0, name: str = "basic", **options: Any
) -> tuple[Autoencoder, Recorder]:
    recorder = Recorder()
    network, epochs = train(
        build_network(PRESETS[name], (1, 8, 8), seed),
        digits.items[:950],
        digits.items[950:1050],
        optimisation,
        Corruption(gaussian_sigma_max=0.2),
        seed=seed,
        device=CPU,
        progress=recorder,
        **options,
    )
    assert epochs[len(epochs) - len(recorder.epochs) :] == recorder.epochs
    return network, recorder


@pytest.mark.parametrize("name", ["basic", "vae"])
def test_training_is_decided_by_the_seed(digits: Dataset, name: str) -> None:
    """The same seed gives the same weights to the last bit, with corruption and posterior draws; another does not."""
    first, again, other = (run(digits, OPTIMISATION, seed, name)[0] for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_training_learns_and_reports(digits: Dataset) -> None:
    """Loss and validation error fall; every image is counted, the last short batch too."""
    network, recorder = run(digits, replace(OPTIMISATION, epochs=5))
    assert recorder.images == recorder.expected_images == 5 * 950
    assert recorder.epochs[-1].loss < recorder.epochs[0].loss
    assert recorder.epochs[-1].validation_mse < recorder.epochs[0].validation_mse
    assert not network.training
    validation = validate(network, digits.items[950:1050], Corruption(gaussian_sigma_max=0.2))
    assert (recorder.epochs[-1].validation_loss, recorder.epochs[-1].validation_mse) == validation


def test_averaged_weights_are_the_ones_kept(digits: Dataset) -> None:
    """With ema_decay the kept network is another than the last step's."""
    last, _ = run(digits, OPTIMISATION)
    averaged, _ = run(digits, replace(OPTIMISATION, ema_decay=0.9))
    assert not torch.equal(next(last.parameters()), next(averaged.parameters()))


def test_a_diverging_loss_ends_the_training(digits: Dataset) -> None:
    """A loss that is not a number stops at once, naming the settings to change."""
    with pytest.raises(TrainingError, match=r"found nan in epoch 1; lower optimisation\.learning_rate"):
        run(digits, replace(OPTIMISATION, learning_rate=1e38, warmup_fraction=0.0))


def test_streams_of_noise_are_independent() -> None:
    """Each use and each epoch has noise of its own, decided by the seed."""
    draws = {
        (seed, stream, number): float(torch.rand(1, generator=generator(seed, stream, number)))
        for seed in (0, 1)
        for stream in ("order", "corruption")
        for number in (1, 2)
    }
    assert len(set(draws.values())) == len(draws)
    assert float(torch.rand(1, generator=generator(0, "order", 1))) == draws[0, "order", 1]


def test_determinism_setting_is_restored(digits: Dataset) -> None:
    """Training leaves torch's global settings as it found them."""
    run(digits, replace(OPTIMISATION, epochs=1))
    assert not torch.are_deterministic_algorithms_enabled()


def stop_after(steps: int) -> Any:
    """Asks for a stop at that step, counted from 1."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("name", ["basic", "vae", "unet-denoiser"])
@pytest.mark.parametrize("steps", [1, 7, 10, 13])
def test_resume_equals_the_uninterrupted_run(digits: Dataset, tmp_path: Path, name: str, steps: int) -> None:
    """Stopped at any step, in mid-epoch or at its end, and taken up again, the weights are the same to the last bit."""
    optimisation = replace(OPTIMISATION, ema_decay=0.9, clip_norm=1.0, patience=5)
    whole, _ = run(digits, optimisation, name=name)
    checkpoints = CheckpointFile(tmp_path / "checkpoint.pt")
    with pytest.raises(Interrupted):
        run(digits, optimisation, name=name, checkpoints=checkpoints, stop=stop_after(steps))
    resumed, recorder = run(digits, optimisation, name=name, checkpoints=checkpoints)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert recorder.epochs[-1].number == 2


def test_a_finished_run_is_not_trained_again(digits: Dataset, tmp_path: Path) -> None:
    """Resuming what is done gives its weights without a step."""
    checkpoints = CheckpointFile(tmp_path / "checkpoint.pt")
    first, _ = run(digits, OPTIMISATION, checkpoints=checkpoints)
    again, recorder = run(digits, OPTIMISATION, checkpoints=checkpoints)
    assert recorder.images == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_damaged_checkpoint_is_one_clear_error(digits: Dataset, tmp_path: Path) -> None:
    """A file that is no checkpoint is named."""
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match=r"checkpoint .*: cannot be read"):
        run(digits, OPTIMISATION, checkpoints=CheckpointFile(tmp_path / "checkpoint.pt"))


def test_patience_ends_and_keeps_the_best_epoch(digits: Dataset) -> None:
    """Without progress for `patience` epochs the training ends, and the best epoch's weights are kept."""
    rough = replace(OPTIMISATION, epochs=50, learning_rate=0.05, warmup_fraction=0.0, schedule="constant", patience=2)
    network, recorder = run(digits, rough)
    losses = [epoch.validation_loss for epoch in recorder.epochs]
    assert len(losses) < 50
    assert losses.index(min(losses)) == len(losses) - 3
    assert validate(network, digits.items[950:1050], Corruption(gaussian_sigma_max=0.2))[0] == min(losses)


def test_max_minutes_ends_in_time_with_the_schedule_done(digits: Dataset) -> None:
    """The learning rate has come down to zero when the time is over, however many epochs were asked for."""
    _, recorder = run(digits, replace(OPTIMISATION, epochs=10_000), max_minutes=0.02)
    assert len(recorder.epochs) < 10_000
    assert recorder.epochs[-1].learning_rate < 1e-4 < recorder.epochs[0].learning_rate
