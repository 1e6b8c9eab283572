"""A folder of `torch.distributed.checkpoint`: ``.metadata``, a pickle renamed into place last, and ``*.distcp`` files.

Complete when ``.metadata`` is there and every file it names has the bytes it names. The pickle is read without
running anything (`inert_pickle`). Only the model's tensors are read, each on its own, as files of `torch.save` are
(`torch_archive`); optimizer state is never opened.
"""

from __future__ import annotations

import functools
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import inert_pickle, markers, step_folder
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.inert_pickle import MOST_DIMENSIONS
from rksp_monitor.checkpoints.lazy import Described, LazyTensors
from rksp_monitor.checkpoints.names import is_candidate, shown
from rksp_monitor.checkpoints.source import Source
from rksp_monitor.checkpoints.torch_archive import StoredTensor, TorchArchive, stored
from rksp_monitor.checkpoints.torch_file import MODEL_KEYS

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
METADATA = ".metadata"
OPEN_SHARDS = 16  # at a time


def matches(path: Path) -> bool:
    """A folder with a step in its name or in ``checkpoint.json``, and a file of DCP in it."""
    return is_candidate(path.name) and path.is_dir() and step(path) is not None and bool(files(path))


def step(path: Path) -> int | None:
    """Return the step in the name, or in ``checkpoint.json`` inside."""
    return step_folder.step(path)


def files(path: Path) -> list[Path]:
    """Return ``.metadata`` and the shards, those of the optimizer too; none when the folder is gone."""
    return sorted([*path.glob(METADATA), *path.glob("*.distcp")])


@answers
def is_complete(path: Path) -> None:
    """Check that every file is there with the bytes that ``.metadata`` names."""
    markers.check(path)
    check_shards(path)


def check_shards(path: Path) -> None:
    """Check the shards against ``.metadata``, which is read once however often a slow writer is looked at.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while something is missing, CorruptCheckpoint when ``.metadata`` is no metadata of DCP.
    """
    name = shown(path.name)
    for shard, size in _needed(path, *_metadata_stamp(path)):
        try:
            found = (path / shard).stat().st_size
        except FileNotFoundError as error:
            raise IncompleteCheckpoint(f"{name} names {shard}, which is not there yet") from error
        except OSError as error:
            raise CorruptCheckpoint(f"{name}: {shard} cannot be read: {error.strerror}") from error
        if found < size:
            raise IncompleteCheckpoint(f"{name}: {shard} has {found} of {size} bytes")


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:  # noqa: ARG001 - none is ever run
    """Return the model's tensors by their names in the model, each put together from its shards when it is asked for.

    Raises
    ------
    CheckpointError
        When a file is gone or damaged, or the checkpoint holds no model.
    """
    name, contents = shown(path.name), _contents(path)
    keys = {model_name: key for key, model_name in _model_names(contents).items()}
    if not keys:
        found = ", ".join(sorted({place[0] for place in contents.paths.values()})) or "nothing"
        raise CorruptCheckpoint(
            f"{name} holds no model (found {shown(found)}); expected one at the top or under 'model'"
        )
    wanted = set(keys.values())
    parts: dict[str, list[_Item]] = {key: [] for key in wanted}
    for item in contents.items:
        if item.key in wanted:
            parts[item.key].append(item)
    shards = functools.lru_cache(maxsize=OPEN_SHARDS)(lambda shard: Source(path / shard))
    described = {model_name: contents.tensors[key] for model_name, key in keys.items()}

    def read(model_name: str) -> Tensor:
        key = keys[model_name]
        try:
            return _assembled(shards, described[model_name], parts[key])
        except CheckpointError:
            raise
        except Exception as error:
            raise CorruptCheckpoint(f"{name} is damaged: {shown(key)}: {shown(str(error))}") from error

    return LazyTensors(described, read)


@dataclass(frozen=True)
class _Item:
    """Where one piece lies; ``place`` is its offset in the whole tensor, one number a dimension."""

    key: str
    place: tuple[int, ...]
    file: str
    offset: int
    length: int
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class _Contents:
    """What ``.metadata`` says: the pieces, what whole tensors are, and each key's path in the saved dictionary."""

    items: tuple[_Item, ...]
    tensors: Mapping[str, Described]
    paths: Mapping[str, tuple[str, ...]]


def _model_names(contents: _Contents) -> dict[str, str]:
    """Return {key in the checkpoint: name in the model}.

    The model's tensors lie in a dictionary of their own (``model``, at the top or inside one other), or at the top
    beside dictionaries of other state, as torchtitan writes them.
    """
    top: dict[str, str] = {}
    inside: dict[tuple[str, ...], dict[str, str]] = {}
    for key in contents.tensors:
        *folders, name = contents.paths[key]
        depth = next((n for n, folder in enumerate(folders[:2], start=1) if folder in MODEL_KEYS), None)
        if depth is not None:
            inside.setdefault(tuple(folders[:depth]), {})[key] = ".".join([*folders[depth:], name])
        elif not folders and is_candidate(name.partition(".")[0]):
            top[key] = name
    if not inside:
        return top
    return inside[min(inside, key=lambda folders: (len(folders), MODEL_KEYS.index(folders[-1])))]


def _assembled(shards: Callable[[str], Source], whole: Described, parts: list[_Item]) -> Tensor:
    """Read the parts of one tensor and put each in its place; nothing is reserved that the shards do not hold."""
    import torch

    described = [(part, *_described_part(shards(part.file), part)) for part in parts]
    places = {(part.place, tensor.described.shape) for part, _, tensor in described}
    if len(places) != len(parts) or sum(math.prod(shape) for _, shape in places) != math.prod(whole.shape):
        raise ValueError(f"its shards do not make up its size {whole.shape}")
    if len(described) == 1:
        _, archive, tensor = described[0]
        return archive.read(tensor).reshape(whole.shape)
    filled = torch.empty(whole.shape, dtype=getattr(torch, whole.dtype))
    for part, archive, tensor in described:
        shape = tensor.described.shape
        filled[tuple(slice(at, at + length) for at, length in zip(part.place, shape, strict=True))] = archive.read(
            tensor
        )
    return filled


def _described_part(shard: Source, part: _Item) -> tuple[TorchArchive, StoredTensor]:
    """Open one item, which is a `torch.save` file of its own within the shard."""
    if part.extensions:
        raise ValueError(f"it is stored with {', '.join(part.extensions)}; write it without extensions")
    if part.offset + part.length > shard.size:
        raise ValueError(f"{shard.name} has {shard.size} of {part.offset + part.length} bytes")
    archive = TorchArchive(shard, part.offset, part.length)
    tensor = stored(archive.content())
    if tensor is None:
        raise TypeError("expected a tensor")
    held = tensor.described
    if math.prod(held.shape) > part.length:
        raise ValueError(f"its shape {held.shape} is larger than its {part.length} bytes")
    return archive, tensor


def _metadata_stamp(path: Path) -> tuple[int, int, int]:
    """Return size, time and inode of ``.metadata``."""
    try:
        stat = (path / METADATA).stat()
    except FileNotFoundError as error:
        if not path.exists():
            raise ExpiredCheckpoint(f"{shown(path.name)} is gone") from error
        raise IncompleteCheckpoint(f"{shown(path.name)} has no {METADATA} yet, which is written last") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{shown(path.name)}: {METADATA} cannot be read: {error.strerror}") from error
    return stat.st_size, int(stat.st_mtime * 1e6), stat.st_ino


@functools.lru_cache(maxsize=64)
def _needed(path: Path, *_stamp: int) -> tuple[tuple[str, int], ...]:
    """Return each shard that ``.metadata`` names, and the bytes it must have."""
    needed: dict[str, int] = {}
    for item in _contents(path).items:
        needed[item.file] = max(needed.get(item.file, 0), item.offset + item.length)
    return tuple(needed.items())


def _contents(path: Path) -> _Contents:
    """Read ``.metadata``.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while it is missing or cut short, CorruptCheckpoint when it is anything else.
    """
    name = shown(path.name)
    size, *_ = _metadata_stamp(path)
    if size > inert_pickle.LARGEST:
        raise CorruptCheckpoint(
            f"{name}: {METADATA} has {size >> 20} MiB, at most {inert_pickle.LARGEST >> 20} are read (230000 pieces); "
            "save fewer shards"
        )
    data = Source(path / METADATA).read(0, size)
    if not data.endswith(pickle.STOP):
        raise IncompleteCheckpoint(f"{name}: {METADATA} is cut short")
    try:
        return _described(inert_pickle.load(data, _is_metadata_name))
    except inert_pickle.Refused as refused:
        raise CorruptCheckpoint(
            f"{name}: {METADATA} names {shown(str(refused))}, which no checkpoint needs; it was not loaded"
        ) from refused
    except Exception as error:
        what = f"{type(error).__name__}: {shown(str(error))}"
        raise CorruptCheckpoint(f"{name}: {METADATA} is no metadata of DCP ({what})") from error


def _described(metadata: Any) -> _Contents:
    """Take what is needed out of the unpickled records, whatever types a stranger gave their fields."""
    entries, storage = metadata.state["state_dict_metadata"], metadata.state["storage_data"]
    written = metadata.state.get("planner_data") or {}  # nothing where the dictionary was saved without flattening
    tensors = {key: _tensor(entry.state) for key, entry in entries.items() if "size" in (entry.state or {})}
    paths = {_text(key): _path(written.get(key) or (key,)) for key in entries}
    return _Contents(tuple(_item(index.state, info.state) for index, info in storage.items()), tensors, paths)


def _tensor(state: Mapping[str, Any]) -> Described:
    properties = state["properties"].state  # a tuple since torch 2.0, the dtype first
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    return Described(_whole(state["size"]), dtype.name.removeprefix("torch."))


def _path(parts: Any) -> tuple[str, ...]:
    if len(parts) > MOST_DIMENSIONS:
        raise ValueError("a key has too many parts")
    return tuple(str(_plain(part)) for part in parts)


def _item(index: Mapping[str, Any], info: Mapping[str, Any]) -> _Item:
    if not _SHARD.fullmatch(_text(info["relative_path"])):
        raise ValueError("a shard is not called as DCP calls them")
    offset, length = _whole((info["offset"], info["length"]))
    extensions = tuple(_text(name) for name in (info.get("transform_descriptors") or ())[:MOST_DIMENSIONS])
    place = _whole(index.get("offset") or ())
    return _Item(_text(index["fqn"]), place, info["relative_path"], offset, length, extensions)


def _plain(value: Any) -> str | int:
    if not isinstance(value, str | int):
        raise TypeError(f"expected a name or a number, got a {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, got a {type(value).__name__}")
    return value


def _whole(values: Any) -> tuple[int, ...]:
    if len(values) > MOST_DIMENSIONS or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError("a size or an offset is no whole number")
    return tuple(values)


def _is_metadata_name(name: str) -> bool:
    return name in _RECORDS or bool(_DTYPE.fullmatch(name))


_SHARD = re.compile(r"[\w.-]+\.distcp")
_DTYPE = re.compile(r"torch\.(bool|(b?float|u?int|complex)\d+\w*)")

_METADATA_CLASSES = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_RECORDS = frozenset(
    {
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in _METADATA_CLASSES),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "olmo_core.distributed.checkpoint.filesystem._StorageInfo",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
        "megatron.core.dist_checkpointing.mapping.MCoreMetadata",
        "torch.Size",
        "torch.serialization._get_layout",
        *(
            f"pathlib{module}.{name}Path" for module in ("", "._local") for name in ("Posix", "Windows")
        ),  # of the writer
    }
)
