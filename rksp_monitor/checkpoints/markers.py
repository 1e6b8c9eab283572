"""Files that say of a whole folder that it is finished, or not: whatever its format is."""

from __future__ import annotations

from pathlib import Path

from rksp_core.errors import IncompleteCheckpoint
from rksp_monitor.checkpoints.names import is_candidate, shown, step_in
from rksp_monitor.checkpoints.source import reading

FINISHED = ("_SUCCESS", "STABLE", "commit_success.txt")
UNFINISHED = (".incomplete", ".tmp", ".orbax-checkpoint-tmp")


def check(path: Path) -> None:
    """Check a folder of one step.

    A name that ends like `UNFINISHED`, inside or beside it, says that it is being written. `FINISHED` is demanded where
    the checkpoint before it has one: a run that writes markers writes them always.

    Raises
    ------
    CheckpointError
        IncompleteCheckpoint while a marker says so, ExpiredCheckpoint when the folder is gone.
    """
    with reading(path):
        inside = {entry.name for entry in path.iterdir()}
        beside = {entry.name for entry in path.parent.iterdir()}
    name = shown(path.name)
    for marker in UNFINISHED:
        found = next((entry for entry in sorted(inside) if entry.endswith(marker) or f"{marker}-" in entry), None)
        if found is None and path.name + marker in beside:
            found = path.name + marker
        if found is not None:
            raise IncompleteCheckpoint(f"{name} is being written: there is {shown(found)}")
    before = _before(path, beside)
    for marker in FINISHED:
        if marker not in inside and before is not None and _has(before, marker):
            raise IncompleteCheckpoint(f"{name} has no {marker} yet, as {shown(before.name)} has")


def _has(folder: Path, marker: str) -> bool:
    """Whether the marker is there; a folder that may not be looked into says nothing about the next one."""
    try:
        return (folder / marker).is_file()
    except OSError:
        return False


def _before(path: Path, beside: set[str]) -> Path | None:
    """Return the folder of the step before, named alike."""
    step = step_in(path.name)
    steps = {found: name for name in beside if is_candidate(name) and (found := step_in(name)) is not None}
    earlier = [found for found in steps if step is not None and found < step]
    return path.parent / steps[max(earlier)] if earlier else None
