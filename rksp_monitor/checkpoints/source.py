"""One file of a checkpoint, opened once and read by ranges: what the system answers, as errors of ours.

Ranges instead of a memory map: a file that is cut short under a map kills the process that reads it, a map is no way
to read a remote file, and what a map has touched counts as memory of the process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints.names import shown
from rksp_monitor.remote import is_local

LARGEST_DOCUMENT = 32 * 2**20  # of JSON: parsed, nothing but "{}," takes 24 times as much (measured: 750 MiB)

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Source:
    """A file that is open until nothing refers to it any more.

    A file that is replaced by another of its name, or removed, is read to its end as it was; one that is written to
    in place is told by its time.

    Raises
    ------
    CheckpointError
        When it is gone, or may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.name = shown(path.name)
        with reading(path):
            if is_local(path) and not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
                raise CorruptCheckpoint(f"{self.name} is no regular file")
            self._stream: Any = path.open("rb", buffering=0) if is_local(path) else path.open("rb")
            weakref.finalize(self, self._stream.close)
            self.size: int = self._stream.seek(0, os.SEEK_END)
        self._stamp = self._changed()

    def read(self, offset: int, length: int) -> bytearray:
        """Return so many bytes from an offset; they are reserved only when the file has them.

        Raises
        ------
        CheckpointError
            IncompleteCheckpoint when the file ends before, or was written to since it was opened.
        """
        if not 0 <= offset <= offset + length <= self.size:
            raise IncompleteCheckpoint(f"{self.name} has {self.size} bytes, and is asked for {offset + length}")
        data = bytearray(length)
        view, got = memoryview(data), 0
        with reading(self.name):
            self._stream.seek(offset)
            while got < length and (count := self._stream.readinto(view[got:])):
                got += count
        if got < length or self._changed() != self._stamp:
            raise IncompleteCheckpoint(f"{self.name} was written to while it was read")
        return data

    def _changed(self) -> tuple[int, int] | None:
        """Return size and time of the open file; None for a remote one, which has no descriptor."""
        try:
            found = os.fstat(self._stream.fileno())
        except (OSError, AttributeError):
            return None
        return found.st_size, found.st_mtime_ns


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint when it does not parse (yet), CorruptCheckpoint when it is too large or may not be read.
    """
    source = Source(path)
    if source.size > LARGEST_DOCUMENT:
        most = LARGEST_DOCUMENT >> 20
        raise CorruptCheckpoint(
            f"{source.name} has {source.size >> 20} MiB, and a JSON document of at most {most} is read"
        )
    try:
        return json.loads(source.read(0, source.size))
    except (ValueError, RecursionError) as error:
        raise IncompleteCheckpoint(f"{source.name} is no complete JSON document yet ({shown(str(error))})") from error


@contextlib.contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Turn what the system answers into errors of ours: gone is expired, anything else is corrupt."""
    try:
        yield
    except OSError as error:
        name = what if isinstance(what, str) else shown(what.name)
        if isinstance(error, FileNotFoundError) or error.errno in _GONE:
            raise ExpiredCheckpoint(f"{name} is gone") from error
        if isinstance(error, PermissionError):
            raise CorruptCheckpoint(f"{name} cannot be read: no permission; let the watcher's user read it") from error
        raise CorruptCheckpoint(f"{name} cannot be read: {error.strerror or type(error).__name__}") from error
