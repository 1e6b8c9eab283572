"""What `torch.save` writes, a zip archive: a pickle that says what there is, and one member a storage.

The pickle is read without running it (`inert_pickle`), and of the storages only the bytes of the tensor that is asked
for: other state beside the model costs nothing. torch's own reader maps the whole file, or reads it all. A member's
checksum is verified when all of it is read.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rksp_core.errors import CorruptCheckpoint
from rksp_monitor.checkpoints.inert_pickle import LARGEST, MOST_DIMENSIONS, PERSISTENT, Made, Refused, load
from rksp_monitor.checkpoints.lazy import Described
from rksp_monitor.checkpoints.names import shown

if TYPE_CHECKING:
    from torch import Tensor

    from rksp_monitor.checkpoints.source import Source

LARGEST_DIRECTORY = 16 * 2**20  # 200 000 storages


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the archive: which storage, and which elements of it."""

    described: Described
    storage: str
    offset: int
    stride: tuple[int, ...]


class TorchArchive:
    """An archive in a file, or in a part of one.

    Raises
    ------
    zipfile.BadZipFile
        When its directory, which is written last, is not there.
    CorruptCheckpoint
        When it is another kind of archive, or packed.
    """

    def __init__(self, source: Source, start: int = 0, length: int | None = None) -> None:
        self.name = source.name
        self._source, self._start = source, start
        self._length = source.size - start if length is None else length
        try:
            members = zipfile.ZipFile(_Window(self)).infolist()
        except (ValueError, NotImplementedError, struct.error, EOFError, OverflowError) as error:
            raise zipfile.BadZipFile(str(error)) from error
        self._members = {member.filename: member for member in members}
        pickles = [name for name in self._members if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise CorruptCheckpoint(f"{self.name} is a zip archive, but not one of torch.save (no data.pkl)")
        self._folder = pickles[0].removesuffix("data.pkl")

    def content(self, *, trust_pickle: bool = False) -> Any:
        """Return what was saved, with records in the place of tensors (`stored`) and of other objects.

        Raises
        ------
        CorruptCheckpoint
            When it is damaged, or names objects that are no tensors, unless ``trust_pickle``; even then none is made.
        """
        if "byteorder" in self._names() and bytes(self._member("byteorder", 16)) != b"little":
            raise CorruptCheckpoint(f"{self.name} was written by a big-endian machine, which is not read")
        data = self._member("data.pkl", LARGEST)
        try:
            return load(data, lambda name: trust_pickle or bool(_HARMLESS.fullmatch(name)))
        except Refused as name:
            raise CorruptCheckpoint(
                f"{self.name} holds objects other than tensors and plain values ({shown(str(name))}), which are never "
                "loaded; save the state dict alone, or as safetensors, or look past them with --trust-pickle"
            ) from name
        except Exception as error:
            what = f"{type(error).__name__}: {shown(str(error))}"
            raise CorruptCheckpoint(f"{self.name} is damaged: its pickle cannot be read ({what})") from error

    def read(self, tensor: StoredTensor) -> Tensor:
        """Read one tensor, after checking that the archive has the bytes that it claims."""
        import torch

        dtype = getattr(torch, tensor.described.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CorruptCheckpoint(
                f"{self.name} holds elements of {tensor.described.dtype}, which torch does not have"
            )
        shape, stride = tensor.described.shape, tensor.stride
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        data = self._member(f"data/{tensor.storage}", None, tensor.offset * dtype.itemsize, elements * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).as_strided(shape, stride)

    def _names(self) -> set[str]:
        return {name.removeprefix(self._folder) for name in self._members}

    def _member(self, name: str, most: int | None, offset: int = 0, length: int | None = None) -> bytearray:
        """Read (a part of) a member, which must lie in the archive as it is: a packed one can be a bomb."""
        member = self._members.get(self._folder + name)
        if member is None:
            raise CorruptCheckpoint(f"{self.name} is damaged: it has no {shown(name)}")
        size = member.file_size
        if member.compress_type or member.flag_bits & 1 or member.compress_size != size:
            raise CorruptCheckpoint(f"{self.name} holds {shown(name)} packed, as torch.save never does; it is not read")
        length = size if length is None else length
        if not 0 <= offset <= offset + length <= size or (most is not None and size > most):
            asked = f"{offset + length} bytes are asked for" if most is None else f"at most {most} are read"
            raise CorruptCheckpoint(f"{self.name} is damaged: {shown(name)} has {size} bytes, {asked}")
        head = self._bytes(member.header_offset, 30)
        if head[:4] != b"PK\x03\x04":
            raise CorruptCheckpoint(f"{self.name} is damaged: {shown(name)} is not where the directory says")
        begin = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        data = self._bytes(begin + offset, length)
        # No checksum (zero) where `torch.serialization.set_crc32_options(False)` was set.
        if length == size and member.CRC and zlib.crc32(data) != member.CRC:
            raise CorruptCheckpoint(f"{self.name} is damaged: {shown(name)} does not match its checksum")
        return data

    def _bytes(self, offset: int, length: int) -> bytearray:
        if not 0 <= offset <= offset + length <= self._length:
            raise CorruptCheckpoint(f"{self.name} is damaged: its directory points behind its end")
        return self._source.read(self._start + offset, length)


def stored(value: Any) -> StoredTensor | None:
    """Return the tensor that a record of the pickle describes, or None when it is no tensor.

    Raises
    ------
    CorruptCheckpoint
        When it is a tensor of a kind that is not read: sparse, quantized, distributed, of a class of its own.
    """
    if not isinstance(value, Made):
        return None
    name, arguments = value.name, value.arguments
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return stored(arguments[0])
    if name == "torch._tensor._rebuild_from_type_v2" and arguments[1].name in _PLAIN_TENSORS:
        return stored(Made(arguments[0].name, arguments[2]))
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        return _stored(*arguments[:4], *(arguments[6:7] if name.endswith("_v3") else ()))
    if name.startswith("torch._utils._rebuild_") or name == "torch._tensor._rebuild_from_type_v2":
        kind = arguments[1].name if name.endswith("type_v2") else name.rpartition("_rebuild_")[2]
        raise CorruptCheckpoint(f"it is a {shown(kind)}, and only plain tensors are read")
    return None


def _stored(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> StoredTensor:
    kind, storage_class, key, _, _ = storage.arguments
    if storage.name != PERSISTENT or kind != "storage" or not isinstance(key, str):
        raise CorruptCheckpoint("its storage is none of torch.save")
    name = storage_class.name if dtype is None else dtype.name
    known = _STORAGES.get(name.rpartition(".")[2]) if dtype is None else name.removeprefix("torch.")
    if known is None or not _DTYPE.fullmatch(known):
        raise CorruptCheckpoint(f"its elements are {shown(name)}, which are not read")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
        raise CorruptCheckpoint("its size or its offset is no whole number")
    return StoredTensor(Described(tuple(size), known), key, offset, tuple(stride))


class _Window(io.RawIOBase):
    """The archive as the file that `zipfile` reads the directory from: bounded, whatever sizes a stranger states."""

    def __init__(self, archive: TorchArchive) -> None:
        self._archive = archive
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._archive._length)[whence]
        if at < 0:
            raise OSError("before the beginning")  # `zipfile` expects it of a file shorter than a directory
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._archive._length - self._at)
        count = left if count < 0 else min(count, left)
        if count > LARGEST_DIRECTORY:
            raise CorruptCheckpoint(f"{self._archive.name} has a zip directory of more than {LARGEST_DIRECTORY} bytes")
        data = bytes(self._archive._source.read(self._archive._start + self._at, count))
        self._at += count
        return data


_DTYPE = re.compile(r"bool|(b?float|u?int|complex)\d+\w*")
_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_PLAIN_TENSORS = ("torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

# Names that training loops leave in a checkpoint and that mean values, not deeds. None is ever imported or called.
_HARMLESS = re.compile(
    r"torch\.(\w+Storage|device|Size|Tensor|(bool|(b?float|u?int|complex|q?u?int)\d+\w*|strided))"
    r"|torch\.(_utils\._rebuild_\w+|_tensor\.(Tensor|_rebuild_from_type_v2)|storage\.\w+Storage)"
    r"|torch\.(nn\.parameter\.(Parameter|Buffer)|serialization\._get_layout)"
    r"|collections\.(OrderedDict|defaultdict|Counter|deque)|argparse\.Namespace|_codecs\.encode"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|timedelta)"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)"
    r"|(__builtin__|builtins)\.(set|frozenset|complex|bytearray|slice|dict|list|int|float|str|bool)"
    r"|(pytorch_)?lightning(\.\w+)*\.AttributeDict"
)
