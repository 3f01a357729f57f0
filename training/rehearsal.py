"""What a training will cost, from a few steps of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.dataset import Dataset
from training.loop import train
from training.presets import Preset, build_network
from training.progress import Silent
from training.splits import split_dataset

STEPS = 20


@dataclass(frozen=True)
class Rehearsal:
    """The cost of a training."""

    parameters: int
    memory_bytes: int
    steps: int
    step_s: float

    @property
    def minutes(self) -> float:
        """Of the whole training."""
        return self.steps * self.step_s / 60


def rehearse(preset: Preset, dataset: Dataset, seed: int, device: torch.device) -> Rehearsal:
    """Times STEPS steps, after as many to warm up, and adds up what will be in memory. Trains nothing that is kept."""
    split = split_dataset(dataset, seed)
    batch_size = preset.optimisation.batch_size
    items = dataset.items[split.train[: STEPS * batch_size]]
    steps = math.ceil(len(split.train) / batch_size) * preset.optimisation.epochs
    once = replace(preset.optimisation, epochs=1, patience=0)
    timed = 0.0
    for _ in range(2):
        network = build_network(preset, dataset.item_shape, seed)
        start = time.perf_counter()
        train(
            network,
            items,
            dataset.items[split.validation[:1]],
            once,
            preset.corruption,
            seed=seed,
            device=device,
            progress=Silent(),
        )
        timed = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in network.parameters())
    # Weights, gradients, two moments, and averaged weights.
    of_weights = 4 * parameters * (5 if preset.optimisation.ema_decay else 4)
    activations = 2 * batch_size * _activation_values(network, items[:1], device) * 4
    return Rehearsal(
        parameters=parameters,
        memory_bytes=dataset.items.nbytes + of_weights + activations,
        steps=steps,
        step_s=timed / math.ceil(len(items) / batch_size),
    )


@torch.no_grad()
def _activation_values(network: nn.Module, item: Tensor, device: torch.device) -> int:
    """Numbers that the layers put out for one item."""
    counted = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal counted
        counted += output.numel() if isinstance(output, Tensor) else 0

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        network.reconstruct((item.float() / 255 if item.dtype == torch.uint8 else item).to(device))  # type: ignore[operator]  # torch finds it
    finally:
        for hook in hooks:
            hook.remove()
    return counted
