"""A ``torch.save`` file (``.pt``, ``.pth``, Lightning's ``.ckpt``): a zip archive whose directory is written last.

Complete when that directory parses (and its size is stable, which discovery sees to). Its pickle is never run, and of
its tensors only the model's are read (`torch_archive`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rksp_core.errors import CorruptCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.inert_pickle import Made
from rksp_monitor.checkpoints.lazy import LazyTensors
from rksp_monitor.checkpoints.names import is_candidate, shown, step_in
from rksp_monitor.checkpoints.source import Source
from rksp_monitor.checkpoints.torch_archive import StoredTensor, TorchArchive, stored

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
    """Check that the zip directory is there."""
    open_archive(path)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the model's state dict; each tensor is read when it is asked for.

    Raises
    ------
    CheckpointError
        When the file is gone, damaged, holds objects that are no tensors (unless ``trust_pickle``, which looks past
        them: they are not made), or no state dict.
    """
    archive = open_archive(path)
    content = archive.content(trust_pickle=trust_pickle)
    return lazy_tensors(archive, state_dict(content, archive.name))


def open_archive(path: Path) -> TorchArchive:
    """Open the file and read its directory.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while there is no directory, CorruptCheckpoint when the file is no archive of torch.
    """
    source = Source(path)
    magic = bytes(source.read(0, min(4, source.size)))
    if magic.strip(b"\0") and not b"PK\x03\x04".startswith(magic):
        raise CorruptCheckpoint(
            f"{source.name} is no zip archive, as torch.save writes since version 1.6: it is no checkpoint, or must "
            "be saved again with a newer torch"
        )
    try:
        return TorchArchive(source)
    except zipfile.BadZipFile as error:
        raise IncompleteCheckpoint(f"{source.name} has no zip directory yet ({shown(str(error))})") from error


def lazy_tensors(archive: TorchArchive, found: Mapping[str, StoredTensor]) -> LazyTensors:
    """Return tensors of an archive, each read when it is asked for."""
    return LazyTensors({key: tensor.described for key, tensor in found.items()}, lambda key: archive.read(found[key]))


def state_dict(content: Any, name: str) -> dict[str, StoredTensor]:
    """Find the model's tensors in what was saved: at the top, or under one of `MODEL_KEYS`.

    Raises
    ------
    CorruptCheckpoint
        When there are none, or some are of a kind that is not read.
    """
    nested = [content[key] for key in MODEL_KEYS if isinstance(content, dict) and _is_state(content.get(key))]
    found = nested[0] if nested else content
    if not _is_state(found):
        kind = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CorruptCheckpoint(f"{name} holds no state dict (found {shown(kind)}); expected one, or one under 'model'")
    return tensors_of(found, name)


def tensors_of(found: Mapping[str, Any], name: str) -> dict[str, StoredTensor]:
    """Return the tensors among the values of a dictionary.

    Raises
    ------
    CorruptCheckpoint
        When one is of a kind that is not read.
    """
    tensors = {}
    for key, value in found.items():
        try:
            tensor = stored(value)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{name}: {shown(key)} cannot be read: {error}") from error
        except Exception as error:
            raise CorruptCheckpoint(f"{name} is damaged: {shown(key)} is no tensor of torch ({error!r})") from error
        if tensor is not None:
            tensors[key] = tensor
    return tensors


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(part, Made) and part.name.startswith("torch.") for part in value.values())
    )
