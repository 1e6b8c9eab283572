"""A ``torch.save`` file (``.pt``, ``.pth``, ``.ckpt``): a zip archive whose directory is written last.

Complete when that end-directory parses (and its size is stable, which discovery sees to). Read with
``weights_only``: a pickle that wants to build anything but tensors is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, step_in

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
SUFFIXES = (".pt", ".pth", ".ckpt")

# Under these names training loops commonly put the model next to other state.
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")


def matches(path: Path) -> bool:
    """A ``.pt``, ``.pth`` or ``.ckpt`` file with a step in its name."""
    return path.suffix in SUFFIXES and is_candidate(path.name) and step(path) is not None and path.is_file()


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_in(path.name)


def files(path: Path) -> list[Path]:
    """Return the file itself."""
    return [path]


@answers
def is_complete(path: Path) -> None:
    """Check that the zip directory is there.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while it is not, CorruptCheckpoint when the file is no zip at all.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic.strip(b"\0") and not b"PK\x03\x04".startswith(magic):
            raise CorruptCheckpoint(
                f"{path.name} is no zip archive, so torch wrote it before version 1.6; save it again with a newer torch"
            )
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise CorruptCheckpoint(f"{path.name} is a zip archive, but not one of torch.save (no data.pkl)")
    except FileNotFoundError as error:
        raise ExpiredCheckpoint(f"{path.name} is gone") from error
    except zipfile.BadZipFile as error:
        raise IncompleteCheckpoint(f"{path.name} has no zip directory yet ({error})") from error
    except (OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read: {error}") from error


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:  # noqa: ARG001 - one signature for all
    """Return the model's state dict, mapped from the file; optimizer state is never loaded into memory.

    Raises
    ------
    CheckpointError
        When the file is gone, damaged, holds objects that are no tensors, or no state dict.
    """
    import pickle

    import torch

    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except FileNotFoundError as error:
        raise ExpiredCheckpoint(f"{path.name} is gone") from error
    except pickle.UnpicklingError as error:
        raise CorruptCheckpoint(
            f"{path.name} holds objects other than tensors and plain values, which are never loaded; "
            "save the state dict alone, or as safetensors"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, IndexError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CorruptCheckpoint(f"{path.name} is damaged: {first}") from error
    return _state_dict(content, path.name)


def _state_dict(content: Any, name: str) -> Mapping[str, Tensor]:
    import torch

    def is_state(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(key, str) for key in value)
            and any(isinstance(part, torch.Tensor) for part in value.values())
        )

    nested = [content[key] for key in MODEL_KEYS if isinstance(content, Mapping) and is_state(content.get(key))]
    found = nested[0] if nested else content
    if not is_state(found):
        kind = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CorruptCheckpoint(f"{name} holds no state dict (found {kind}); expected one, or one under 'model'")
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
