"""File events of the operating system, which end the wait between two scans early; nothing depends on them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rksp_monitor.filesystem import is_remote

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver, ObservedWatch


class FileEvents(contextlib.AbstractContextManager["FileEvents"]):
    """One observer for all runs of the process: one inotify instance, of which a user has 128. Close it in the end.

    Parameters
    ----------
    said
        Told in a sentence, once, when events cannot be had (any more).
    """

    def __init__(self, said: Callable[[str], None] = lambda _: None) -> None:
        self._said = said
        self._lock = threading.Lock()
        self._observer: BaseObserver | None = None
        self._watches: dict[Path, tuple[ObservedWatch, frozenset[threading.Event]]] = {}
        self._refused = False

    def __exit__(self, *_: object) -> None:
        """Stop the observer."""
        with self._lock:
            observer, self._observer, self._refused = self._observer, None, True
            self._watches.clear()
        if observer is not None:
            observer.stop()
            observer.join(timeout=5)

    @contextlib.contextmanager
    def listen(self, folder: Path, wake: threading.Event) -> Iterator[Listener]:
        """Set ``wake`` when something may be new in the folder, and in those that the listener is told to follow."""
        listener = Listener(self, wake, silent=is_remote(folder))
        try:
            listener.follow([folder])
            yield listener
        finally:
            listener.follow([])

    def _add(self, folder: Path, wake: threading.Event) -> bool:
        """Return whether events of the folder will set ``wake``."""
        with self._lock:
            if folder in self._watches:
                watch, wakes = self._watches[folder]
                self._watches[folder] = (watch, wakes | {wake})
                return True
            if self._refused:
                return False
            try:
                self._watches[folder] = (self._schedule(folder), frozenset({wake}))
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return False
            except (OSError, RuntimeError) as error:  # out of inotify watches or instances, or of threads
                self._refused = True
                self._said(f"no file events from {folder} on ({error}): polling alone finds what is written")
                return False
            return True

    def _remove(self, folder: Path, wake: threading.Event) -> None:
        with self._lock:
            if folder not in self._watches:
                return
            watch, wakes = self._watches.pop(folder)
            if wakes - {wake}:
                self._watches[folder] = (watch, wakes - {wake})
            elif self._observer is not None:
                with contextlib.suppress(KeyError, OSError):  # the folder went, and its watch with it
                    self._observer.unschedule(watch)

    def _schedule(self, folder: Path) -> ObservedWatch:
        from watchdog import events
        from watchdog.observers import Observer

        # Reading a file opens and closes it, a growing log is modified: neither is news.
        wanted: list[type[events.FileSystemEvent]] = [
            events.DirCreatedEvent, events.DirMovedEvent, events.FileClosedEvent, events.FileCreatedEvent,
            events.FileMovedEvent,
        ]  # fmt: skip
        if self._observer is None:
            observer = Observer()
            observer.start()
            self._observer = observer

        class Hint(events.FileSystemEventHandler):
            def dispatch(_, event: events.FileSystemEvent) -> None:  # noqa: N805
                if any(not _is_hidden(os.fsdecode(path)) for path in (event.src_path, event.dest_path) if path):
                    self._wake(folder)

        # Never recursive: a run folder may hold a million files that are none of our business.
        return self._observer.schedule(Hint(), os.path.realpath(folder), recursive=False, event_filter=wanted)

    def _wake(self, folder: Path) -> None:
        """Wake the listeners, without our lock: watchdog holds its own here, and asks for none of ours."""
        _, wakes = self._watches.get(folder, (None, frozenset[threading.Event]()))
        for wake in wakes:
            wake.set()


class Listener:
    """What one run listens to."""

    def __init__(self, events: FileEvents, wake: threading.Event, *, silent: bool) -> None:
        self._events, self._wake, self._silent = events, wake, silent
        self._followed: dict[Path, tuple[int, int]] = {}

    def follow(self, folders: Iterable[Path]) -> bool:
        """Listen to these folders and no others; return whether one is new: what it holds may have been missed."""
        wanted = {} if self._silent else {folder: place for folder in folders if (place := _place(folder)) is not None}
        for folder in [folder for folder, place in self._followed.items() if wanted.get(folder) != place]:
            del self._followed[folder]
            self._events._remove(folder, self._wake)
        new = [folder for folder in wanted if folder not in self._followed and self._events._add(folder, self._wake)]
        self._followed |= {folder: wanted[folder] for folder in new}
        return bool(new)


def _place(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another one that is made later under its name; None when it is not there."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_hidden(path: str) -> bool:
    """Whether it is a dot file: temporary, or our own ledger's folder. ``.metadata`` commits a checkpoint of DCP."""
    name = Path(path).name
    return name.startswith(".") and not name.startswith(".metadata")
