"""Which runs there are: folders that a glob finds come and go, and a file system in trouble takes none away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rksp_core.errors import ConfigError
from rksp_monitor import roster
from rksp_monitor.config import RunEntry, WatchSettings
from rksp_monitor.roster import Roster


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(roster, "LEAST_SECONDS", 0.01)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def changed() -> threading.Event:
    return threading.Event()


@pytest.fixture
def found(runs: Path, changed: threading.Event) -> Iterator[Roster]:
    made = Roster(WatchSettings(poll_interval=0.01, runs=(RunEntry(folder=f"{runs}/*"),)), changed.set)
    yield made
    made.close()


def names(found: Roster) -> list[str]:
    return [path.name for path, _ in found.runs.values()]


def test_new_folders_are_found_and_removed_ones_are_not_kept(runs: Path, found: Roster, changed: threading.Event):
    assert names(found) == ["a", "b"]
    (runs / "a").rmdir()
    assert changed.wait(60)
    assert names(found) == ["b"]
    changed.clear()
    (runs / "c").mkdir()
    assert changed.wait(60)
    assert names(found) == ["b", "c"]


@pytest.fixture
def answers(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, whoever looks at the file system hangs."""
    answers, real = threading.Event(), roster.glob.glob
    monkeypatch.setattr(roster.glob, "glob", lambda pattern: (answers.wait(60), real(pattern))[1])
    yield answers
    answers.set()


def test_a_start_that_hangs_can_be_ended(runs: Path, answers: threading.Event):
    stop = threading.Event()
    settings = WatchSettings(runs=(RunEntry(folder=f"{runs}/*"),))
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(Roster, settings, lambda: None, stop=stop)
        stop.set()
        made = starting.result()
    made.close()
    assert names(made) == []
    assert not answers.is_set()


def test_a_file_system_that_hangs_holds_up_a_reload_for_a_moment(runs: Path, answers: threading.Event):
    settings = WatchSettings(poll_interval=0.01, runs=(RunEntry(folder=f"{runs}/*"),))
    with pytest.raises(ConfigError, match=r"not looked up within 0\.1 s; does each of their file systems answer"):
        Roster(settings, lambda: None, patience=0.1)
    answers.set()
    made = Roster(settings, lambda: None, patience=60.0)
    made.close()
    assert names(made) == ["a", "b"]


def test_a_mistake_of_the_first_look_is_said(runs: Path):
    settings = WatchSettings(runs=(RunEntry(folder="nowhere://bucket/run"),))
    with pytest.raises(ConfigError, match="nowhere"):
        Roster(settings, lambda: None)


def test_a_folder_that_cannot_be_asked_for_is_not_taken_for_removed(
    runs: Path, found: Roster, changed: threading.Event
):
    (runs / "a").rmdir()
    (runs / "a").symlink_to(
        "a"
    )  # as with a server that is away, `stat` says neither that it is there nor that it is not
    (runs / "c").mkdir()
    assert changed.wait(60)
    assert sorted(names(found)) == ["a", "b", "c"]
