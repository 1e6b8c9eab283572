"""An ``iter_*`` folder of Megatron Core: ``metadata.json``, written last, names the backend of the shards.

The backend ``torch_dist`` is `torch.distributed.checkpoint`; ``zarr``, the older one, is recognised and not read. The
tracker file beside the folders is not looked at: it may be half written, or say ``release``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rksp_core.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedCheckpoint
from rksp_monitor.checkpoints import dcp_folder, markers
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, shown, step_in
from rksp_monitor.checkpoints.source import read_json

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
LAST = "metadata.json"
COMMON = "common.pt"  # written first
_NAME = re.compile(r"iter_\d+")


def matches(path: Path) -> bool:
    """A folder that is called ``iter_N``, with Megatron's own files in it."""
    named = _NAME.fullmatch(path.name) is not None and is_candidate(path.name)
    return named and any((path / name).is_file() for name in (COMMON, LAST))


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_in(path.name)


def files(path: Path) -> list[Path]:
    """Return the shards, and what is written before and after them."""
    return [*dcp_folder.files(path), *path.glob(COMMON), *path.glob(LAST)]


@answers
def is_complete(path: Path) -> None:
    """Check for the file that is written last, and the shards of the backend that is read."""
    markers.check(path)
    if _backend(path) == "torch_dist":
        dcp_folder.check_shards(path)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the model's tensors, as `dcp_folder.weights` does.

    Raises
    ------
    CheckpointError
        UnsupportedCheckpoint when another backend wrote them.
    """
    backend = _backend(path)
    if backend != "torch_dist":
        raise UnsupportedCheckpoint(
            f"{shown(path.name)} is a Megatron checkpoint of the backend {shown(backend)}, expected torch_dist; "
            "train with --dist-ckpt-format torch_dist, or convert it"
        )
    return dcp_folder.weights(path, trust_pickle=trust_pickle)


def _backend(path: Path) -> str:
    name = shown(path.name)
    if not (path / LAST).is_file():
        raise IncompleteCheckpoint(f"{name} has no {LAST} yet, which is written last")
    document = read_json(path / LAST)
    backend = document.get("sharded_backend") if isinstance(document, dict) else None
    if not isinstance(backend, str):
        raise CorruptCheckpoint(f"{name}: {LAST} names no sharded_backend, as Megatron's does")
    return backend
