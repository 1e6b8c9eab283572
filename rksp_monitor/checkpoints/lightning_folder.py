"""A sharded ``.ckpt`` of Lightning, a folder: `torch.distributed.checkpoint`, and ``meta.pt`` written after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rksp_core.errors import IncompleteCheckpoint
from rksp_monitor.checkpoints import dcp_folder, markers
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, shown, step_in

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
LAST = "meta.pt"


def matches(path: Path) -> bool:
    """A folder that is called as Lightning calls its files, with a step in its name and shards in it."""
    named = path.suffix == ".ckpt" and is_candidate(path.name) and step(path) is not None
    return named and path.is_dir() and bool(files(path))


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_in(path.name)


def files(path: Path) -> list[Path]:
    """Return the shards, and what is written after them."""
    return [*dcp_folder.files(path), *path.glob(LAST)]


@answers
def is_complete(path: Path) -> None:
    """Check the shards, and for the file that is written last."""
    markers.check(path)
    dcp_folder.check_shards(path)
    if not (path / LAST).is_file():
        raise IncompleteCheckpoint(f"{shown(path.name)} has no {LAST} yet, which is written last")


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the model's tensors, as `dcp_folder.weights` does."""
    return dcp_folder.weights(path, trust_pickle=trust_pickle)
