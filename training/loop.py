"""The training loop: one function, read top to bottom. Knows tensors and a network, neither files nor serving."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from training.autoencoders import Autoencoder
from training.corruptions import Corruption
from training.data import to_float
from training.errors import TrainingError
from training.losses import mean_squared_error
from training.noise import Noise, generator
from training.processes import Processes

EVALUATION_BATCH_SIZE = 500
STEPS_BETWEEN_CHECKS = 50
PREPARING_ITEMS = 10_000


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
    patience: NonNegativeInt = 0  # epochs without a better validation loss before the end; 0: never early


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    number: int
    loss: float
    validation_loss: float
    validation_mse: float
    learning_rate: float
    images_per_s: float


class Progress(Protocol):
    """Who shows how far the training is."""

    def begin(self, images: int, epochs: int, seen: int = 0) -> None:
        """The training begins: so many images in each of so many epochs, so many of them seen before."""

    def step(self, images: int, loss: float | None) -> None:
        """So many more images were seen; the loss where it is known."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch ended."""


class Checkpoints(Protocol):
    """Where a training's state is kept, so that it can go on as if never interrupted."""

    def load(self) -> dict[str, Any] | None:
        """The last state saved, if any."""

    def save(self, state: dict[str, Any]) -> None:
        """Keeps a state in place of the last one, whole or not at all."""

    def due(self) -> bool:
        """Whether the last one is old enough for another within an epoch."""


class Interrupted(Exception):  # named for what happened
    """The training was asked to stop; its state is saved where there are checkpoints."""


def _never() -> bool:
    return False


def train(  # noqa: PLR0915  # one function, read top to bottom
    network: Autoencoder,
    items: Tensor,
    validation: Tensor,
    optimisation: Optimisation,
    corruption: Corruption,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    max_minutes: float | None = None,
    stop: Callable[[], bool] = _never,
    processes: Processes | None = None,
) -> tuple[Autoencoder, list[Epoch]]:
    """Trains a network on uint8 pictures or float32 records.

    The same seed, data, settings, device and number of threads give the same weights, whether or not the training was
    interrupted and taken up again from its checkpoint. Several processes give those of one up to rounding.

    Args:
        network: as initialised; it is trained in place and stays on `device`.
        items, validation: (items, *item).
        seed: of the order, the corruption and the posterior's draws, each with its own generator per epoch.
        checkpoints: where to go on from, and where to save to after every epoch, at intervals, and when stopped.
        max_minutes: the schedule ends by then if not before. What is reached depends on the machine's speed.
        stop: asked at every step whether to save and raise Interrupted.

    Returns:
        The network to keep (the averaged weights with `ema_decay`, the best epoch's with `patience`), in evaluation
        mode, and the epochs.

    Raises TrainingError if the loss stops being a finite number, and Interrupted.
    """
    processes = processes or Processes()
    network = network.to(device).train()
    items, validation = items.to(device), validation.to(device)  # one copy: no transfers in the loop
    network.prepare(to_float(items[:PREPARING_ITEMS]))
    bfloat16 = optimisation.bfloat16 and computes_in_bfloat16(device)
    kept = copy.deepcopy(network) if optimisation.ema_decay else network
    optimiser, parameters = _optimiser(network, optimisation), list(network.parameters())
    total_steps = math.ceil(len(items) / optimisation.batch_size) * optimisation.epochs
    state = _State()
    if checkpoints is not None and (saved := checkpoints.load()) is not None:
        state = _restore(saved, network, kept, optimiser)
    progress.begin(len(items), optimisation.epochs, state.seen(len(items), optimisation.batch_size))
    started = time.perf_counter() - state.elapsed_s

    def save() -> None:
        if checkpoints is not None:
            state.elapsed_s = time.perf_counter() - started
            checkpoints.save(_snapshot(state, network, kept, optimiser))

    with deterministic(device):
        while not state.finished:
            epoch_started, number = time.perf_counter(), len(state.epochs) + 1
            order_noise, *draws = (generator(seed, use, number, device) for use in ("order", "corruption", "posterior"))
            state.enter_epoch(draws, device)
            order = torch.randperm(len(items), generator=order_noise, device=device)
            batches = torch.split(order, optimisation.batch_size)
            first = state.batch
            for indices in batches[first:]:
                fraction = state.step / total_steps
                if max_minutes is not None:
                    fraction = max(fraction, state.elapsed_s / (60 * max_minutes))
                rate = _rate(fraction, total_steps, optimisation)
                network.advance(fraction)
                rows = processes.rows(len(indices))
                noise, posterior = (Noise(draw, rows, len(indices)) for draw in draws)
                target = to_float(items.index_select(0, indices[rows]))  # copies whole rows, unlike items[…]
                corrupted = network.corrupt(target, corruption, noise)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = network.loss(corrupted.x, corrupted.mask, target, posterior)
                # A process's share of the mean over the whole batch.
                share = loss * (len(target) / len(indices)) if len(target) else loss.nan_to_num() * 0
                for parameter in parameters:
                    parameter.grad = None
                share.backward()  # type: ignore[no-untyped-call]  # torch's
                state.elapsed_s, stopping = processes.agree(time.perf_counter() - started, stop())
                share = processes.sum_gradients(network, share.detach().float())
                if optimisation.clip_norm:
                    nn.utils.clip_grad_norm_(parameters, optimisation.clip_norm)
                for group in optimiser.param_groups:
                    group["lr"] = optimisation.learning_rate * rate
                optimiser.step()
                state.step += 1
                state.batch += 1
                if optimisation.ema_decay:
                    _average(kept, network, min(optimisation.ema_decay, (1 + state.step) / (10 + state.step)))
                state.loss_sum += share * len(indices)
                # Reading a number waits for the device, so not at every step.
                shown = _finite(share, number, optimisation) if state.step % STEPS_BETWEEN_CHECKS == 0 else None
                progress.step(len(indices), shown)
                if stopping:
                    save()
                    raise Interrupted(f"stopped in epoch {number}, after step {state.step}")
                if max_minutes is not None and state.elapsed_s >= 60 * max_minutes:
                    state.finished = True
                    break
                if checkpoints is not None and checkpoints.due():
                    save()
            seen = min(len(items), state.batch * optimisation.batch_size)
            mean_loss = _finite(state.loss_sum / seen, number, optimisation)
            seconds = time.perf_counter() - epoch_started
            network.advance(1.0)
            validation_loss, mse = validate(kept, validation, corruption)
            seen_now = seen - first * optimisation.batch_size
            state.epochs.append(
                Epoch(number, mean_loss, validation_loss, mse, optimiser.param_groups[0]["lr"], seen_now / seconds)
            )
            state.end_epoch(kept, optimisation)
            save()
            progress.epoch(state.epochs[-1])
    if state.best is not None:
        kept.load_state_dict(state.best)
    return kept.eval(), state.epochs


class _State:
    """All of a training that is neither weights nor settings."""

    def __init__(self) -> None:
        self.step = 0
        self.batch = 0  # of the epoch under way
        self.epochs: list[Epoch] = []
        self.elapsed_s = 0.0
        self.loss_sum = torch.zeros(())
        self.draws: list[Tensor] | None = None  # the generators' states in mid-epoch
        self.generators: list[torch.Generator] = []
        self.finished = False
        self.best: dict[str, Tensor] | None = None
        self.best_loss = math.inf
        self.epochs_since_best = 0

    def seen(self, items: int, batch_size: int) -> int:
        """Items seen so far."""
        return len(self.epochs) * items + self.batch * batch_size

    def enter_epoch(self, draws: list[torch.Generator], device: torch.device) -> None:
        """Begins an epoch, or goes on in its middle with the generators as they stood."""
        self.generators = draws
        if self.draws is not None:
            for draw, saved in zip(draws, self.draws, strict=True):
                draw.set_state(saved)
            self.draws = None
        self.loss_sum = self.loss_sum.to(device)

    def end_epoch(self, kept: nn.Module, optimisation: Optimisation) -> None:
        """Counts epochs without improvement, and decides whether this was the last one."""
        self.batch, self.loss_sum, self.generators = 0, torch.zeros(()), []
        if optimisation.patience:
            if self.epochs[-1].validation_loss < self.best_loss:
                self.best = {name: tensor.detach().clone() for name, tensor in kept.state_dict().items()}
                self.best_loss, self.epochs_since_best = self.epochs[-1].validation_loss, 0
            else:
                self.epochs_since_best += 1
        patience_is_over = bool(optimisation.patience) and self.epochs_since_best >= optimisation.patience
        self.finished = self.finished or patience_is_over or len(self.epochs) >= optimisation.epochs


_PLAIN = ("step", "batch", "elapsed_s", "finished", "best", "best_loss", "epochs_since_best", "loss_sum")


def _snapshot(state: _State, network: nn.Module, kept: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _PLAIN} | {
        "epochs": [asdict(epoch) for epoch in state.epochs],
        "draws": [draw.get_state() for draw in state.generators],
        "network": network.state_dict(),
        "kept": kept.state_dict() if kept is not network else None,
        "optimiser": optimiser.state_dict(),
    }


def _restore(saved: dict[str, Any], network: nn.Module, kept: nn.Module, optimiser: torch.optim.Optimizer) -> _State:
    state = _State()
    for name in _PLAIN:
        setattr(state, name, saved[name])
    state.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
    state.draws = saved["draws"] or None
    network.load_state_dict(saved["network"])
    if saved["kept"] is not None:
        kept.load_state_dict(saved["kept"])
    optimiser.load_state_dict(saved["optimiser"])
    return state


@torch.no_grad()
def validate(network: Autoencoder, items: Tensor, corruption: Corruption) -> tuple[float, float]:
    """The loss with always the same noise, and the reconstruction's mean squared error in the items' units."""
    was_training = network.training
    network.eval()
    draws = [generator(0, use, device=items.device) for use in ("validation corruption", "validation posterior")]
    losses, errors = [], []
    for batch in torch.split(items, EVALUATION_BATCH_SIZE):
        target = to_float(batch)
        corrupted = network.corrupt(target, corruption, Noise(draws[0]))
        loss = network.loss(corrupted.x, corrupted.mask, target, Noise(draws[1]))
        losses.append(float(loss) * len(batch))
        errors.append(mean_squared_error(network.reconstruct(target), target))
    network.train(was_training)
    return sum(losses) / len(items), float(torch.cat(errors).double().mean())


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Has torch use deterministic algorithms only, and restores what was set before."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    memory.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = filled


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, so that autocast gains time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _optimiser(network: nn.Module, optimisation: Optimisation) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if optimisation.optimiser == "adam" else torch.optim.AdamW
    return kind(network.parameters(), lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, fused=True)


def _rate(fraction: float, total_steps: int, optimisation: Optimisation) -> float:
    """The learning rate when so much is done, as a factor: linear warm-up, then constant or half a cosine to zero."""
    warmup = optimisation.warmup_fraction
    if fraction < warmup:
        return min(1.0, (fraction + 1 / total_steps) / warmup)
    if optimisation.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warmup) / (1 - warmup))))


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
