"""A ``checkpoint-N/`` of the Hugging Face Trainer under FSDP: accelerate's ``pytorch_model_fsdp_0/`` holds the weights.

It is written by `torch.distributed.checkpoint` (``SHARDED_STATE_DICT``), before everything else: the optimizer, which
takes longer, goes to ``optimizer_0/`` beside it. accelerate numbers the models of a program; the Trainer has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rksp_monitor.checkpoints import dcp_folder, markers, step_folder
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
SHARDS = "pytorch_model_fsdp_0"


def matches(path: Path) -> bool:
    """A folder with a step and a ``pytorch_model_fsdp_0/`` in it."""
    return is_candidate(path.name) and (path / SHARDS).is_dir() and step(path) is not None


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_folder.step(path)


def files(path: Path) -> list[Path]:
    """Return the shards; what is written after them changes no weights."""
    return dcp_folder.files(path / SHARDS)


@answers
def is_complete(path: Path) -> None:
    """Check the shards."""
    markers.check(path)
    dcp_folder.check_shards(path / SHARDS)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the model's tensors, as `dcp_folder.weights` does."""
    return dcp_folder.weights(path / SHARDS, trust_pickle=trust_pickle)
