"""One look at one path: whether it is a checkpoint or a profile, of which step and content, and if it can be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ExpiredCheckpoint
from rksp_core.profile_writer import FOLDER as PROFILES
from rksp_monitor.checkpoints import FORMATS, Kind, format_of, outside
from rksp_monitor.checkpoints.completeness import Completeness
from rksp_monitor.checkpoints.names import shown, step_in
from rksp_monitor.checkpoints.source import read_json
from rksp_monitor.listing import versions
from rksp_monitor.remote import appears_whole, driver_errors, is_local


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

    ``home`` is the folder that no link may lead out of; ``inodes`` says whether they mean anything here.
    """

    folder: Path
    home: Path
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
        return _unread(path, f"{shown(path.name)} cannot be read: {error.strerror or error}")


def _look(path: Path, place: Place, before: Sighting | None) -> Sighting | None:
    if step_in(path.name) is None and is_local(path) and path.is_symlink():
        return None  # ``latest``: another name of what is seen itself
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
    stray = outside(path, place.home)
    if stray is not None:
        where = "" if stray == path else f": {shown(stray.name)}"
        problem = f"{shown(path.name)}{where} is or lies behind a link out of the run folder, and is not read"
        return Sighting(path, name, known.KIND, step, fingerprint, complete=False, problem=problem, refused=True)
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
    try:
        return marker.is_file() and str(read_json(marker)["schema"]).startswith("rksp.checkpoint/")
    except (CheckpointError, TypeError, KeyError):
        return False


def _unread(path: Path, problem: str) -> Sighting | None:
    """Return what can be said of a path that is not looked into: nothing, when its name states no step."""
    step = step_in(path.name)
    kind: Kind = "profile" if path.parent.name == PROFILES else "checkpoint"
    return None if step is None else Sighting(path, "", kind, step, "", complete=False, problem=problem)
