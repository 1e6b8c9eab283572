"""A ``.safetensors`` file: 8 bytes of header length, a JSON header, the tensors' bytes.

Complete when length + header + the last tensor's end is the size of the file. The header is checked here, so that a
hostile one costs no memory and gives one sentence; what is left to the library would be `torch.frombuffer`, over a
memory map that a remote file does not have and a truncated one turns into a crash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rksp_core.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.inert_pickle import MOST_DIMENSIONS
from rksp_monitor.checkpoints.lazy import Described, LazyTensors
from rksp_monitor.checkpoints.names import is_candidate, is_step, shown, step_in
from rksp_monitor.checkpoints.source import Source

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
# The library allows 100 MB; parsed, that is a gigabyte. A tensor takes about 100 bytes: these are 160 000.
LONGEST_HEADER = 16 * 2**20

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip


def matches(path: Path) -> bool:
    """A ``.safetensors`` file whose name or metadata carries a step."""
    return path.suffix == ".safetensors" and is_candidate(path.name) and path.is_file() and step(path) is not None


def step(path: Path) -> int | None:
    """Return the step in the name, or in the file's metadata under ``step``."""
    named = step_in(path.name)
    if named is not None:
        return named
    try:
        stored = int(str(read_header(path).get("__metadata__", {}).get("step")))
    except (CheckpointError, ValueError):
        return None
    return stored if is_step(stored) else None


def files(path: Path) -> list[Path]:
    """Return the file itself."""
    return [path]


@answers
def is_complete(path: Path) -> None:
    """Check the header and the size."""
    _open(path)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:  # noqa: ARG001 - there is none
    """Return the tensors by name; each is read when it is asked for.

    Raises
    ------
    CheckpointError
        When the file is incomplete, gone, or wrong, or its elements are of a kind that torch does not have.
    """
    source, start, tensors = _open(path)
    unknown = sorted({entry["dtype"] for entry in tensors.values()} - _DTYPES.keys())
    if unknown:
        raise CorruptCheckpoint(f"{source.name} holds elements of {unknown[0]}, which are not read; write them wider")

    def read(name: str) -> Tensor:
        import torch

        entry = tensors[name]
        begin, end = entry["data_offsets"]
        dtype = getattr(torch, _DTYPES[entry["dtype"]])
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        return torch.frombuffer(source.read(start + begin, end - begin), dtype=dtype).reshape(entry["shape"])

    described = {name: Described(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for name, entry in tensors.items()}
    return LazyTensors(described, read)


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header.

    Raises
    ------
    CheckpointError
        When it is not all there, too long, or no JSON object.
    """
    return _header(Source(path))[1]


def _open(path: Path) -> tuple[Source, int, dict[str, Any]]:
    """Return the open file, where its data starts, and the checked entries of its tensors."""
    source = Source(path)
    start, header = _header(source)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    wanted = start + _check_offsets(source.name, tensors)
    if source.size < wanted:
        raise IncompleteCheckpoint(f"{source.name} has {source.size} of {wanted} bytes")
    if source.size > wanted:
        raise CorruptCheckpoint(f"{source.name} has {source.size} bytes, its header says {wanted}; write it again")
    return source, start, tensors


def _header(source: Source) -> tuple[int, dict[str, Any]]:
    """Return where the data starts, and the header; its length is checked before anything of that size is read."""
    if source.size < 8:
        raise IncompleteCheckpoint(f"{source.name} has {source.size} bytes, a header starts with 8")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > LONGEST_HEADER:
        raise CorruptCheckpoint(f"{source.name} states a header of {length} bytes, at most {LONGEST_HEADER} are read")
    if 8 + length > source.size:
        raise IncompleteCheckpoint(f"{source.name} has {source.size} bytes, and its header alone ends at {8 + length}")
    text = source.read(8, length)
    if not text.strip(b"\0"):
        raise IncompleteCheckpoint(f"{source.name} was given its size, and has no header yet")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{source.name} has a header that is no JSON ({shown(str(error))})") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CorruptCheckpoint(f"{source.name} has a header that is no JSON object of tensors")
    return 8 + length, header


def _check_offsets(name: str, tensors: Mapping[str, Any]) -> int:
    """Check that the tensors fill the data part without hole or overlap, as the format asks; return its end."""
    spans = []
    for key, entry in tensors.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            # Bounded before they are multiplied: a product of a million numbers takes for ever.
            whole = len(shape) <= MOST_DIMENSIONS and all(
                type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)
            )
            bits = _BITS[entry["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpoint(
                f"{name}: the header's entry for {shown(key)} is malformed ({shown(repr(error))})"
            ) from error
        if not whole or (end - begin) * 8 != math.prod(shape) * bits:
            said = f"shape {shown(str(shape))} and offsets {shown(str([begin, end]))}"
            raise CorruptCheckpoint(f"{name}: {shown(key)} has {said}, which disagree")
        spans.append((begin, end, key))
    reached = 0
    for begin, end, key in sorted(spans):
        if begin != reached:
            raise CorruptCheckpoint(f"{name}: {shown(key)} starts at byte {begin}, expected {reached}")
        reached = end
    return reached
