"""One process or several: what the loop needs from `torch.distributed`, and nothing where it runs alone.

Under ``torchrun`` every process sees the same steps; rank 0 decides, writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rksp_core.device import choose_device


@dataclass(frozen=True)
class Ranks:
    """Which process this is (``rank`` of ``size``), and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process decides, writes and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average the gradients of all processes in every backward pass."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            distributed.barrier()

    def mean(self, value: Tensor) -> float:
        """Return the mean of a scalar over all processes."""
        value = value.detach().to(self.device)
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.size
        return float(value)

    def from_first(self, values: Sequence[float]) -> list[float]:
        """Return the numbers that rank 0 holds, on every process."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.broadcast(tensor, src=0)
        return [float(value) for value in tensor]


def join(device: str) -> Ranks:
    """Join the processes that ``torchrun`` started, if it did, and choose this one's device.

    Raises
    ------
    DeviceError
        When there is no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        return Ranks(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(distributed.get_rank(), size, chosen)


def leave(ranks: Ranks) -> None:
    """Leave the group of processes."""
    if ranks.size > 1:
        distributed.destroy_process_group()
