"""The training loop: one function, read top to bottom. Knows tensors and a network, neither files nor serving."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from training.autoencoders import Autoencoder
from training.corruptions import Corruption, corrupt
from training.data import to_unit
from training.errors import TrainingError
from training.losses import mean_squared_error

EVALUATION_BATCH_SIZE = 500
STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True)
class Optimisation:
    """How the loss is minimised."""

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    optimiser: Literal["adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03  # of all steps, linear
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # 0: the last weights are the ones kept
    clip_norm: NonNegativeFloat = 0.0  # 0: gradients are not clipped
    bfloat16: bool = False  # forward in bfloat16 where the device computes in it; results then differ by machine


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    number: int
    loss: float
    validation_mse: float
    images_per_s: float


class Progress(Protocol):
    """Who shows how far the training is."""

    def begin(self, images: int, epochs: int) -> None:
        """The training begins: so many images in each of so many epochs."""

    def step(self, images: int, loss: float | None) -> None:
        """So many more images were seen; the loss where it is known."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch ended."""


def train(
    network: Autoencoder,
    images: Tensor,
    validation: Tensor,
    optimisation: Optimisation,
    corruption: Corruption,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[Autoencoder, list[Epoch]]:
    """Trains a network on uint8 pictures.

    The same seed, data, settings, device and number of threads give the same weights.

    Args:
        network: as initialised; it is trained in place and stays on `device`.
        images, validation: uint8, (items, *item).
        seed: of the order, the corruption and the posterior's draws, each with its own generator per epoch.

    Returns:
        The network to keep (the averaged weights with `ema_decay`), in evaluation mode, and the epochs.

    Raises TrainingError if the loss stops being a finite number.
    """
    network = network.to(device).train()
    kept = copy.deepcopy(network) if optimisation.ema_decay else network
    images, validation = images.to(device), validation.to(device)  # one copy: no transfers in the loop
    optimiser = _optimiser(network, optimisation)
    steps_per_epoch = math.ceil(len(images) / optimisation.batch_size)
    total_steps = steps_per_epoch * optimisation.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total_steps, optimisation))
    bfloat16 = optimisation.bfloat16 and computes_in_bfloat16(device)
    epochs: list[Epoch] = []
    step = 0
    progress.begin(len(images), optimisation.epochs)

    with deterministic(device):
        for number in range(1, optimisation.epochs + 1):
            start = time.perf_counter()
            order_noise, corruption_noise, posterior_noise = (
                generator(seed, stream, number, device) for stream in ("order", "corruption", "posterior")
            )
            order = torch.randperm(len(images), generator=order_noise, device=device)
            loss_sum = torch.zeros((), device=device)
            for indices in torch.split(order, optimisation.batch_size):
                target = to_unit(images[indices])
                x = corrupt(target, corruption, corruption_noise)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = network.loss(x, target, posterior_noise)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if optimisation.clip_norm:
                    nn.utils.clip_grad_norm_(network.parameters(), optimisation.clip_norm)
                optimiser.step()
                schedule.step()
                step += 1
                if optimisation.ema_decay:
                    _average(kept, network, min(optimisation.ema_decay, (1 + step) / (10 + step)))
                loss_sum += loss.detach().float() * len(indices)
                # Reading a number waits for the device, so not at every step.
                shown = _finite(loss, number, optimisation) if step % STEPS_BETWEEN_CHECKS == 0 else None
                progress.step(len(indices), shown)
            mean_loss = _finite(loss_sum / len(images), number, optimisation)
            seconds = time.perf_counter() - start
            mse = reconstruction_mse(kept, validation)
            epochs.append(Epoch(number, mean_loss, mse, len(images) / seconds))
            progress.epoch(epochs[-1])
    return kept.eval(), epochs


@torch.inference_mode()
def reconstruction_mse(network: Autoencoder, images: Tensor) -> float:
    """Mean squared error per value of the reconstruction of uint8 pictures, (items, *item)."""
    was_training = network.training
    network.eval()
    errors = [
        mean_squared_error(network.reconstruct(x), x) for x in map(to_unit, torch.split(images, EVALUATION_BATCH_SIZE))
    ]
    network.train(was_training)
    return float(torch.cat(errors).double().mean())


def generator(seed: int, stream: str, number: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each use, so that one more draw here moves nothing there."""
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Has torch use deterministic algorithms only, and restores what was set before."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, so that autocast gains time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _optimiser(network: nn.Module, optimisation: Optimisation) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if optimisation.optimiser == "adam" else torch.optim.AdamW
    return kind(network.parameters(), lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, fused=True)


def _rate(step: int, total_steps: int, optimisation: Optimisation) -> float:
    """The learning rate of a step, as a factor: linear warm-up, then constant or a half cosine down to zero."""
    warmup = round(optimisation.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if optimisation.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


@torch.no_grad()
def _average(kept: nn.Module, network: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(kept.parameters()), list(network.parameters()), 1 - decay)


def _finite(loss: Tensor, epoch: int, optimisation: Optimisation) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"loss: expected a finite number, found {value} in epoch {epoch}; lower optimisation.learning_rate "
            f"({optimisation.learning_rate}) or set optimisation.clip_norm ({optimisation.clip_norm})"
        )
    return value
