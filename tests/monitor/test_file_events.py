"""File events of the real operating system: who is woken, by what, and by what not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rksp_monitor import file_events
from rksp_monitor.file_events import FileEvents

NOTHING = 0.3  # seconds to wait for an event that must not come


def test_each_run_is_woken_by_its_own_folder_through_one_observer(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    wake_one, wake_two = threading.Event(), threading.Event()
    before = threading.active_count()
    with FileEvents() as events, events.listen(one, wake_one), events.listen(two, wake_two):
        (one / "step-1.pt").touch()
        assert wake_one.wait(10)
        assert not wake_two.wait(NOTHING)
        (two / "step-1.pt").touch()
        assert wake_two.wait(10)
    assert threading.active_count() == before


def test_two_that_listen_to_one_folder_are_both_woken_and_leave_apart(tmp_path: Path):
    first, second = threading.Event(), threading.Event()
    with FileEvents() as events, events.listen(tmp_path, first):
        with events.listen(tmp_path, second):
            (tmp_path / "step-1.pt").touch()
            assert first.wait(10)
            assert second.wait(10)
        first.clear()
        second.clear()
        (tmp_path / "step-2.pt").touch()
        assert first.wait(10)
        assert not second.is_set()


def test_temporary_files_reading_and_growing_are_no_news(tmp_path: Path):
    log = (tmp_path / "train.log").open("w")
    wake = threading.Event()
    with FileEvents() as events, events.listen(tmp_path, wake):
        (tmp_path / ".step-1.tmp").touch()
        log.write("step 1\n")
        log.flush()
        (tmp_path / "train.log").read_text()
        assert not wake.wait(NOTHING)
        (tmp_path / ".step-1.tmp").rename(tmp_path / "step-1")
        assert wake.wait(10)
    log.close()


def test_the_marker_of_dcp_is_news_although_its_name_is_hidden(tmp_path: Path):
    wake = threading.Event()
    with FileEvents() as events, events.listen(tmp_path, wake):
        (tmp_path / ".metadata.tmp").touch()
        assert wake.wait(10)


def test_only_folders_that_are_followed_are_listened_to(tmp_path: Path):
    inner = tmp_path / "checkpoints"
    inner.mkdir()
    wake = threading.Event()
    with FileEvents() as events, events.listen(tmp_path, wake) as listener:
        (inner / "step-1.pt").touch()
        assert not wake.wait(NOTHING)
        assert listener.follow([tmp_path, inner, tmp_path / "later", inner / "step-1.pt"])
        assert not listener.follow([tmp_path, inner])
        (inner / "step-2.pt").touch()
        assert wake.wait(10)
        listener.follow([tmp_path])
        wake.clear()
        (inner / "step-3.pt").touch()
        assert not wake.wait(NOTHING)


def test_a_folder_that_is_made_again_is_followed_again(tmp_path: Path):
    inner = tmp_path / "checkpoints"
    inner.mkdir()
    wake = threading.Event()
    with FileEvents() as events, events.listen(tmp_path, wake) as listener:
        listener.follow([tmp_path, inner])
        inner.rename(tmp_path / "old")
        inner.mkdir()
        assert listener.follow([tmp_path, inner])
        wake.wait(10)
        wake.clear()
        (inner / "step-1.pt").touch()
        assert wake.wait(10)


def test_a_network_file_system_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_events, "is_remote", lambda _: True)
    wake = threading.Event()
    with FileEvents() as events, events.listen(tmp_path, wake) as listener:
        assert not listener.follow([tmp_path])
        (tmp_path / "step-1.pt").touch()
        assert not wake.wait(NOTHING)
