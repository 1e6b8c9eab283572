"""One look at one path: whether it is a checkpoint or a profile, of which step and content, and if it can be read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint
from rksp_core.profile_writer import FOLDER as PROFILES
from rksp_monitor.checkpoints import FORMATS, Kind, format_of
from rksp_monitor.checkpoints.completeness import Completeness
from rksp_monitor.checkpoints.names import step_in
from rksp_monitor.listing import versions
from rksp_monitor.remote import appears_whole, driver_errors, is_local

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a line break in a name would forge a line of a log
LARGEST_DESCRIPTION = 2**24


@dataclass(frozen=True, slots=True)
class Sighting:
    """Something seen in one scan. ``complete`` says that it can be read; ``problem`` why it cannot (yet).

    What is complete by its own rule, but could still be in the writing, is ``settling``: a writer may have given a
    file its final size before it wrote the bytes. What is ``refused`` will not be read, however long one waits.
    ``format`` is empty when the path could not be looked into.
    """

    path: Path
    format: str
    kind: Kind
    step: int
    fingerprint: str
    complete: bool
    settling: bool = False
    problem: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Place:
    """A folder that holds checkpoints, and what a look at one of them needs to know of it.

    ``roots`` are the resolved folders that a checkpoint may lie in; ``inodes`` says whether they mean anything here.
    """

    folder: Path
    roots: Sequence[str] = ()
    inodes: bool = True


def look(path: Path, place: Place, before: Sighting | None = None) -> Sighting | None:
    """Look at a path; None when it is no checkpoint and no profile, or gone.

    ``before`` is what was seen there last, and is returned when it was complete and has not changed.
    """
    try:
        with driver_errors(path):
            return _look(path, place, before)
    except FileNotFoundError:
        return None
    except OSError as error:
        if before is not None and before.complete:
            return before  # nothing says that it changed; replay will say the same should it try
        return _unread(path, f"{path.name} cannot be read: {error.strerror or error}")


def _look(path: Path, place: Place, before: Sighting | None) -> Sighting | None:
    if is_local(path) and path.is_symlink():
        target = os.path.realpath(path)
        if not _inside(target, place.roots):
            return _unread(path, f"{path.name} is a link to {_printed(target)}, out of the run folder", refused=True)
        if any(Path(target).parent == Path(root) for root in place.roots) and Path(target).name != path.name:
            return None  # ``latest -> step-100``, which is seen itself
    if _CONTROL.search(path.name):
        return _unread(path, f"{_printed(path.name)} has a line break or another control character", refused=True)
    name = before.format if before is not None and before.format else format_of(path)
    if name is None:
        return None
    known = FORMATS[name]
    files = known.files(path)
    if not files:
        return None
    states = versions(files, inodes=place.inodes)
    fingerprint = hashlib.sha256(";".join(states).encode()).hexdigest()[:16]
    if before is not None and before.complete and before.fingerprint == fingerprint:
        return before
    step = before.step if before is not None else known.step(path)
    if step is None:
        return None
    stray = _stray(path, files, place.roots)
    if stray is not None:
        return _unread(path, f"{path.name}: {stray} is a link out of the run folder", refused=True)
    try:
        found = known.is_complete(path)
    except ExpiredCheckpoint:
        return None
    except CorruptCheckpoint:
        found = Completeness()  # and wrong: replay fails with the same sentence, and keeps the count of attempts
    if not found:
        return Sighting(path, name, known.KIND, step, fingerprint, complete=False, problem=found.problem)
    done = known.KIND == "profile" or appears_whole(path) or _committed(path, name, files)
    return Sighting(path, name, known.KIND, step, fingerprint, complete=done, settling=not done)


def _committed(path: Path, name: str, files: Iterable[Path]) -> bool:
    """Whether a marker that is written last proves that nothing is being written any more.

    ``.metadata`` of DCP is renamed into place when all ranks have written their shards, and ``checkpoint.json`` of
    our trainer is written into the folder before the folder is renamed. Either proves it only when it is younger than
    every other file: a copy of such a folder, made file by file, may have the marker first. (A profile needs no
    marker: half a JSON document does not parse.)
    """
    if not is_local(path) or not path.is_dir():
        return False
    marker = path / (".metadata" if name == "dcp" else "checkpoint.json")
    try:
        if name != "dcp" and not _is_ours(marker):
            return False
        return all(file.stat().st_mtime_ns < marker.stat().st_mtime_ns for file in files if file != marker)
    except OSError:
        return False


def _is_ours(marker: Path) -> bool:
    """Whether the bundled trainer wrote it: another one may write a file of that name first."""
    if not marker.is_file() or marker.stat().st_size > LARGEST_DESCRIPTION:
        return False
    try:
        return str(json.loads(marker.read_bytes())["schema"]).startswith("rksp.checkpoint/")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _stray(path: Path, files: Iterable[Path], roots: Sequence[str]) -> str | None:
    """Return the name of a file of the checkpoint that lies elsewhere, through a link of its own or of a folder."""
    if not is_local(path):
        return None
    folders = {file.parent for file in files if file != path}
    links = [*(folder for folder in folders if folder != path), *(file for file in files if file.is_symlink())]
    return next((_printed(link.name) for link in links if not _inside(os.path.realpath(link), roots)), None)


def _inside(target: str, roots: Sequence[str]) -> bool:
    return not roots or any(target == root or target.startswith(root.rstrip("/") + "/") for root in roots)


def _unread(path: Path, problem: str, *, refused: bool = False) -> Sighting | None:
    """Return what can be said of a path that is not looked into: nothing, when its name states no step."""
    step = step_in(_CONTROL.sub("", path.name))
    kind: Kind = "profile" if path.parent.name == PROFILES else "checkpoint"
    return None if step is None else Sighting(path, "", kind, step, "", False, problem=problem, refused=refused)


def _printed(name: str) -> str:
    """Return a name that a stranger chose, as one line of plain text."""
    return name if name.isprintable() else ascii(name)
