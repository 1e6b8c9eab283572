"""What a command says when the work does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rksp_core.errors import MemoryLimitError

if TYPE_CHECKING:
    import torch

LOWER = (
    "lower --micro-batch (sequences in one forward pass), then --samples, use --dtype bfloat16, leave out --lr (the "
    "look-ahead holds a copy of the model and its optimizer), or set OMP_NUM_THREADS=1 (one layer at a time)"
)

# Of the allocators of CUDA, of the CPU, and of cuBLAS, which torch raises as a plain RuntimeError.
SIGNS = ("out of memory", "allocate memory", "cublas_status_alloc_failed")


@contextlib.contextmanager
def memory_limit(device: torch.device | str, lower: str = LOWER) -> Iterator[None]:
    """Turn running out of memory, here or on a GPU, into one sentence that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise MemoryLimitError(f"out of memory on {device}; {lower}") from error


def exhausted(error: BaseException) -> bool:
    """Whether the error, or the one it was made of, means that memory ran out: here or on a GPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS):
        return True
    return error.__cause__ is not None and exhausted(error.__cause__)
