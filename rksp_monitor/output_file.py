"""Files that a flag names: refused before the work when they cannot be written, and written whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rksp_core.atomic import atomic_stream
from rksp_core.errors import ConfigError


def require_writable(path: Path) -> None:
    """Refuse an output file that could not be written, before the work starts.

    Raises
    ------
    ConfigError
        When its folder is missing or not writable, or the path is a folder.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"the output file {path} is a folder; name a file in it")
    if not folder.is_dir():
        raise ConfigError(f"the output file {path} cannot be written: there is no folder {folder}")
    try:
        if _is_device(path):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ConfigError(f"the output file {path} cannot be written: {error.strerror} in {folder}") from error


def write_output(path: Path, content: str | bytes) -> None:
    """Replace a file in one step; a device or a pipe is written to, because replacing it would remove it for all.

    Raises
    ------
    ConfigError
        When it cannot be written.
    """
    with output_stream(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def output_stream(path: Path) -> Iterator[BinaryIO]:
    """Give a stream whose content replaces the file in one step at the end; a device or a pipe is written to.

    When anything fails, what was there stays.

    Raises
    ------
    ConfigError
        When it cannot be written.
    """
    try:
        if _is_device(path):
            with path.open("wb") as stream:
                yield stream
            return
        with atomic_stream(path.resolve()) as stream:
            yield stream
    except OSError as error:
        raise ConfigError(f"the output file {path} cannot be written: {error.strerror}") from error


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()
