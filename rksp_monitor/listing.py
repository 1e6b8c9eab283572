"""A folder, local or remote -> its names, each with what tells that another file took the name: one call a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from rksp_monitor.remote import driver_errors, is_local

# What object stores say of a file's content, the surest first; the time only where they say nothing else.
_CONTENT = ("ETag", "etag", "md5Hash", "md5", "content_md5", "checksum", "generation")
_TIME = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


def names_in(folder: Path) -> dict[str, str]:
    """Return {name: token}, without a look at each file; a folder that is not there holds nothing.

    The token of a local file is its inode, which every rename into place changes; an inode costs nothing here, and
    says nothing of a file that is written again in place. The token of a remote file changes with its content; that
    of a remote folder is empty.

    Raises
    ------
    OSError
        When the folder may not be read, or its server does not answer: then nothing is known of what it holds.
    """
    try:
        if not is_local(folder):
            return _remote_names(folder)
        with os.scandir(folder) as entries:
            return {entry.name: str(entry.inode()) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def versions(files: Iterable[Path], *, inodes: bool = True) -> list[str]:
    """Return what tells one content of each file from another: size, time and inode, or what the store says.

    Parameters
    ----------
    files
        All local, or all remote: then each folder of them is listed once, and no file is asked for.
    inodes
        False where a file may have another inode tomorrow (FUSE).

    Raises
    ------
    OSError
        FileNotFoundError when one is gone, another when it cannot be looked at.
    """
    found, folders = [], dict[Path, Mapping[str, str]]()
    for path in files:
        if is_local(path):
            stat = path.stat()
            found.append(f"{stat.st_size},{stat.st_mtime_ns},{stat.st_ino if inodes else 0}")
            continue
        if path.parent not in folders:
            folders[path.parent] = names_in(path.parent)
        if not folders[path.parent].get(path.name):
            raise FileNotFoundError(str(path))
        found.append(folders[path.parent][path.name])
    return found


def _remote_names(folder: Path) -> dict[str, str]:
    remote = cast("Any", folder)
    with driver_errors(folder):
        entries = remote.fs.ls(remote.path, detail=True)
    own = remote.path.strip("/")
    paths = ((entry["name"].strip("/"), entry) for entry in entries)
    return {path.rpartition("/")[2]: _version(entry) for path, entry in paths if path != own}


def _version(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "directory":
        return ""
    stated = [f"{key}={entry[key]}" for keys in (_CONTENT, _TIME) for key in keys if entry.get(key) is not None]
    return ",".join([f"size={entry.get('size')}", *stated[:1]])
