"""A folder of `torch.distributed.checkpoint`: ``.metadata``, a pickle renamed into place last, and ``*.distcp`` files.

Complete when ``.metadata`` is there and every file it names has the bytes it names. The pickle is read without torch
and without running anything: each class it may name is stood in for by one that only keeps what it is given. Only
the model's tensors are read, each on its own, as `torch.load` reads weights; optimizer state is never opened.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import step_folder
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate
from rksp_monitor.checkpoints.torch_file import MODEL_KEYS

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
METADATA = ".metadata"
LARGEST_METADATA = 2**30


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
    """Check that every file is there with the bytes that ``.metadata`` names.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while something is missing, CorruptCheckpoint when ``.metadata`` is no metadata of DCP.
    """
    needed: dict[str, int] = {}
    for item in _contents(path).items:
        needed[item.file] = max(needed.get(item.file, 0), item.offset + item.length)
    for name, size in needed.items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError as error:
            raise IncompleteCheckpoint(f"{path.name} names {name}, which is not there yet") from error
        except OSError as error:
            raise CorruptCheckpoint(f"{path.name}: {name} cannot be read: {error.strerror}") from error
        if found < size:
            raise IncompleteCheckpoint(f"{path.name}: {name} has {found} of {size} bytes")


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:  # noqa: ARG001 - one signature for all
    """Return the model's tensors by their names in the model, put together from their shards.

    Raises
    ------
    CheckpointError
        When a file is gone or damaged, or the checkpoint holds no model.
    """
    contents = _contents(path)
    names = _model_names(contents)
    if not names:
        found = ", ".join(sorted({place[0] for place in contents.paths.values()})) or "nothing"
        raise CorruptCheckpoint(f"{path.name} holds no model (found {found}); expected one at the top or under 'model'")
    parts: dict[str, list[_Item]] = {key: [] for key in names}
    for item in contents.items:
        if item.key in parts:
            parts[item.key].append(item)
    try:
        return {name: _assembled(path, contents.sizes[key], parts[key]) for key, name in names.items()}
    except FileNotFoundError as error:
        raise ExpiredCheckpoint(f"{path.name} is gone") from error
    except pickle.UnpicklingError as error:
        raise CorruptCheckpoint(f"{path.name} holds objects other than tensors in the place of tensors") from error
    except (RuntimeError, OSError, ValueError, TypeError, EOFError, LookupError, OverflowError) as error:
        raise CorruptCheckpoint(f"{path.name} is damaged: {_short(error)}") from error


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
    """What ``.metadata`` says: the pieces, the sizes of whole tensors, and each key's path in the saved dictionary."""

    items: tuple[_Item, ...]
    sizes: Mapping[str, tuple[int, ...]]
    paths: Mapping[str, tuple[str, ...]]


def _model_names(contents: _Contents) -> dict[str, str]:
    """Return {key in the checkpoint: name in the model}.

    The model's tensors lie in a dictionary of their own (``model``, at the top or inside one other), or at the top
    beside dictionaries of other state, as torchtitan writes them.
    """
    top: dict[str, str] = {}
    inside: dict[tuple[str, ...], dict[str, str]] = {}
    for key in contents.sizes:
        *folders, name = contents.paths[key]
        depth = next((n for n, folder in enumerate(folders[:2], start=1) if folder in MODEL_KEYS), None)
        if depth is not None:
            inside.setdefault(tuple(folders[:depth]), {})[key] = ".".join([*folders[depth:], name])
        elif not folders and is_candidate(name.partition(".")[0]):
            top[key] = name
    if not inside:
        return top
    return inside[min(inside, key=lambda folders: (len(folders), MODEL_KEYS.index(folders[-1])))]


def _assembled(path: Path, size: tuple[int, ...], parts: list[_Item]) -> Tensor:
    """Read the parts of one tensor and put each in its place."""
    import torch

    tensors = [(part.place, _read(path / part.file, part)) for part in parts]
    if sum(tensor.numel() for _, tensor in tensors) != math.prod(size):
        raise ValueError(f"the shards of {parts[0].key if parts else 'a tensor'} do not make up its size {size}")
    if len(tensors) == 1:
        return tensors[0][1].reshape(size)
    whole = torch.empty(size, dtype=tensors[0][1].dtype)
    for place, tensor in tensors:
        whole[tuple(slice(at, at + length) for at, length in zip(place, tensor.shape, strict=True))] = tensor
    return whole


def _read(path: Path, part: _Item) -> Tensor:
    """Read one item, which is a `torch.save` file of its own within the shard."""
    import torch

    if part.extensions:
        raise ValueError(f"{part.key} is stored with {', '.join(part.extensions)}; write it without extensions")
    with path.open("rb") as stream:
        stream.seek(part.offset)
        tensor = torch.load(io.BytesIO(stream.read(part.length)), weights_only=True, map_location="cpu")
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{part.key} is a {type(tensor).__name__}, expected a tensor")
    return tensor


def _contents(path: Path) -> _Contents:
    """Read ``.metadata``.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while it is missing or cut short, CorruptCheckpoint when it is anything else.
    """
    metadata = path / METADATA
    try:
        if metadata.stat().st_size > LARGEST_METADATA:
            raise CorruptCheckpoint(f"{path.name}: {METADATA} is larger than {LARGEST_METADATA >> 20} MiB")
        data = metadata.read_bytes()
    except FileNotFoundError as error:
        if not path.exists():
            raise ExpiredCheckpoint(f"{path.name} is gone") from error
        raise IncompleteCheckpoint(f"{path.name} has no {METADATA} yet, which is written last") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path.name}: {METADATA} cannot be read: {error.strerror}") from error
    if not data.endswith(pickle.STOP):
        raise IncompleteCheckpoint(f"{path.name}: {METADATA} is cut short")
    try:
        return _described(_Unpickler(io.BytesIO(data)).load())
    except _Refused as name:
        raise CorruptCheckpoint(
            f"{path.name}: {METADATA} names {_short(name)}, which no checkpoint needs; it was not loaded"
        ) from name
    except Exception as error:
        what = f"{type(error).__name__}: {_short(error)}"
        raise CorruptCheckpoint(f"{path.name}: {METADATA} is no metadata of DCP ({what})") from error


def _short(error: Exception) -> str:
    """Return what an error says on one line: it may quote a name that a stranger chose."""
    return " ".join(str(error).partition("\n")[0].split())[:200]


def _described(metadata: Any) -> _Contents:
    """Take what is needed out of the unpickled records, whatever types a stranger gave their fields."""
    entries, storage = metadata.state["state_dict_metadata"], metadata.state["storage_data"]
    written = metadata.state.get("planner_data") or {}  # nothing where the dictionary was saved without flattening
    sizes = {key: _whole(entry.state["size"]) for key, entry in entries.items() if "size" in (entry.state or {})}
    paths = {_text(key): tuple(str(_plain(part)) for part in written.get(key) or (key,)) for key in entries}
    return _Contents(tuple(_item(index.state, info.state) for index, info in storage.items()), sizes, paths)


def _item(index: Mapping[str, Any], info: Mapping[str, Any]) -> _Item:
    if not _SHARD.fullmatch(_text(info["relative_path"])):
        raise ValueError("a shard is not called as DCP calls them")
    offset, length = _whole((info["offset"], info["length"]))
    extensions = tuple(_text(name) for name in info.get("transform_descriptors") or ())
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
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError("a size or an offset is no whole number")
    return tuple(values)


class _Refused(Exception):  # noqa: N818 - the name that was refused
    pass


class _Record:
    """Stands in for an instance of a class of DCP: keeps what the pickle says of it, and does nothing."""

    __slots__ = ("state",)
    state: Any

    def __new__(cls, *_: object) -> _Record:  # noqa: PYI034 - the shape checker of the tests cannot see `Self`
        record = object.__new__(cls)
        record.state = None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What `pickle.dump` uses for metadata; no bytes, sets, extensions or persistent objects.
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.PUT, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.SHORT_BINUNICODE, pickle.BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND,
    pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL,
    pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """Reads ``.metadata`` and imports nothing: a name that is not in the table is refused, the others are inert.

    It is the standard library's own in Python. The one in C (2.5 s instead of 9 for 230 000 pieces) reserves whatever
    memory a forged number asks for: eight bytes could end the watcher, and the training beside it.
    """

    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        raise _Refused(f"{module}.{name}")


_SHARD = re.compile(r"[\w.-]+\.distcp")
_DTYPE = re.compile(r"bool|(b?float|u?int|complex)\d+\w*")

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},  # where it was written
    "pathlib._local": {"PosixPath", "WindowsPath"},  # the same, from Python 3.13 on
}  # fmt: skip
