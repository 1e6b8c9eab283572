"""A ``stepN/`` of OLMo-core: ``model_and_optim/`` of `torch.distributed.checkpoint`, ``.metadata.json`` is last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rksp_core.errors import IncompleteCheckpoint
from rksp_monitor.checkpoints import dcp_folder, markers, step_folder
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, shown

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
SHARDS = "model_and_optim"
LAST = ".metadata.json"


def matches(path: Path) -> bool:
    """A folder with a step and a ``model_and_optim/`` in it."""
    return is_candidate(path.name) and (path / SHARDS).is_dir() and step(path) is not None


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_folder.step(path)


def files(path: Path) -> list[Path]:
    """Return the shards, and what is written after them."""
    return [*dcp_folder.files(path / SHARDS), *path.glob(LAST)]


@answers
def is_complete(path: Path) -> None:
    """Check for the file that is written last, and the shards."""
    markers.check(path)
    if not (path / LAST).is_file():
        raise IncompleteCheckpoint(f"{shown(path.name)} has no {LAST} yet, which is written last")
    dcp_folder.check_shards(path / SHARDS)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the model's tensors, as `dcp_folder.weights` does."""
    return dcp_folder.weights(path / SHARDS, trust_pickle=trust_pickle)
