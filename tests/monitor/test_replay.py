"""Real worker processes: reused, killed by a checkpoint, hanging, and gone when the daemon is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ModelError
from rksp_core.profile import ModelProfile
from rksp_monitor.daemon import Abandoned
from rksp_monitor.replay import ReplayWorker
from rksp_monitor.subject import Subject, SubjectSettings
from tests.monitor import tiny_model

SETTINGS = SubjectSettings("tests.monitor.tiny_model:build_scripted", samples=256, sequences=8, length=32, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    tiny_model.save_folder(run, 100)
    tiny_model.save_folder(run, 200, scale=4.0)
    tiny_model.save_folder(run, 300, code=9.0)
    tiny_model.save_folder(run, 400, code=7.0)
    tiny_model.save_folder(run, 500, width=8)
    return run / "checkpoints"


@pytest.fixture(scope="module")
def worker() -> Iterator[ReplayWorker]:
    """One for all tests: to start one costs an import of torch, and what breaks one must not matter to the next."""
    made = ReplayWorker(SETTINGS, timeout=60, niceness=0)
    yield made
    made.close()


def test_one_worker_gives_the_profiles_that_this_process_gives(folder: Path, worker: ReplayWorker):
    subject = Subject(SETTINGS)
    pids = set()
    for step in (100, 200, 100):
        replayed = worker.replay(folder / f"step-{step:08d}")
        pids.add(worker.process.pid)
        direct = ModelProfile.from_dict(subject.profile(folder / f"step-{step:08d}").to_dict(eigenvalues=False))
        assert replayed == direct
        assert replayed.step == step
    assert len(pids) == 1


def test_a_checkpoint_that_does_not_fit_leaves_the_worker_alive(folder: Path, worker: ReplayWorker):
    first = worker.replay(folder / "step-00000100")
    pid = worker.process.pid
    with pytest.raises(CorruptCheckpoint, match="does not fit the model"):
        worker.replay(folder / "step-00000500")
    assert worker.replay(folder / "step-00000100") == first
    assert worker.process.pid == pid


def test_a_crash_is_the_checkpoints_failure_and_the_next_one_gets_a_new_worker(folder: Path, worker: ReplayWorker):
    restarts = worker.restarts
    with pytest.raises(CheckpointError, match="step-00000300 ended its worker by signal 9"):
        worker.replay(folder / "step-00000300")
    assert worker.replay(folder / "step-00000100").layers
    assert worker.restarts == restarts + 1


def test_a_hang_ends_at_the_time_limit(folder: Path, worker: ReplayWorker, monkeypatch: pytest.MonkeyPatch):
    worker.replay(folder / "step-00000100")  # so that the limit below is not spent on the start
    monkeypatch.setattr(worker, "_timeout", 1.0)
    pid, ticks = worker.process.pid, []
    with pytest.raises(CheckpointError, match="took longer than 1 s"):
        worker.replay(folder / "step-00000400", tick=lambda: ticks.append(1))
    assert ticks
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_replay_is_given_up_when_the_daemon_stops(
    folder: Path, worker: ReplayWorker, monkeypatch: pytest.MonkeyPatch
):
    stop = threading.Event()
    monkeypatch.setattr(worker, "_stop", stop)
    worker.replay(folder / "step-00000100")
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Abandoned):
        worker.replay(folder / "step-00000400")
    assert worker.process is None


def test_a_model_that_cannot_be_built_is_said_before_any_checkpoint(folder: Path):
    worker = ReplayWorker(SubjectSettings("tests.monitor.tiny_model:nothing"), timeout=60)
    with pytest.raises(ModelError, match="has no 'nothing'"):
        worker.replay(folder / "step-00000100")
    assert worker.process is None


ORPHAN = """
import os, sys, time
from pathlib import Path
from rksp_monitor.replay import ReplayWorker
from rksp_monitor.subject import SubjectSettings
if __name__ == "__main__":
    settings = SubjectSettings("tests.monitor.tiny_model:build_scripted", samples=256, device="cpu")
    worker = ReplayWorker(settings, timeout=600, started=lambda subject: print(subject["pid"], flush=True))
    worker.replay(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_hanging_worker_does_not_outlive_a_killed_daemon(folder: Path, tmp_path: Path):
    script = tmp_path / "daemon.py"
    script.write_text(ORPHAN)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder / "step-00000400")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
