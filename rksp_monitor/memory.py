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


@contextlib.contextmanager
def memory_limit(device: torch.device | str, lower: str = LOWER) -> Iterator[None]:
    """Turn running out of memory, here or on a GPU, into one sentence that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        exhausted = isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
        if not exhausted:
            raise
        raise MemoryLimitError(f"out of memory on {device}; {lower}") from error
