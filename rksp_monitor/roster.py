"""Which runs there are to watch: the folders that the settings name, and those that their globs find."""

from __future__ import annotations

import glob
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path

from rksp_core.errors import ConfigError
from rksp_monitor.config import RunEntry, WatchSettings
from rksp_monitor.remote import as_path, is_local

Found = Mapping[str, tuple[Path, RunEntry]]

LEAST_SECONDS = 1.0  # between two looks for new folders, however short the poll interval is
WAIT_SECONDS = 0.25  # between two looks whether the first one is still waited for


def find_runs(settings: WatchSettings) -> dict[str, tuple[Path, RunEntry]]:
    """Return {folder as text: (its path, its settings)}; the first entry that names or finds a folder has it.

    Raises
    ------
    ConfigError
        When a URL cannot be opened.
    """
    found: dict[str, tuple[Path, RunEntry]] = {}
    for entry in settings.runs:
        for path in _folders(entry.folder):
            found.setdefault(str(path), (path, entry))
    return found


def is_pattern(folder: str) -> bool:
    """Whether the text is a glob that may find any number of folders, new ones later."""
    return "://" not in folder and glob.has_magic(folder) and not os.path.exists(folder)  # noqa: PTH110 - never raises


def _folders(folder: str) -> list[Path]:
    if is_pattern(folder):
        return sorted(Path(text).absolute() for text in glob.glob(folder) if os.path.isdir(text))  # noqa: PTH112, PTH207 - the same
    path = as_path(folder)
    return [path.absolute() if is_local(path) else path]


def _is_gone(folder: Path) -> bool:
    """Whether a folder that a glob no longer finds was removed; one whose file system does not answer was not."""
    try:
        return not stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


class Roster:
    """Looks for run folders in a thread of its own: a network file system that hangs must not hang the session.

    Parameters
    ----------
    settings
        Name the folders.
    wake
        Called when other folders are there than at the last look.
    patience
        Seconds that the first look may take.
    stop
        When set, the first look is waited for no longer, and there are no runs.

    Raises
    ------
    ConfigError
        When a URL cannot be opened, or the first look takes longer.
    """

    def __init__(
        self,
        settings: WatchSettings,
        wake: Callable[[], None],
        *,
        patience: float = math.inf,
        stop: threading.Event | None = None,
    ) -> None:
        self._settings, self._wake = settings, wake
        self._stop = threading.Event()
        self._found: Found = {}
        first, end = Future[Found](), time.monotonic() + patience
        threading.Thread(target=self._live, args=(first,), name="roster", daemon=True).start()
        while not first.done() and not (stop is not None and stop.is_set()):
            if time.monotonic() > end:
                self.close()
                raise ConfigError(
                    f"the folders of `runs:` were not looked up within {patience:g} s; does each of their file "
                    "systems answer?"
                )
            wait([first], WAIT_SECONDS)
        if first.done():
            self._found = first.result()

    @property
    def runs(self) -> Found:
        """What was found at the last look."""
        return self._found

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def _live(self, first: Future[Found]) -> None:
        try:
            first.set_result(find_runs(self._settings))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            first.set_exception(error)
        else:
            if any(is_pattern(entry.folder) for entry in self._settings.runs):
                self._look()

    def _look(self) -> None:
        while not self._stop.wait(max(LEAST_SECONDS, self._settings.poll_interval)):
            found = find_runs(self._settings)
            found |= {key: run for key, run in self._found.items() if key not in found and not _is_gone(run[0])}
            if found.keys() != self._found.keys() and not self._stop.is_set():
                self._found = found
                self._wake()
