"""A run folder -> the checkpoints and profiles in it, scan after scan.

Polling carries correctness: file events never come from remote writers (NFS, FUSE), so they only shorten the wait,
and everything works without them.

A scan lists folders, and looks at few files: a run of months leaves a hundred thousand profiles, and on a network file
system each look is a message. What is not a finished checkpoint is looked at in each scan. What is one is looked at
again when another inode has taken its name, which is how anything renamed into place shows in a listing; and in turns,
`TURN` of them a scan, for the sake of writers that write a finished file again in place, which shows in no listing.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from rksp_core.profile_writer import FOLDER as PROFILES
from rksp_monitor.checkpoints.names import is_candidate, shown, step_in
from rksp_monitor.desk import Desk
from rksp_monitor.file_events import FileEvents
from rksp_monitor.filesystem import filesystem_of
from rksp_monitor.listing import names_in
from rksp_monitor.remote import is_local
from rksp_monitor.sighting import Place, Sighting, look

__all__ = ["FileEvents", "Scanner", "Sighting", "watch"]

# Where trainers put things, relative to the run folder. In the folder itself: Hugging Face (checkpoint-N), DeepSpeed
# (global_stepN), Megatron (iter_N), OLMo (stepN). ``checkpoint`` is torchtitan's.
FOLDERS = ("checkpoints", "checkpoint", "ckpt", "ckpts", "weights", PROFILES)
LIGHTNING = ("lightning_logs", "version_", "checkpoints")

SETTLE_SECONDS = 0.5  # between the two looks that must agree before a weights file counts as written
TICK_SECONDS = 5.0  # between two signs of life while nothing happens
SHORTEST_WAIT = 0.1  # a burst of file events costs one scan
TURN = 200  # finished checkpoints looked at again in each scan of a folder
REMOTE_TURN = 5  # the same where a look is a request; a remote file needs none, as its listing says what it holds
FOLLOWED = 32  # folders of checkpoints in the writing whose file events are asked for, in each folder of a run
YOUNG = 30  # looks at something new that is nothing we know, before it has to wait for its turn


class Scanner:
    """Scans one run folder; remembers what it saw, so that an unchanged file is checked once.

    Parameters
    ----------
    folder
        Local or remote; it may appear later.
    known
        What was found complete before (by another process, say): not opened again while its fingerprint holds.
    settle
        Seconds that a file must not have changed for before it counts as written.
    """

    def __init__(self, folder: Path, *, known: Iterable[Sighting] = (), settle: float = SETTLE_SECONDS) -> None:
        self.folder = folder
        self._settle, self._changed, self._first = settle, False, True
        self._known = {sighting.path: sighting for sighting in known}
        self._rooms: dict[Path, _Room] = {}
        self._sightings: list[Sighting] = []

    def scan(self, tick: Callable[[], None] = lambda: None, rest: Callable[[], None] = lambda: None) -> list[Sighting]:
        """Return what is in the folder now, by step; a folder that is not there (yet) holds nothing.

        The same list is returned until something in it changes. ``tick`` is called every few seconds, ``rest`` after
        each look at a file.

        Raises
        ------
        OSError
            When the folder is there and cannot be listed (a server that does not answer, a stale handle, a remote
            that refuses us): nothing is known of it then, and the next scan may work. A folder without permission is
            named in `unreadable` instead.
        """
        pulse = _Pulse(tick, rest)
        here = self._scan(self.folder, pulse)
        folders = [self.folder]
        for folder in self._inner(here):
            self._scan(folder, pulse)
            folders.append(folder)
        gone = self._rooms.keys() - set(folders)
        for folder in gone:
            del self._rooms[folder]
        self._known.clear()
        self._first = False
        if gone or self._changed:
            self._changed = False
            found = itertools.chain.from_iterable(room.sightings() for room in self._rooms.values())
            self._sightings = sorted(found, key=attrgetter("step", "kind", "path"))
        return self._sightings

    def finds_any(self) -> bool:
        """Whether there is anything in the folder; looks no further than to the first. Raises what `scan` raises."""
        here = names_in(self.folder)
        for folder in (self.folder, *self._inner(here)):
            room = _Room(_place(folder, self.folder), self._settle)
            if any(room.scan({}, looks=0)):
                return True
        return False

    @property
    def unreadable(self) -> list[str]:
        """What the last scan could not look into, a sentence each: to be said once."""
        return [sentence for room in self._rooms.values() for sentence in room.unreadable.values()]

    @property
    def folders(self) -> list[Path]:
        """The folders in which something new can appear, to listen to; those of finished checkpoints are not."""
        return [folder for room in self._rooms.values() for folder in room.unfinished()]

    def _scan(self, folder: Path, pulse: _Pulse) -> dict[str, str]:
        """Scan one folder and return its names."""
        if folder not in self._rooms:
            self._rooms[folder] = _Room(_place(folder, self.folder), self._settle)
        room = self._rooms[folder]
        for changed in room.scan(self._known, looks=YOUNG if self._first else 0):
            self._changed |= changed  # also when a later look fails
            pulse()
        return room.listed

    def _inner(self, here: Iterable[str]) -> Iterator[Path]:
        """Yield the folders below the run folder that can hold checkpoints."""
        yield from (self.folder / name for name in FOLDERS if name in here)
        logs, version, inside = LIGHTNING
        if logs in here:
            names = names_in(self.folder / logs)
            yield from (self.folder / logs / name / inside for name in sorted(names) if name.startswith(version))


def watch(
    scanner: Scanner,
    *,
    stop: threading.Event,
    wake: threading.Event,
    interval: float,
    events: FileEvents | None = None,
    tick: Callable[[], None] = lambda: None,
    desk: Desk | None = None,
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
    events
        The file events of the process, to scan as soon as something may be new; None only polls.
    tick
        Called every few seconds: a sign of life for the supervisor, however long the interval is.
    desk
        Where a seat is taken for each scan; None takes none.

    Raises
    ------
    OSError
        When the folder cannot be scanned for now (`Scanner.scan`); then start again, with the same scanner.
    """
    with contextlib.ExitStack() as stack:
        listener = None if events is None else stack.enter_context(events.listen(scanner.folder, wake))
        least = 0.0
        while not stop.is_set():
            wake.clear()
            sightings, scanned = scan_at(desk, scanner, tick), time.monotonic()
            if listener is not None and listener.follow(scanner.folders):
                wake.set()  # what appeared there before we listened sent no event
            yield sightings
            settling = any(sighting.settling for sighting in sightings)
            if stop.is_set():
                return
            # Runs that were taken up together must not scan together for ever: a scrape would wait for all of them.
            share, least = random.uniform(least, 1.0), 0.9  # noqa: S311
            if _wait(wake, share * (min(interval, SETTLE_SECONDS) if settling else interval), tick):
                stop.wait(max(0.0, SHORTEST_WAIT - (time.monotonic() - scanned)))


def scan_at(desk: Desk | None, scanner: Scanner, tick: Callable[[], None]) -> list[Sighting]:
    """Return what a scan at the desk finds, in which others may go first after each look."""
    if desk is None:
        return scanner.scan(tick)
    with desk:
        return scanner.scan(tick, desk.rest)


def _wait(wake: threading.Event, seconds: float, tick: Callable[[], None]) -> bool:
    """Return whether ``wake`` was set within so many seconds."""
    end = time.monotonic() + seconds
    while not wake.wait(min(TICK_SECONDS, max(0.0, end - time.monotonic()))):
        if time.monotonic() >= end:
            return False
        tick()
    return True


@dataclass(slots=True)
class _Open:
    """Something that is no finished checkpoint: looked at in each scan.

    ``since`` is when it was first seen as it is, ``looks`` how often nothing was found there.
    """

    sighting: Sighting | None = None
    since: float = 0.0
    looks: int = 0


class _Room:
    """One folder that holds checkpoints: what it listed last, what is open in it, and what is done."""

    def __init__(self, place: Place, settle: float) -> None:
        self.listed: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}  # by name; the folder's own is empty
        self._place, self._settle, self._local = place, settle, is_local(place.folder)
        self._open: dict[str, _Open] = {}
        self._done: dict[str, Sighting | None] = {}  # finished checkpoints, and what is none
        self._turns: Iterator[str] = iter(())

    def sightings(self) -> Iterator[Sighting]:
        """Yield what was seen last."""
        seen = itertools.chain((state.sighting for state in self._open.values()), self._done.values())
        return (sighting for sighting in seen if sighting is not None)

    def unfinished(self) -> list[Path]:
        """Return this folder and the youngest of those in it that may be in the writing."""
        waiting = [name for name, state in self._open.items() if state.sighting is None or not state.sighting.settling]
        return [self._place.folder, *(self._place.folder / name for name in waiting[-FOLLOWED:])]

    def scan(self, known: dict[Path, Sighting], looks: int) -> Iterator[bool]:
        """List the folder, look at what has to be looked at; yield after each look whether something changed.

        ``looks`` is how often what is new here counts as looked at: what was there before us is not young.
        """
        try:
            listed = names_in(self._place.folder)
        except PermissionError as error:
            if not self._local:
                raise
            self.unreadable[""] = (
                f"{self._place.folder} may not be listed ({error.strerror}); its checkpoints are not seen"
            )
            return  # what was seen before is seen still: not to be taken for removed
        self.unreadable.pop("", None)
        for name in self.listed.keys() - listed.keys():
            self._forget(name)
            yield True
        for name, token in listed.items():
            if self.listed.get(name) != token and self._is_candidate(name):
                self._open[name] = _Open(self._done.pop(name, None), looks=looks)
        self.listed = listed
        for name in [*self._open, *self._turn()]:
            yield self._visit(name, known)

    def _is_candidate(self, name: str) -> bool:
        if is_candidate(name):
            return name not in FOLDERS
        if not name.isprintable() and step_in(name) is not None and not _is_text(name):
            self.unreadable[name] = f"{shown(name)} in {self._place.folder} is no UTF-8; rename it, or it is not seen"
        return False

    def _forget(self, name: str) -> None:
        for known in (self._open, self._done, self.unreadable):
            known.pop(name, None)

    def _turn(self) -> list[str]:
        """Return those of the done ones whose turn it is: a listing does not say that a file was written in place."""
        count = TURN if self._local else REMOTE_TURN
        names = dict.fromkeys(itertools.islice(self._turns, count))
        if len(names) < count:  # the next round begins, and takes in what is new
            self._turns = iter([name for name in self._done if self._local or not self.listed[name]])
            names |= dict.fromkeys(itertools.islice(self._turns, count - len(names)))
        return [name for name in names if name in self._done]

    def _visit(self, name: str, known: dict[Path, Sighting]) -> bool:
        """Look at one name; return whether something else was seen there than before."""
        path, now = self._place.folder / name, time.monotonic()
        state = self._open.get(name)
        before = self._done.get(name) if state is None else state.sighting
        seen = look(path, self._place, before or known.pop(path, None))
        unchanged = state is not None and seen == state.sighting and now - state.since >= self._settle
        if unchanged and seen is not None and seen.settling:
            seen = replace(seen, complete=True, settling=False)
        if _is_done(seen) or (seen is None and (state is None or state.looks >= YOUNG)):
            self._open.pop(name, None)
            self._done[name] = seen
        elif state is None or seen is None or seen != state.sighting:
            self._done.pop(name, None)
            self._open[name] = _Open(seen, now, 0 if seen is not None or state is None else state.looks + 1)
        return seen != before


def _is_done(seen: Sighting | None) -> bool:
    return seen is not None and (seen.complete or seen.refused)


def _is_text(name: str) -> bool:
    """Whether the bytes of a name are UTF-8: otherwise Python holds them as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Pulse:
    """A sign of life every few seconds, from a loop that turns faster; and a rest at each turn."""

    def __init__(self, tick: Callable[[], None], rest: Callable[[], None]) -> None:
        self._tick, self._rest, self._last = tick, rest, time.monotonic()

    def __call__(self) -> None:
        self._rest()
        if time.monotonic() - self._last >= TICK_SECONDS:
            self._tick()
            self._last = time.monotonic()


def _place(folder: Path, run: Path) -> Place:
    """Say what a look at something in the folder needs to know.

    No link in it may lead out of the run folder; or out of itself, where it is a link to a larger disk.
    """
    if not is_local(folder):
        return Place(folder, run)
    home = run if folder.resolve().is_relative_to(run.resolve()) else folder
    return Place(folder, home, inodes=not filesystem_of(folder).startswith("fuse"))
