"""A folder of one step, such as ``step-00000100/``, with the weights in one file of a format of its own.

The bundled trainer fills a temporary folder and renames it, other trainers write in place: so the weights inside
must be complete, whatever made the folder appear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rksp_core.errors import ExpiredCheckpoint
from rksp_monitor.checkpoints import safetensors_file, torch_file
from rksp_monitor.checkpoints.completeness import Completeness
from rksp_monitor.checkpoints.names import is_candidate, is_step, step_in

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
METADATA = "checkpoint.json"

# In order of preference; the first that is there holds the weights.
_WEIGHTS = {
    "model.safetensors": safetensors_file,
    "model.pt": torch_file,
    "model.pth": torch_file,
    "pytorch_model.bin": torch_file,
}


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
        stored = json.loads(metadata.read_bytes()).get("step") if metadata.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return stored if is_step(stored) else None


def files(path: Path) -> list[Path]:
    """Return the weights file."""
    file = _weights(path)
    return [] if file is None else [file]


def is_complete(path: Path) -> Completeness:
    """Check the weights file by its own format's rule."""
    file = _required(path)
    found: Completeness = _WEIGHTS[file.name].is_complete(file)
    return found


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors of the weights file."""
    file = _required(path)
    content: Mapping[str, Tensor] = _WEIGHTS[file.name].weights(file, trust_pickle=trust_pickle)
    return content


def _weights(path: Path) -> Path | None:
    return next((path / name for name in _WEIGHTS if (path / name).is_file()), None)


def _required(path: Path) -> Path:
    file = _weights(path)
    if file is None:
        raise ExpiredCheckpoint(f"the weights of {path.name} are gone")
    return file
