"""Weights cut into several files, with an index that says which holds what: Hugging Face's ``*.index.json``.

Complete when the index and every file that it names are: the index alone proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import safetensors_file, torch_file
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.lazy import LazyTensors, describe
from rksp_monitor.checkpoints.names import shown
from rksp_monitor.checkpoints.source import read_json

if TYPE_CHECKING:
    from torch import Tensor

_SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")


def files(path: Path) -> list[Path]:
    """Return the index and the files that it names, as far as it can be read."""
    try:
        return [path, *(path.parent / name for name in _shards(path))]
    except CheckpointError:
        return [path]


@answers
def is_complete(path: Path) -> None:
    """Check every file that the index names by its own format's rule."""
    for name in _shards(path):
        shard = path.parent / name
        if not shard.exists():
            raise IncompleteCheckpoint(f"{shown(path.name)} names {name}, which is not there yet")
        found = (safetensors_file if shard.suffix == ".safetensors" else torch_file).is_complete(shard)
        if not found:
            raise IncompleteCheckpoint(found.problem)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors of all files by name; each is read when it is asked for.

    Raises
    ------
    CheckpointError
        When the index or a file is wrong, or a tensor is not in the file that the index says.
    """
    places = _places(path)
    opened: dict[str, Mapping[str, Tensor]] = {}
    for name in sorted(set(places.values())):
        module = safetensors_file if name.endswith(".safetensors") else torch_file
        try:
            opened[name] = module.weights(path.parent / name, trust_pickle=trust_pickle)
        except ExpiredCheckpoint:
            raise
        except CheckpointError as error:
            raise type(error)(f"{shown(path.parent.name)}: {error}") from error
    for key, name in places.items():
        if key not in opened[name]:
            raise CorruptCheckpoint(f"{shown(path.name)} says that {shown(key)} is in {name}, which does not hold it")
    return LazyTensors(
        {key: describe(opened[name], key) for key, name in places.items()}, lambda key: opened[places[key]][key]
    )


def _shards(path: Path) -> list[str]:
    return sorted(set(_places(path).values()))


def _places(path: Path) -> dict[str, str]:
    """Return {tensor: file} of the index, whose files lie beside it."""
    document, index = read_json(path), shown(path.name)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise CorruptCheckpoint(f"{index} has no weight_map, as an index of shards has")
    for name in places.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CorruptCheckpoint(f"{index} names {shown(str(name))}, expected a file beside it")
    return places
