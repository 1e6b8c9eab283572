"""Folders that are recognised and not read: JAX's, adapters, older Megatron, FSDP by rank. One sentence says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from rksp_core.errors import ExpiredCheckpoint, UnsupportedCheckpoint
from rksp_monitor.checkpoints import markers, step_folder
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, shown

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"

_OF_A_RANK = "holds a file of each rank (FSDP), which are not read; use SHARDED_STATE_DICT, written through DCP"

# What tells the kind, inside the folder or one below it -> what it is, and what to do.
_SIGNS = {
    "adapter_model.safetensors": "holds an adapter (PEFT) and no model; save the merged model, or train without one",
    "adapter_model.bin": "holds an adapter (PEFT) and no model; save the merged model, or train without one",
    "pytorch_model_fsdp_rank0.bin": _OF_A_RANK,
    "pytorch_model_fsdp_0_rank0.bin": _OF_A_RANK,
    "_CHECKPOINT_METADATA": "is an orbax checkpoint (JAX), which is not read; export it as safetensors",
    "_METADATA": "is an orbax checkpoint (JAX), which is not read; export it as safetensors",
    "manifest.ocdbt": "is a tensorstore checkpoint (orbax or Levanter), which is not read; export it as safetensors",
    ".zarray": "holds zarr arrays (Levanter, Megatron or T5X), which are not read; export it as safetensors",
    "zarr.json": "holds zarr arrays (Levanter, Megatron or T5X), which are not read; export it as safetensors",
    "model_optim_rng.pt": "is an older Megatron checkpoint, which is not read; use --dist-ckpt-format torch_dist",
    "commit_success.txt": "is an orbax checkpoint (JAX), which is not read; export it as safetensors",
}
LEVELS = ("*", "*/*", "*/*/*")  # Levanter's arrays lie as deep as its model is nested: the outermost is enough


def matches(path: Path) -> bool:
    """A folder with a step in its name and one of the signs in it."""
    return is_candidate(path.name) and path.is_dir() and step(path) is not None and _sign(path) is not None


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_folder.step(path)


def files(path: Path) -> list[Path]:
    """Return the sign."""
    sign = _sign(path)
    return [] if sign is None else [sign]


@answers
def is_complete(path: Path) -> None:
    """Check the markers alone, since nothing will be read."""
    markers.check(path)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:  # noqa: ARG001 - nothing is read
    """Say what it is.

    Raises
    ------
    CheckpointError
        Always: UnsupportedCheckpoint, or ExpiredCheckpoint when it is gone.
    """
    _refuse(path)


def _refuse(path: Path) -> NoReturn:
    sign = _sign(path)
    if sign is None:
        raise ExpiredCheckpoint(f"{shown(path.name)} is gone")
    raise UnsupportedCheckpoint(f"{shown(path.name)} {_SIGNS[sign.name]}")


def _sign(path: Path) -> Path | None:
    for level in LEVELS:
        for name in _SIGNS:
            found = next(iter(path.glob(level[:-1] + name)), None)
            if found is not None:
                return found
    return None
