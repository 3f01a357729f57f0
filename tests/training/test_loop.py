from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.autoencoders import Autoencoder
from training.corruptions import Corruption
from training.data import Dataset
from training.errors import TrainingError
from training.loop import Epoch, Optimisation, generator, reconstruction_mse, train
from training.presets import PRESETS
from training.run import build_network

CPU = torch.device("cpu")
OPTIMISATION = Optimisation(epochs=2, batch_size=100)


class Recorder:
    """Keeps what the loop reports."""

    def __init__(self) -> None:
        self.images = 0
        self.epochs: list[Epoch] = []

    def begin(self, images: int, epochs: int) -> None:
        self.expected_images = images * epochs

    def step(self, images: int, loss: float | None) -> None:
        self.images += images

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)


def run(
    digits: Dataset, optimisation: Optimisation, seed: int = 0, name: str = "basic"
) -> tuple[Autoencoder, Recorder]:
    recorder = Recorder()
    network, epochs = train(
        build_network(PRESETS[name], (1, 8, 8), seed),
        digits.images[:950],
        digits.images[950:1050],
        optimisation,
        Corruption(gaussian_sigma_max=0.2),
        seed=seed,
        device=CPU,
        progress=recorder,
    )
    assert epochs == recorder.epochs
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
    assert recorder.epochs[-1].validation_mse == reconstruction_mse(network, digits.images[950:1050])


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
