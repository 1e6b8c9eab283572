"""The ledger on a real SQLite file: what survives a crash, and who may write."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rksp_core.errors import ConfigError
from rksp_monitor.discovery import Sighting
from rksp_monitor.ledger import Event, Ledger, Outcome, open_ledger


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "run.sqlite3", "run", clock=clock) as opened:
        yield opened


def sighting(step: int, fingerprint: str = "f", *, complete: bool = True, kind: str = "checkpoint") -> Sighting:
    return Sighting(Path(f"/run/{kind}-{step}"), "folder", kind, step, fingerprint, complete)


def test_an_event_goes_from_seen_to_done(ledger: Ledger):
    assert ledger.record(sighting(1, "growing", complete=False))
    assert not ledger.record(sighting(1, "grown", complete=False))
    assert ledger.counts()["seen"] == 1
    assert ledger.next_ready() is None
    assert ledger.record(sighting(1, "final"))
    assert not ledger.record(sighting(1, "final"))
    assert (ledger.counts()["seen"], ledger.counts()["ready"]) == (0, 1)
    event = ledger.next_ready()
    assert event is not None
    ledger.claim(event)
    assert ledger.next_ready() is None
    ledger.finish(event, Outcome({"a": 1}, {}, {}), {"policy": {"level": 2}})
    assert ledger.counts()["done"] == 1
    assert ledger.load("policy") == {"level": 2}
    assert not ledger.record(sighting(1, "final"))


def test_the_pages_that_are_kept_in_memory_are_bounded(ledger: Ledger):
    """Of fifty runs in one process: SQLite's own bound is 2 MiB each, and is reached within 500 events."""
    (size,) = ledger._database.execute("PRAGMA cache_size").fetchone()
    assert -256 <= size < 0, "in KiB, when it is negative"


def test_the_lowest_step_comes_first_and_a_profile_before_a_checkpoint(ledger: Ledger):
    for step, kind in ((1000, "profile"), (20, "checkpoint"), (20, "profile"), (999, "checkpoint")):
        ledger.record(sighting(step, kind=kind))
    order = []
    while (event := ledger.next_ready()) is not None:
        ledger.claim(event)
        order.append((event.step, event.kind))
    assert order == [(20, "profile"), (20, "checkpoint"), (999, "checkpoint"), (1000, "profile")]


def test_a_retry_waits_for_its_back_off(ledger: Ledger, clock: Clock):
    ledger.record(sighting(1))
    event = ledger.next_ready()
    assert event is not None
    ledger.claim(event)
    ledger.retry(event, "damaged", 5.0)
    assert ledger.next_ready() is None
    clock.now += 5
    again = ledger.next_ready()
    assert again is not None
    assert (again.attempts, again.error) == (1, "damaged")


def test_a_clock_that_is_set_back_does_not_prolong_a_back_off(ledger: Ledger, clock: Clock):
    ledger.record(sighting(1))
    event = ledger.next_ready()
    assert event is not None
    ledger.claim(event)
    ledger.retry(event, "damaged", 5.0)
    clock.now -= 500
    assert ledger.next_ready() is not None


def test_a_checkpoint_written_again_replaces_one_that_waits(ledger: Ledger):
    ledger.record(sighting(1, "old"))
    ledger.record(sighting(1, "new"))
    assert [(e.fingerprint, e.status) for e in ledger.events()] == [("old", "expired"), ("new", "ready")]


def test_a_restart_makes_what_was_in_work_ready_again(tmp_path: Path):
    path = tmp_path / "run.sqlite3"
    with open_ledger(path, "run") as ledger:
        ledger.record(sighting(1))
        ledger.claim(ledger.next_ready())
    with open_ledger(path, "run") as ledger:
        assert ledger.recover() == 1
        assert ledger.next_ready().attempts == 1


def test_an_outcome_and_its_states_are_written_together_or_not_at_all(ledger: Ledger):
    ledger.record(sighting(1))
    event = ledger.next_ready()
    with pytest.raises(TypeError):
        ledger.finish(event, Outcome({}, {}, {}), {"policy": {"level": 1}, "order": {"generation": object()}})
    assert ledger.load("policy") is None
    assert ledger.counts()["done"] == 0


def test_runs_in_one_file_do_not_mix(tmp_path: Path):
    database = sqlite3.connect(tmp_path / "x.sqlite3", isolation_level=None)
    one, two = Ledger(database, "one"), Ledger(database, "two")
    one.record(sighting(1))
    assert two.counts()["ready"] == 0
    assert two.record(sighting(1))
    database.close()


def test_states_can_be_forgotten(ledger: Ledger):
    ledger.record(sighting(1))
    ledger.finish(ledger.next_ready(), Outcome({}, {}, {}), {"policy": {}, "order": {"generation": 3}})
    ledger.forget("policy")
    assert ledger.load("policy") is None
    assert ledger.load("order") == {"generation": 3}


HOLD = """
import sys, time
from pathlib import Path
from rksp_monitor.ledger import open_ledger
with open_ledger(Path(sys.argv[1]), "run"):
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_by_name_until_the_first_is_killed(tmp_path: Path):
    path = tmp_path / "run.sqlite3"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "open\n"
        with (
            pytest.raises(ConfigError, match=f"already watched by process {first.pid} on {os.uname().nodename}"),
            open_ledger(path, "run"),
        ):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    with open_ledger(path, "run") as ledger:
        assert ledger.record(sighting(1))


def test_a_ledger_of_another_version_or_no_ledger_is_refused(tmp_path: Path):
    path = tmp_path / "run.sqlite3"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="has version 99"), open_ledger(path, "run"):
        pass
    path.write_text("this is no database, and long enough to be read as one" * 100)
    with pytest.raises(ConfigError, match="cannot be used as a ledger"), open_ledger(path, "run"):
        pass


def test_a_disk_that_fills_up_is_one_sentence_and_loses_nothing(tmp_path: Path):
    path, recorded = tmp_path / "run.sqlite3", []

    def fill(ledger: Ledger) -> None:
        ledger._database.execute("PRAGMA max_page_count = 20")  # gives the same error as a full disk
        for step in range(10_000):
            ledger.record(sighting(step))
            recorded.append(step)

    with pytest.raises(ConfigError, match="is full"), open_ledger(path, "run") as ledger:
        fill(ledger)
    with open_ledger(path, "run") as ledger:
        assert [event.step for event in ledger.events("ready")] == recorded != []


def test_a_state_folder_that_refuses_the_owners_name_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refused)
    with open_ledger(tmp_path / "run.sqlite3", "run") as ledger:
        assert ledger.record(sighting(1))


def test_a_remote_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rksp_monitor.filesystem.filesystem_of", lambda _: "nfs4")
    monkeypatch.setattr("rksp_monitor.ledger.filesystem_of", lambda _: "nfs4")
    with pytest.raises(ConfigError, match="is on nfs4"), open_ledger(tmp_path / "run.sqlite3", "run"):
        pass


def test_what_vanished_with_its_disk_and_is_back_is_judged_after_all(ledger: Ledger):
    ledger.record(sighting(1))
    event = ledger.next_ready()
    assert event is not None
    ledger.close_event(event, "expired", "it vanished before it was read")
    assert ledger.next_ready() is None
    assert ledger.record(sighting(1))
    assert ledger.next_ready() is not None


def test_the_order_of_judging_holds_though_the_clock_steps_back(ledger: Ledger, clock: Clock):
    for step in (2, 1):
        ledger.record(sighting(step))
        event = ledger.next_ready()
        assert event is not None
        ledger.finish(event, Outcome({}, {"step": step}, {}), {})
        clock.now -= 500
    later = Event(9, "checkpoint", 3, "", Path(), "", "ready", 0, "", 0.0)
    assert [one["step"] for one in ledger.evidence_before(later.step)] == [2, 1]


def test_a_ledger_of_the_first_version_is_brought_up_and_keeps_what_it_holds(tmp_path: Path):
    path = tmp_path / "run.sqlite3"
    database = sqlite3.connect(path)
    database.executescript(
        """
        CREATE TABLE events (
            id INTEGER PRIMARY KEY, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER NOT NULL,
            fingerprint TEXT NOT NULL, path TEXT NOT NULL, format TEXT NOT NULL, status TEXT NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0, not_before REAL NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
            profile TEXT, first_seen REAL NOT NULL, updated REAL NOT NULL,
            UNIQUE (run, kind, step, fingerprint, path));
        CREATE TABLE state (run TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (run, name));
        INSERT INTO events VALUES (1, 'run', 'profile', 10, 'f', '/p', 'profile', 'done', 1, 0, '', '{}', 1, 2);
        INSERT INTO state VALUES ('run', 'subject', '{"is": "x"}');
        PRAGMA user_version = 1;
        """
    )
    database.close()
    for _ in range(2):
        with open_ledger(path, "run") as ledger:
            assert ledger.counts()["done"] == 1
            assert ledger.load("subject") == {"is": "x"}
            assert ledger.judged_count("profile") == 1


def judged(ledger: Ledger, step: int, fingerprint: str = "f") -> None:
    ledger.record(sighting(step, fingerprint))
    ledger.finish(ledger.next_ready(), Outcome({"filler": "x" * 30_000}, {}, {}), {})


def test_to_judge_an_event_reads_no_more_of_a_long_history_than_of_a_short_one(ledger: Ledger):
    def work(step: int) -> int:
        """Return the steps of SQLite's virtual machine that an event takes: those that read rows are among them."""
        counted = []
        ledger._database.set_progress_handler(lambda: counted.append(1) and None, 10)
        judged(ledger, step)
        ledger.judged_count("profile")
        ledger.backlog()
        ledger._database.set_progress_handler(None, 0)
        return len(counted)

    judged(ledger, 1)
    short = work(2)
    for step in range(3, 300):
        judged(ledger, step)
    assert work(300) <= 1.5 * short


def test_what_was_never_finished_is_not_read_because_the_model_is_another(ledger: Ledger):
    ledger.record(sighting(1, "half", complete=False))
    ledger.close_event(ledger.events("seen")[0], "failed", "it was never finished")
    assert ledger.reopen_checkpoints("another") == 0
    assert ledger.next_ready() is None


def test_an_earlier_content_of_a_path_does_not_count_as_near(ledger: Ledger):
    judged(ledger, 100, "before the trainer went back")
    ledger.record(sighting(100, "after"))
    ledger.record(sighting(150))
    again, beside = ledger.events("ready")
    assert not ledger.near_judged(again, 100)
    assert ledger.near_judged(beside, 100)


def test_a_scan_is_one_transaction_however_much_it_saw(tmp_path: Path):
    path = tmp_path / "run.sqlite3"
    with open_ledger(path, "run") as ledger:
        began = []
        ledger._database.set_trace_callback(lambda text: began.append(text) if text.startswith("BEGIN") else None)
        seen = [sighting(step) for step in range(100)] + [sighting(100, complete=False)]
        assert ledger.record_all(seen) == seen
        assert ledger.record_all(seen) == []
        ledger._database.set_trace_callback(None)
        assert len(began) == 2
        assert (ledger.counts()["ready"], ledger.counts()["seen"]) == (100, 1)


def test_a_profile_of_before_weight_norms_were_kept_is_compared_by_what_it_has(ledger: Ledger):
    """A checkpoint that an older version judged and that was touched since: its weights are the same."""
    old = {"layers": [1], "noise": None}
    ledger.record(sighting(1, "first"))
    judged = ledger.next_ready()
    assert judged is not None
    ledger.finish(judged, Outcome(old, {}, {}), {})
    ledger.record(sighting(1, "touched"))
    event = ledger.next_ready()
    assert event is not None
    assert not ledger.went_back(event, old | {"weight_norms": {"blocks": 2.0, "head": None}})
    assert ledger.went_back(event, old | {"layers": [2], "weight_norms": {"blocks": 2.0, "head": None}})
