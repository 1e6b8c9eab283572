"""One process or several: what the loop needs from `torch.distributed`, and nothing where it runs alone.

Under ``torchrun`` every process sees the same steps; rank 0 decides, writes and speaks. A process takes a contiguous
share of each batch, so the shares in the order of the ranks are the batch that one process would take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rksp_core import find_blocks
from rksp_core.device import choose_device
from rksp_core.errors import RkspError


class Elsewhere(RkspError):  # noqa: N818 - no mistake here
    """Another process has failed, and says why."""


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

    def wrap(self, model: nn.Module, strategy: str) -> nn.Module:
        """Average the gradients of all processes: ``ddp`` keeps a copy of the model in each, ``fsdp`` (FSDP2) a shard.

        FSDP2 (`torch.distributed.fsdp.fully_shard`) changes the model in place, block by block.
        """
        if self.size == 1:
            return model
        if strategy == "ddp":
            return DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard  # a second to import

        mesh = distributed.init_device_mesh(self.device.type, (self.size,))
        for block in find_blocks(model):
            fully_shard(block.module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def share(self, whole: Tensor) -> Tensor:
        """Return this process's part of a batch, on its device."""
        size = len(whole) // self.size
        return whole[self.rank * size : (self.rank + 1) * size].to(self.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Fail in all processes where one does, so that none waits for it; what rank 0 says, no other repeats.

        Raises
        ------
        Elsewhere
            In a process whose own context went well, or whose trouble is rank 0's.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - raised below
            error = caught
        failed, said = self.sum([error is not None, error is not None and self.first])
        if error is not None and (self.first or not said):
            raise error
        if failed:
            raise Elsewhere

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def add_up(self, value: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(value)

    def mean(self, *values: Tensor) -> list[float]:
        """Return the means of scalars over all processes."""
        return [value / self.size for value in self.sum([float(value.detach()) for value in values])]

    def from_first(self, values: Sequence[float]) -> list[float]:
        """Return the numbers that rank 0 holds, on every process."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.broadcast(tensor, src=0)
        return tensor.tolist()


def sharded(model: nn.Module) -> bool:
    """Whether each process holds only its part of the weights (FSDP2), so that all are needed to run the model."""
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def synchronized(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Average the gradients over the processes in a backward pass inside the context, or put that off."""
    if sharded(model):
        model.set_requires_gradient_sync(wanted)
        yield
    elif isinstance(model, DistributedDataParallel) and not wanted:
        with model.no_sync():
            yield
    else:
        yield


def whole(value: Tensor) -> Tensor:
    """Return a plain tensor, gathered where it is sharded over the processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


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


def leave(ranks: Ranks, *, failed: bool = False) -> None:
    """Leave the group of processes, all together; or, where something ``failed``, without waiting for the others.

    Gloo's threads outlive the group, and let go of the tensors of the last operation when they get to it: while the
    interpreter ends, that aborts the process. After a barrier, which has no tensors, nothing is left to let go of.
    """
    if ranks.size == 1:
        return
    if not failed:
        distributed.barrier(device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None)
    distributed.destroy_process_group()
