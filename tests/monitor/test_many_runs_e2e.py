"""Several runs in one ``rksp watch``, as a real process: each goes its own way, whatever becomes of the others."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rksp_core import ProfileWriter
from tests.core.profiles import profile
from tests.monitor.test_watch_e2e import ALARM, Watcher, healthy, until


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        healthy(folder / name, range(10, 110, 10))
    return folder


@pytest.fixture
def start(runs: Path) -> Iterator[Callable[[str], Watcher]]:
    started: list[Watcher] = []

    def make(settings: str) -> Watcher:
        path = runs.parent / "watch.yaml"
        path.write_text(settings)
        started.append(Watcher(runs, "--config", str(path), folders=()))
        return started[-1]

    yield make
    for watcher in started:
        if watcher.process.poll() is None:
            watcher.process.kill()
            watcher.process.wait()
        watcher.log.close()


def series(watcher: Watcher, name: str) -> dict[str, float]:
    """Return {run: value} of a metric."""
    lines = [line for line in watcher.get("/metrics").splitlines() if line.startswith(name + "{")]
    return {line.split('run="')[1].split('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_runs_come_and_go_with_the_folders_that_a_glob_finds(runs: Path, start: Callable[[str], Watcher]):
    watcher = start(f"runs: [{{folder: '{runs}/*'}}]")
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step") == {"a": 100, "b": 100})
    (runs / "c").mkdir()
    healthy(runs / "c", range(10, 40, 10))
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step").get("c") == 30)
    shutil.rmtree(runs / "a")
    until(lambda: set(series(watcher, "rksp_risk_level")) == {"b", "c"})
    assert watcher.logged("no longer watched")[0]["run"] == "a"
    assert watcher.end() == 0


def test_each_run_has_its_own_settings(runs: Path, start: Callable[[str], Watcher]):
    for name in ("a", "b"):
        ProfileWriter(runs / name, every=10).write(profile(), 110, **ALARM)
    watcher = start(f"runs: [{{folder: '{runs}/a', enforce: true, run_id: first}}, {{folder: '{runs}/b'}}]")
    until(lambda: series(watcher, "rksp_risk_level") == {"first": 3, "b": 3})
    assert (runs / "a" / "control" / "desired.json").exists()
    assert not (runs / "b" / "control").exists()
    assert watcher.end() == 0


def test_a_run_in_trouble_is_suspended_alone_and_taken_up_again(runs: Path, start: Callable[[str], Watcher]):
    ledger = runs / "a" / ".rksp" / "a.sqlite3"
    ledger.parent.mkdir()
    ledger.write_bytes(b"no database" * 100)
    watcher = start(f"runs: [{{folder: '{runs}/a'}}, {{folder: '{runs}/b'}}]")
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step") == {"b": 100})
    until(lambda: series(watcher, "rksp_run_suspended") == {"a": 1, "b": 0})
    assert "cannot be used as a ledger" in watcher.logged("suspended")[0]["problem"]
    ledger.unlink()
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step") == {"a": 100, "b": 100})
    assert series(watcher, "rksp_run_suspended") == {"a": 0, "b": 0}
    assert watcher.end() == 0


def test_two_runs_of_one_name_are_told_apart_by_the_user(runs: Path, start: Callable[[str], Watcher]):
    watcher = start(f"runs: [{{folder: '{runs}/a', run_id: same}}, {{folder: '{runs}/b', run_id: same}}]")
    until(lambda: watcher.logged("suspended"))
    assert "two runs are called 'same'" in watcher.logged("suspended")[0]["problem"]
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step") == {"same": 100})
    assert watcher.end() == 0


def test_sighup_adds_removes_and_changes_runs(runs: Path, start: Callable[[str], Watcher]):
    watcher = start(f"runs: [{{folder: '{runs}/a'}}]")
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step") == {"a": 100})
    (runs.parent / "watch.yaml").write_text(f"runs: [{{folder: '{runs}/b', run_id: other}}]")
    watcher.process.send_signal(signal.SIGHUP)
    until(lambda: series(watcher, "rksp_checkpoint_last_processed_step") == {"other": 100})
    (runs.parent / "watch.yaml").write_text("runs: []")
    watcher.process.send_signal(signal.SIGHUP)
    until(lambda: watcher.logged("settings not reloaded"))
    assert series(watcher, "rksp_risk_level") == {"other": 0}
    assert watcher.end() == 0


def test_a_reload_does_not_forget_the_baseline_again(runs: Path):
    settings = runs.parent / "watch.yaml"
    settings.write_text("policy: {raise_after: 1}")
    watcher = Watcher(runs / "a", "--config", str(settings), "--new-baseline")
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 100)
    settings.write_text("policy: {raise_after: 2}")
    watcher.process.send_signal(signal.SIGHUP)
    until(lambda: len(watcher.logged("watching")) == 2)
    ProfileWriter(runs / "a", every=10).write(profile(near_unit_mass=0.6), 110)
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 110)
    assert watcher.metric("rksp_near_unit_mass_drift") < 0
    assert watcher.end() == 0


def test_a_refused_watcher_tells_nobody_that_it_watches(runs: Path, start: Callable[[str], Watcher]):
    first = start(f"runs: [{{folder: '{runs}/a'}}]")
    until(lambda: series(first, "rksp_checkpoint_last_processed_step") == {"a": 100})
    told = runs.parent / "told"
    hook = f"hooks: [{{command: [/bin/sh, -c, 'echo $RKSP_EVENT $RKSP_RUN >> {told}']}}]"
    (runs.parent / "second.yaml").write_text(f"{hook}\nruns: [{{folder: '{runs}/a'}}, {{folder: '{runs}/b'}}]")
    second = Watcher(runs, "--config", str(runs.parent / "second.yaml"), "--once", folders=())
    assert second.process.wait(60) == 2
    second.log.close()
    assert sorted(told.read_text().splitlines()) == ["run_added b", "stopped b"]
    assert first.end() == 0


def test_a_healthy_run_is_found_where_its_watcher_keeps_its_ledger(runs: Path, start: Callable[[str], Watcher]):
    state = f"state_dir: '{runs.parent / 'state'}'"
    first = start(f"{state}\nruns: [{{folder: '{runs}/a'}}]")
    until(lambda: series(first, "rksp_checkpoint_last_processed_step") == {"a": 100})
    assert first.end() == 0
    rules = """policy: {rules: [{name: r, level: 2, all: [
        {metric: near_unit_mass_min, against: reference, direction: falls, by: 0.05}]}]}"""
    ProfileWriter(runs / "b", every=10).write(profile(near_unit_mass=0.6), 90)
    second = start(f"{state}\n{rules}\nreference: '{runs}/a'\nruns: [{{folder: '{runs}/b'}}]")
    until(lambda: second.logged("risk level"))
    assert second.logged("risk level")[0]["now"] == "high"
    assert second.end() == 0
