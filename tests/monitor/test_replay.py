"""Real worker processes and what a checkpoint does to them: killed, hanging, leaking, and gone with the daemon."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ModelError
from rksp_core.profile import ModelProfile
from rksp_monitor import worker_process
from rksp_monitor.config import Workers
from rksp_monitor.replay import Abandoned, ReplayPool
from rksp_monitor.subject import Subject, SubjectSettings
from tests.monitor import tiny_model

SETTINGS = SubjectSettings("tests.monitor.tiny_model:build_scripted", samples=256, sequences=8, length=32, device="cpu")
QUICK = Workers(niceness=1)  # other tests on the same machine need not come first
GOOD, OTHER = "step-00000100", "step-00000200"
KILLS, HANGS, LEAKS, BOMB, MISFIT = (f"step-00000{step}" for step in (300, 400, 500, 600, 700))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    tiny_model.save_folder(run, 100)
    tiny_model.save_folder(run, 200, scale=4.0)
    tiny_model.save_folder(run, 300, code=9.0)
    tiny_model.save_folder(run, 400, code=7.0)
    tiny_model.save_folder(run, 500, code=6.0)
    tiny_model.save_folder(run, 600, code=5.0)
    tiny_model.save_folder(run, 700, width=8)
    return run / "checkpoints"


class Station(ReplayPool):
    """A pool of one run, and what it reported."""

    def __init__(self) -> None:
        self.reported: list[tuple[str, Mapping[str, Any]]] = []
        super().__init__(QUICK, report=lambda what, about: self.reported.append((what, about)))
        self.one = self.replayer("run", SETTINGS, timeout=60)

    @property
    def pid(self) -> int:
        return self.pids["cpu"]

    @property
    def alive(self) -> bool:
        return self._places["cpu", False].worker.alive

    @property
    def reasons(self) -> list[str]:
        return [about["reason"] for what, about in self.reported if what == "ended"]


@pytest.fixture(scope="module")
def station() -> Iterator[Station]:
    """One for all tests: a worker's start costs an import of torch, and what ends one must not matter to the next."""
    with contextlib.closing(Station()) as made:
        yield made


def _document(profile: ModelProfile) -> str:
    return json.dumps(profile.to_dict(eigenvalues=False))


def test_one_worker_gives_the_profiles_that_this_process_gives(folder: Path, station: Station):
    subject = Subject(SETTINGS)
    pids = set()
    for name in (GOOD, OTHER, GOOD):
        replayed = station.one.replay(folder / name)
        pids.add(station.pid)
        assert replayed.profile == ModelProfile.from_dict(subject.profile(folder / name).to_dict(eigenvalues=False))
        assert replayed.profile.step == int(name[-3:])
        assert replayed.seconds > 0
        assert replayed.notes == ()
    assert len(pids) == 1
    assert [what for what, _ in station.reported] == ["started", "built"]
    assert station.reported[1][1]["model"] == SETTINGS.model


def test_training_on_the_same_machine_comes_first(folder: Path, station: Station):
    station.one.replay(folder / GOOD)
    worker = psutil.Process(station.pid)
    assert worker.nice() == os.nice(0) + QUICK.niceness
    if sys.platform == "linux":
        assert worker.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE


def test_a_checkpoint_that_does_not_fit_leaves_the_worker_alive(folder: Path, station: Station):
    first = station.one.replay(folder / GOOD)
    pid = station.pid
    with pytest.raises(CorruptCheckpoint, match="does not fit the model"):
        station.one.replay(folder / MISFIT)
    assert station.one.replay(folder / GOOD).profile == first.profile
    assert station.pid == pid


def test_signals_to_everybody_are_left_to_the_daemon(folder: Path, station: Station):
    station.one.replay(folder / GOOD)
    pid = station.pid
    assert os.getpgid(pid) != os.getpgid(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    station.one.replay(folder / GOOD)
    assert station.pid == pid


def test_a_crash_is_the_checkpoints_failure_and_a_new_worker_gives_the_same_bits(folder: Path, station: Station):
    before = _document(station.one.replay(folder / GOOD).profile)
    restarts = station.one.restarts
    with pytest.raises(CheckpointError, match=f"{KILLS} ended its worker by signal 9"):
        station.one.replay(folder / KILLS)
    station.one.replay(folder / OTHER)
    assert _document(station.one.replay(folder / GOOD).profile) == before
    assert station.one.restarts == restarts + 1
    assert "ended its worker by signal 9" in station.reasons[-1]


def test_a_worker_that_died_while_it_had_nothing_to_do_is_nobodys_failure(folder: Path, station: Station):
    station.one.replay(folder / GOOD)
    os.kill(station.pid, signal.SIGKILL)
    while station.alive:
        time.sleep(0.01)
    assert station.one.replay(folder / GOOD).profile.layers
    assert station.reasons[-1] == "it was found dead: by signal 9"


def test_a_hang_ends_at_the_time_limit(folder: Path, station: Station, monkeypatch: pytest.MonkeyPatch):
    station.one.replay(folder / GOOD)  # so that the limit below is not spent on the start
    monkeypatch.setattr(station.one, "_timeout", 1.0)
    pid, ticks = station.pid, []
    with pytest.raises(CheckpointError, match="took longer than 1 s; raise replay"):
        station.one.replay(folder / HANGS, tick=lambda: ticks.append(1))
    assert ticks
    assert not psutil.pid_exists(pid)


def test_what_a_tick_raises_ends_the_replay_and_its_answer_is_not_the_next_ones(folder: Path, station: Station):
    def tick() -> None:
        if station.pids:
            raise KeyError("the ledger is gone")

    with pytest.raises(KeyError):
        station.one.replay(folder / OTHER, tick=tick)
    assert station.one.replay(folder / GOOD).profile.step == 100


def test_an_answer_is_not_read_when_it_is_too_large(folder: Path, station: Station, monkeypatch: pytest.MonkeyPatch):
    station.one.replay(folder / GOOD)
    monkeypatch.setattr(worker_process, "ANSWER_LIMIT", 1000)
    with pytest.raises(CheckpointError, match=f"{GOOD} gave no answer that can be read"):
        station.one.replay(folder / GOOD)
    assert not station.pids


def test_a_replay_is_given_up_when_the_daemon_stops(folder: Path, station: Station, monkeypatch: pytest.MonkeyPatch):
    stop = threading.Event()
    monkeypatch.setattr(station, "_stop", stop)
    station.one.replay(folder / GOOD)
    pid, ended = station.pid, len(station.reasons)
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Abandoned):
        station.one.replay(folder / HANGS)
    assert not psutil.pid_exists(pid)
    assert len(station.reasons) == ended
    with pytest.raises(Abandoned):
        station.one.replay(folder / GOOD)
    assert not station.pids


def test_memory_is_bounded_after_a_replay_and_in_the_midst_of_one(
    folder: Path, station: Station, monkeypatch: pytest.MonkeyPatch
):
    """A worker that leaked ends after its answer; one that takes all there is, at once."""
    station.one.replay(folder / GOOD)
    restarts, used = station.one.restarts, psutil.Process(station.pid).memory_info().rss / 2**30
    monkeypatch.setattr(station, "workers", QUICK.model_copy(update={"memory_limit": used + 0.2}))
    station.one.replay(folder / LEAKS)  # 0.25 GiB
    assert not station.pids
    assert station.reasons[-1].startswith(f"{LEAKS} left it with 0.")
    assert station.one.restarts == restarts + 1
    with pytest.raises(CheckpointError, match=r"GiB of memory, 1.5 times workers.memory_limit; raise it, or"):
        station.one.replay(folder / BOMB)
    assert not station.pids
    assert station.one.restarts == restarts + 2


def test_a_model_that_cannot_be_built_is_an_answer_and_may_be_repaired(folder: Path, tmp_path: Path, station: Station):
    config = tmp_path / "config.yaml"
    config.write_text("model: {factory: 'tests.monitor.tiny_model:nothing'}")
    replayer = station.replayer("other", dataclasses.replace(SETTINGS, model=str(config)), timeout=60)
    with pytest.raises(ModelError, match="has no 'nothing'"):
        replayer.replay(folder / GOOD)
    pid = station.pid
    config.write_text("model: {factory: 'tests.monitor.tiny_model:build'}")
    assert replayer.replay(folder / GOOD).profile.layers
    assert station.pid == pid
    assert replayer.restarts == 0


ORPHAN = """
import sys
from pathlib import Path
from rksp_monitor.replay import ReplayPool
from rksp_monitor.subject import SubjectSettings

def report(what, about):
    if what == "started":
        print(about["pid"], flush=True)

settings = SubjectSettings("tests.monitor.tiny_model:build_scripted", samples=256, device="cpu")
ReplayPool(report=report).replayer("run", settings, timeout=600).replay(Path(sys.argv[1]))
"""


def test_a_worker_that_outlives_its_kill_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    """As one does that hangs in the kernel, on a dead mount: here it is stopped, and the signal does not arrive."""
    monkeypatch.setattr(worker_process, "ENDING_SECONDS", 0.1)
    worker = worker_process.WorkerProcess(Workers())
    kill = worker._process.kill
    monkeypatch.setattr(worker._process, "kill", lambda: None)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        worker.close()
        assert worker.alive
    finally:
        kill()
        worker._process.wait()


def test_a_hanging_worker_does_not_outlive_a_killed_daemon(folder: Path):
    root = str(Path(__file__).parents[2])
    daemon = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(folder / HANGS)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    worker = psutil.Process(int(daemon.stdout.readline()))
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    _await_end(worker)


def _await_end(process: psutil.Process) -> None:
    """Wait until the process has ended; one that its parent has not waited for yet has ended too."""
    end = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "it still runs"
            time.sleep(0.05)
