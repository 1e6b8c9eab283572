"""One run in its thread, with a worker that is played: what a suspension, or a baseline that is forgotten, costs."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from rksp_core import ProfileWriter
from rksp_core.control import ControlWriter
from rksp_monitor import run_thread
from rksp_monitor.config import RunEntry
from rksp_monitor.desk import Desk
from rksp_monitor.discovery import Scanner
from rksp_monitor.history import read_history
from rksp_monitor.judge import Judge
from rksp_monitor.metrics import Board
from rksp_monitor.orders import sole_orderer
from rksp_monitor.run_thread import RunThread, Task
from rksp_monitor.watcher import Surroundings
from tests.core.profiles import profile
from tests.monitor import tiny_model
from tests.monitor.test_watcher import FakeReplayer

Live = Callable[..., RunThread]


class FakePool:
    def __init__(self, script: dict[int, Any]) -> None:
        self.script = script

    def replayer(self, *_: object, **__: object) -> FakeReplayer:
        return FakeReplayer(self.script)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def desk() -> Desk:
    return Desk(1, 3600.0)


@pytest.fixture
def live(tmp_path: Path, told: list[str], desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Live:
    monkeypatch.setattr(run_thread, "SHORTEST_PAUSE", 0.05)

    def make(script: dict[int, Any], task: Task, **settings: Any) -> RunThread:
        thread = RunThread(
            tmp_path,
            RunEntry(folder=str(tmp_path), run_id="run", model="a.b:c", **settings),
            task,
            state_dir=None,
            pool=FakePool(script),
            around=Surroundings(
                structlog.get_logger(),
                Board({}),
                announce=lambda event, *_: told.append(event),
                poll_interval=0.05,
                desk=desk,
            ),
            names={},
            done=lambda: None,
        )
        with structlog.testing.capture_logs():
            thread.start()
            assert thread.join(60)
        return thread

    return make


def test_a_suspension_forgets_neither_what_was_judged_nor_the_worst_level(tmp_path: Path, live: Live, told: list[str]):
    writer = ProfileWriter(tmp_path, every=10)
    for step in range(10, 150, 10):
        writer.write(profile(), step, loss=99.0 if step == 110 else 2.0)
    tiny_model.save_folder(tmp_path, 200)
    full = {200: [MemoryError("full"), MemoryError("full"), profile()]}
    run = live(full, Task(until_step=200), policy={"clear_after": 1})
    assert (run.judged, run.level) == (15, 3)
    assert told.count("run_suspended") == 1, "the same problem is told once"


def test_a_control_folder_takes_orders_from_one_watcher_whatever_its_state_folder(tmp_path: Path, live: Live):
    ProfileWriter(tmp_path, every=10).write(profile(), 10)
    control = ControlWriter(tmp_path / "control")
    with sole_orderer(control):
        refused = live({}, Task(once=True), enforce=True)
        assert f"gets its orders from process {os.getpid()} on {socket.gethostname()} already" in str(refused.error)
        assert (refused.judged, refused.result) == (0, None)
        assert live({}, Task(once=True)).judged == 1, "who only observes is in nobody's way"
        assert stat.S_IMODE((tmp_path / "control" / "watcher.lock").stat().st_mode) == 0o600
    assert live({}, Task(once=True), enforce=True).error is None
    assert [path.name for path in (tmp_path / "control").iterdir()] == ["watcher.lock"]


def test_what_was_unlike_the_old_baseline_is_judged_against_the_new_one(tmp_path: Path, live: Live):
    def statuses() -> list[str]:
        return [row.status for row in read_history(tmp_path / ".rksp" / "run.sqlite3").rows()]

    tiny_model.save_folder(tmp_path, 100)
    live({}, Task(once=True))
    for step in (200, 300):
        tiny_model.save_folder(tmp_path, step)
    other = dict.fromkeys((200, 300), profile(probe="another"))
    live(other, Task(once=True))
    assert statuses() == ["done", "skipped", "skipped"]
    live(other, Task(once=True, new_baseline=True))
    assert statuses() == ["done", "done", "done"]


def test_a_replay_holds_no_seat_and_what_follows_it_does(
    tmp_path: Path, live: Live, desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    """Else the other runs would wait for a replay, or a scrape for all of them."""
    seated = dict[str, set[bool]]()

    def note(what: str, when: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            seated.setdefault(what, set()).add(bool(desk._seated))
            return when(*arguments, **options)

        return noted

    monkeypatch.setattr(FakeReplayer, "replay", note("replay", FakeReplayer.replay))
    monkeypatch.setattr(Judge, "judge", note("judge", Judge.judge))
    monkeypatch.setattr(Scanner, "scan", note("scan", Scanner.scan))
    ProfileWriter(tmp_path, every=10).write(profile(), 10)
    tiny_model.save_folder(tmp_path, 100)
    assert live({}, Task(once=True)).judged == 2
    assert seated == {"replay": {False}, "judge": {True}, "scan": {True}}
