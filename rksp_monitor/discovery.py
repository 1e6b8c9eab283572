"""A run folder -> the checkpoints and profiles in it, scan after scan.

Polling carries correctness: file events never come from remote writers (NFS, FUSE), so they only shorten the wait,
and everything works without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint
from rksp_core.profile_writer import FOLDER as PROFILES
from rksp_monitor.checkpoints import FORMATS, Kind, format_of
from rksp_monitor.checkpoints.completeness import Completeness
from rksp_monitor.checkpoints.names import is_candidate, step_in

# Where trainers put things, relative to the run folder (``checkpoint`` is torchtitan's).
FOLDERS = (".", "checkpoints", "checkpoint", PROFILES)

SETTLE_SECONDS = 0.5  # between the two looks that must agree before a weights file counts as written
TICK_SECONDS = 5.0  # between two signs of life while nothing happens
SHORTEST_WAIT = 0.1  # a burst of file events costs one scan


@dataclass(frozen=True)
class Sighting:
    """Something seen in one scan. ``complete`` says that it can be read; ``problem`` why it cannot yet.

    A weights file that was seen with this size and time for the first time is ``settling``: a writer may have given
    it its final size before it wrote the bytes. ``format`` is empty when the path could not be looked into.
    """

    path: Path
    format: str
    kind: Kind
    step: int
    fingerprint: str
    complete: bool
    settling: bool = False
    problem: str = ""


class Scanner:
    """Scans one run folder; remembers what it saw, so that an unchanged file is checked once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: dict[Path, Sighting] = {}

    def scan(self) -> list[Sighting]:
        """Return what is in the folder now, by step; a folder that is not there (yet) holds nothing."""
        found = [sighting for path in _candidates(self.folder) if (sighting := self._sight(path)) is not None]
        self._last = {sighting.path: sighting for sighting in found}
        return sorted(found, key=lambda sighting: (sighting.step, sighting.kind, sighting.path.name))

    def _sight(self, path: Path) -> Sighting | None:
        """Look at a path; one that cannot be looked into (no permission, say) is not complete, and says why."""
        try:
            return self._look(path)
        except OSError as error:
            step = step_in(path.name)
            kind: Kind = "profile" if path.parent.name == PROFILES else "checkpoint"
            problem = f"{path.name} cannot be read: {error.strerror}"
            return None if step is None else Sighting(path, "", kind, step, "", complete=False, problem=problem)

    def _look(self, path: Path) -> Sighting | None:
        before = self._last.get(path)
        name = before.format if before is not None and before.format else format_of(path)
        if name is None:
            return None
        known = FORMATS[name]
        try:
            fingerprint = _fingerprint(known.files(path))
        except FileNotFoundError:
            return None
        if before is not None and before.fingerprint == fingerprint and before.complete:
            return before
        step = before.step if before is not None else known.step(path)
        if step is None:
            return None
        settled = known.KIND == "profile" or (before is not None and before.fingerprint == fingerprint)
        try:
            found = known.is_complete(path)
        except ExpiredCheckpoint:
            return None
        except CorruptCheckpoint:
            found = Completeness()  # and wrong: replay fails with the same sentence, and keeps the count of attempts
        if not found:
            return Sighting(path, name, known.KIND, step, fingerprint, complete=False, problem=found.problem)
        return Sighting(path, name, known.KIND, step, fingerprint, complete=settled, settling=not settled)


def watch(
    scanner: Scanner,
    *,
    stop: threading.Event,
    wake: threading.Event,
    interval: float,
    hints: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[list[Sighting]]:
    """Yield one scan after another until ``stop`` is set.

    Parameters
    ----------
    scanner
        Of the run folder, which may appear later.
    stop, wake
        Whoever sets ``stop`` sets ``wake`` as well, which ends the wait between two scans.
    interval
        Seconds between two scans when nothing wakes them; less while a file settles.
    hints
        Whether to ask the operating system for file events.
    tick
        Called every few seconds of the wait: a sign of life for the supervisor, however long the interval is.
    """
    folder = scanner.folder
    with contextlib.ExitStack() as stack:
        listening = not hints
        while not stop.is_set():
            if not listening and folder.is_dir():
                listening = True
                stack.enter_context(_file_events(folder, wake))
            wake.clear()
            sightings = scanner.scan()
            yield sightings
            if stop.is_set():
                return
            settling = any(sighting.settling for sighting in sightings)
            if _wait(wake, min(interval, SETTLE_SECONDS) if settling else interval, tick):
                stop.wait(SHORTEST_WAIT)


def _wait(wake: threading.Event, seconds: float, tick: Callable[[], None]) -> bool:
    """Return whether ``wake`` was set within so many seconds."""
    end = time.monotonic() + seconds
    while not wake.wait(min(TICK_SECONDS, max(0.0, end - time.monotonic()))):
        if time.monotonic() >= end:
            return False
        tick()
    return True


def _candidates(folder: Path) -> Iterator[Path]:
    for name in FOLDERS:
        with contextlib.suppress(OSError):
            yield from (path for path in (folder / name).iterdir() if is_candidate(path.name))


def _fingerprint(files: list[Path]) -> str:
    """Hash size, modification time and inode of the files: a checkpoint that is written again is another one."""
    if not files:
        raise FileNotFoundError
    stats = [path.stat() for path in files]
    text = ";".join(f"{stat.st_size},{stat.st_mtime_ns},{stat.st_ino}" for stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _file_events(folder: Path, wake: threading.Event) -> Iterator[None]:
    """Set ``wake`` on events that can mean a new file; do without them where they cannot be had."""
    from watchdog.events import FileSystemEvent, FileSystemEventHandler
    from watchdog.observers import Observer

    class Hint(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:
            # Reading fires opened and closed-no-write events, a growing log modified ones: neither is news.
            if event.event_type not in ("created", "moved", "closed"):
                return
            paths = [Path(str(path)) for path in (event.src_path, event.dest_path) if path]
            if any(not _is_hidden(path, folder) for path in paths):
                wake.set()

    observer = Observer()
    try:
        observer.schedule(Hint(), str(folder), recursive=True)
        observer.start()
    except OSError:  # out of inotify watches, or a file system without events
        yield
        return
    try:
        yield
    finally:
        observer.stop()
        observer.join(timeout=5)


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether the path lies in or is a dot file: temporary files, and our own ledger."""
    try:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)
    except ValueError:
        return False
