"""Several processes as one: who takes which rows of a batch, and how their gradients become that of the whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Processes:
    """One process among those that train together; alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that are this process's."""
        return slice(batch_size * self.rank // self.count, batch_size * (self.rank + 1) // self.count)

    def sum_gradients(self, network: nn.Module, loss: Tensor) -> Tensor:
        """Adds up gradients, and the loss which it returns, over all processes."""
        if self.count == 1:
            return loss
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        start = 1
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = flat[start : start + gradient.numel()].view_as(gradient)
            start += gradient.numel()
        return flat[0]

    def agree(self, elapsed_s: float, stop: bool) -> tuple[float, bool]:
        """The first process's clock, and whether any process was asked to stop."""
        if self.count == 1:
            return elapsed_s, stop
        told = torch.tensor([elapsed_s if self.rank == 0 else 0.0, float(stop)], dtype=torch.float64)
        if distributed.get_backend() == "nccl":
            told = told.cuda()
        distributed.all_reduce(told)
        return float(told[0]), bool(told[1] > 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """The processes that `torchrun` started together with this one; leaves the group in the end."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
