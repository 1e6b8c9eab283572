"""Write a file so that no reader ever sees half of it: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` in one step.

    The temporary file lies in the same folder, starts with a dot and ends in ``.tmp``, so that scanners can
    skip it; it is removed when anything fails.

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
    target = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(payload)
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
