"""Write a file so that no reader ever sees half of it: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: str | os.PathLike[str], data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` in one step, as `atomic_stream` does.

    Parameters
    ----------
    path
        File to create or replace; its folder must exist.
    data
        The whole content; text is written as UTF-8.
    mode
        Permission bits of the new file, set before the rename.

    Raises
    ------
    OSError
        As the file system says: no folder, no permission, no space.
    """
    with atomic_stream(path, mode=mode) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_stream(path: str | os.PathLike[str], *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Give a stream whose content replaces ``path`` in one step at the end of the block; nothing does when it raises.

    The temporary file lies in the same folder, starts with a dot and ends in ``.tmp``, so that scanners can
    skip it; it is removed when anything fails. ``path``, ``mode`` and what is raised are as for `write_atomic`.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
