"""A ``.safetensors`` file: 8 bytes of header length, a JSON header, the tensors' bytes.

Complete when length + header + the last tensor's end is the size of the file. The header is checked before the file
is opened with the library, so that a hostile one costs no memory and gives one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, is_step, step_in

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
LONGEST_HEADER = 100_000_000  # the library's own limit

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
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
    """Check the header and the size.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while bytes are missing, CorruptCheckpoint when the header is wrong.
    """
    header = read_header(path)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = _check_offsets(path.name, tensors)
    wanted, size = header_length(path) + 8 + end, _size(path)
    if size < wanted:
        raise IncompleteCheckpoint(f"{path.name} has {size} of {wanted} bytes")
    if size > wanted:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes, its header describes {wanted}; write it again")


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:  # noqa: ARG001 - one signature for all
    """Return the tensors by name, mapped from the file.

    Raises
    ------
    CorruptCheckpoint
        When the library refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError as error:
        raise ExpiredCheckpoint(f"{path.name} is gone") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path.name} is damaged: {error}") from error


def header_length(path: Path) -> int:
    """Return the length of the header, checked against the limits before anything of that size is read."""
    size = _size(path)
    with _open(path) as stream:
        prefix = stream.read(8)
    if len(prefix) < 8:
        raise IncompleteCheckpoint(f"{path.name} has {size} bytes, a header starts with 8")
    length = int.from_bytes(prefix, "little")
    if length > LONGEST_HEADER:
        raise CorruptCheckpoint(f"{path.name} states a header of {length} bytes, at most {LONGEST_HEADER} are allowed")
    if 8 + length > size:
        raise IncompleteCheckpoint(f"{path.name} is cut short: {size} bytes, and its header alone ends at {8 + length}")
    return length


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header.

    Raises
    ------
    CheckpointError
        When it is not all there, too long, or no JSON object.
    """
    length = header_length(path)
    with _open(path) as stream:
        stream.seek(8)
        text = stream.read(length)
    if not text.strip(b"\0"):
        raise IncompleteCheckpoint(f"{path.name} was given its size, and has no header yet")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path.name} has a header that is no JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CorruptCheckpoint(f"{path.name} has a header that is no JSON object of tensors")
    return header


def _check_offsets(name: str, tensors: Mapping[str, Any]) -> int:
    """Check that the tensors fill the data part without hole or overlap, as the format asks; return its end."""
    spans = []
    for key, entry in tensors.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            bits = _BITS[entry["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpoint(f"{name}: the header's entry for {key!r} is malformed ({error!r})") from error
        if not whole or (end - begin) * 8 != math.prod(shape) * bits:
            raise CorruptCheckpoint(f"{name}: {key!r} has shape {shape} and offsets [{begin}, {end}], which disagree")
        spans.append((begin, end, key))
    reached = 0
    for begin, end, key in sorted(spans):
        if begin != reached:
            raise CorruptCheckpoint(f"{name}: {key!r} starts at byte {begin}, expected {reached}")
        reached = end
    return reached


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise ExpiredCheckpoint(f"{path.name} is gone") from error


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise ExpiredCheckpoint(f"{path.name} is gone") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error
