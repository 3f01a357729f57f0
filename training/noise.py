"""Random numbers that no process count and no batch neighbour changes: the one source of draws in training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(seed: int, stream: str, number: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each use, so that one more draw here moves nothing there."""
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Noise:
    """Draws for some rows of a batch, out of those for the whole batch.

    With several processes each holds some rows, draws for all of them and keeps its own: the numbers that a row gets
    are the same however many processes there are.
    """

    generator: torch.Generator
    rows: slice | None = None  # None: all
    total: int = 0  # rows of the whole batch, where `rows` is given

    def normal(self, rows: int, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape)."""
        drawn = torch.randn((self.total or rows, *shape), generator=self.generator, device=self.generator.device)
        return drawn if self.rows is None else drawn[self.rows]

    def uniform(self, rows: int, *shape: int) -> Tensor:
        """Numbers between 0 and 1, (rows, *shape)."""
        drawn = torch.rand((self.total or rows, *shape), generator=self.generator, device=self.generator.device)
        return drawn if self.rows is None else drawn[self.rows]
