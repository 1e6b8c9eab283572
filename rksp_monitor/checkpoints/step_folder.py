"""A folder of one step, such as ``step-00000100/``, with the weights in one file of a format of its own, or sharded.

The bundled trainer fills a temporary folder and renames it, other trainers write in place: so the weights inside
must be complete, whatever made the folder appear. A ``checkpoint-N/`` of the Hugging Face Trainer also has
``trainer_state.json``, which it writes last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rksp_core.errors import CheckpointError, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import markers, safetensors_file, sharded_index, torch_file
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, is_step, shown, step_in
from rksp_monitor.checkpoints.source import read_json

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
METADATA = "checkpoint.json"
TRAINER_STATE = "trainer_state.json"

# In order of preference; the first that is there holds the weights.
_WEIGHTS = {
    "model.safetensors": safetensors_file,
    "model.safetensors.index.json": sharded_index,
    "model.pt": torch_file,
    "model.pth": torch_file,
    "pytorch_model.bin": torch_file,
    "pytorch_model.bin.index.json": sharded_index,
    "pytorch_model_fsdp.bin": torch_file,  # accelerate's FSDP with FULL_STATE_DICT
}
_HUGGING_FACE = re.compile(r"checkpoint-\d+")
_OF_THE_TRAINER = ("config.json", "training_args.bin", TRAINER_STATE)  # written around the weights


def matches(path: Path) -> bool:
    """A folder with a step in its name or metadata, and a weights file in it."""
    return is_candidate(path.name) and path.is_dir() and _weights(path) is not None and step(path) is not None


def step(path: Path) -> int | None:
    """Return the step in the name, or in ``checkpoint.json`` inside."""
    named = step_in(path.name)
    if named is not None:
        return named
    metadata = path / METADATA
    try:
        stored = read_json(metadata).get("step") if metadata.is_file() else None
    except (CheckpointError, AttributeError):
        return None
    return stored if is_step(stored) else None


def files(path: Path) -> list[Path]:
    """Return the weights files, and what is written after them."""
    file = _weights(path)
    if file is None:
        return []
    shards = sharded_index.files(file) if _WEIGHTS[file.name] is sharded_index else [file]
    return [each for each in [*shards, path / TRAINER_STATE] if each == file or each.is_file()]


@answers
def is_complete(path: Path) -> None:
    """Check the weights by their own format's rule, and for the Hugging Face Trainer's last file."""
    markers.check(path)
    file = _required(path)
    found = _WEIGHTS[file.name].is_complete(file)
    if not found:
        raise IncompleteCheckpoint(found.problem)
    of_the_trainer = {name for name in _OF_THE_TRAINER if (path / name).is_file()}
    if _HUGGING_FACE.fullmatch(path.name) and of_the_trainer and TRAINER_STATE not in of_the_trainer:
        raise IncompleteCheckpoint(f"{shown(path.name)} has no {TRAINER_STATE} yet, which is written last")


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors of the weights file or files."""
    file = _required(path)
    content: Mapping[str, Tensor] = _WEIGHTS[file.name].weights(file, trust_pickle=trust_pickle)
    return content


def _weights(path: Path) -> Path | None:
    return next((path / name for name in _WEIGHTS if (path / name).is_file()), None)


def _required(path: Path) -> Path:
    file = _weights(path)
    if file is None:
        raise ExpiredCheckpoint(f"the weights of {shown(path.name)} are gone")
    return file
