"""``rksp watch`` as a real process on a real folder, seen from outside: files, HTTP, signals, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save

from rksp_core import Limits, ProfileWriter
from rksp_core.control import ControlListener
from rksp_core.orders import Levers
from rksp_core.profile import WeightNorms
from tests.core.profiles import profile
from tests.monitor import tiny_model
from tests.waiting import until

ROOT = Path(__file__).parents[2]
MODEL = ("--model", "tests.monitor.tiny_model:build_scripted")
ALARM = {"loss": 9.0, "gradient_norm": 40.0}  # beside a loss of 2: the shipped rules call that critical
SETTINGS = {
    "RKSP_REPLAY__RETRY_DELAY": "0.1",
    "RKSP_REPLAY__SAMPLES": "256",
    "RKSP_REPLAY__SEQUENCES": "8",
    "RKSP_POLL_INTERVAL": "0.2",
}


class Watcher:
    """One process of ``rksp watch``."""

    def __init__(self, run: Path, *flags: str, folders: tuple[str, ...] | None = None, **env: str) -> None:
        self.run, self.port_file = run, run.parent / "port"
        self.port_file.unlink(missing_ok=True)
        self.log = (run.parent / "log").open("ab")
        fixed = ("--listen", "127.0.0.1:0", "--port-file", str(self.port_file))
        named = [str(run)] if folders is None else folders
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rksp_monitor", "watch", *named, *fixed, *flags],
            stderr=self.log,
            cwd=ROOT,
            env=os.environ | SETTINGS | {"OMP_NUM_THREADS": "1"} | env,
        )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.port_file.read_text().strip()}{path}", timeout=10) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        return float(lines[0].rpartition(" ")[2]) if lines else float("nan")

    def logged(self, event: str) -> list[dict]:
        lines = (self.run.parent / "log").read_text().splitlines()
        return [line for text in lines if (line := json.loads(text))["event"] == event]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.log.close()
        return code


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def start(run: Path) -> Iterator[Callable[..., Watcher]]:
    started: list[Watcher] = []

    def make(*flags: str, **env: str) -> Watcher:
        started.append(Watcher(run, *flags, **env))
        return started[-1]

    yield make
    for watcher in started:
        if watcher.process.poll() is None:
            watcher.process.kill()
            watcher.process.wait()
        watcher.log.close()


def healthy(run: Path, steps: range) -> None:
    writer = ProfileWriter(run, every=10)
    for step in steps:
        writer.write(profile(), step, loss=2.0, gradient_norm=1.0)


def rows(run: Path) -> dict[int, tuple[str, int]]:
    """Return {step: (status, attempts)} of the ledger."""
    address = f"file:{run / '.rksp' / 'run.sqlite3'}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
        return {step: tuple(rest) for step, *rest in database.execute("SELECT step, status, attempts FROM events")}


def once(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rksp_monitor", "watch", str(run), "--once", *flags]
    return subprocess.run(
        command, env=os.environ | SETTINGS, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_from_profiles_to_an_order_and_its_acknowledgement(run: Path, start):
    watcher = start("--enforce")
    until(lambda: watcher.get("/readyz"))
    assert watcher.get("/healthz") == "ok\n"
    healthy(run, range(10, 110, 10))
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 100)
    assert watcher.metric("rksp_risk_level") == 0
    assert not (run / "control" / "desired.json").exists()
    ProfileWriter(run, every=10).write(profile(), 110, **ALARM)
    until(lambda: watcher.metric("rksp_risk_level") == 3)
    trainer = ControlListener(run / "control", "run", Limits(learning_rate_scale=(0.01, 1.0)))
    order = trainer.poll(111)
    assert order is not None
    assert (order.generation, order.levers) == (1, Levers(learning_rate_scale=0.5))
    assert order.rollback_to == 70, "30 steps before the last event on which nothing fired"
    assert order.expires_at is None, "a watcher that dies does not give a run in trouble its full rate back"
    trainer.acknowledge(order, 111, rolled_back_to=70)
    until(lambda: watcher.metric("rksp_control_applied_generation") == 1)
    assert watcher.metric("rksp_kss_applied_weight") == 0
    assert watcher.end() == 0
    assert watcher.logged("stopped")[-1]["by"] == "SIGTERM"


def test_an_order_outside_the_trainers_limits_is_rejected_and_the_log_says_why(run: Path, start):
    settings = run.parent / "settings.yaml"
    settings.write_text("policy: {ladder: {3: {alpha: 0.15, learning_rate_scale: 2.0}}}")
    watcher = start("--enforce", "--config", str(settings))
    healthy(run, range(10, 110, 10))
    ProfileWriter(run, every=10).write(profile(), 110, **ALARM)
    until(lambda: (run / "control" / "desired.json").exists())
    assert ControlListener(run / "control", "run", Limits(learning_rate_scale=(0.1, 1))).poll(111) is None
    until(lambda: watcher.logged("answer"))
    answer = watcher.logged("answer")[0]
    assert (answer["level"], answer["status"], answer["generation"]) == ("warning", "rejected", 1)
    assert answer["message"] == (
        "the order asks for learning_rate_scale 2.0, this trainer allows 0.1 to 1 (limits.learning_rate_scale)"
    )
    assert watcher.metric("rksp_control_applied_generation") == 0
    assert watcher.end() == 0


@pytest.mark.slow
def test_checkpoints_of_every_kind_and_fate(run: Path, start):
    watcher = start(*MODEL, RKSP_REPLAY__ATTEMPTS="2")
    growing, content = run / "step-400.safetensors", save(tiny_model.weights(400))
    growing.write_bytes(content[:100])
    tiny_model.save_folder(run, 100)
    tiny_model.save_folder(run, 200, code=9.0)  # kills its worker
    tiny_model.save_folder(run, 300, width=8)  # of another model
    (run / "step-500.safetensors").write_bytes(b"\xff" * 64)  # a header of 2^64 - 1 bytes
    vanishing = run / "step-600.safetensors"
    vanishing.write_bytes(content[:100])
    (run / "step-700").mkdir()
    torch.save({"model": tiny_model.weights(700)}, run / "step-700" / "model.pt")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it is meant to be one process
        dcp.save({"model": tiny_model.weights(800)}, checkpoint_id=run / "checkpoint" / "step-800")
    until(lambda: len(rows(run)) == 8)
    for end in (1000, 4000, len(content)):
        growing.write_bytes(content[:end])
        time.sleep(0.1)
    vanishing.unlink()
    until(lambda: set(rows(run)) and not {"seen", "ready", "processing"} & {status for status, _ in rows(run).values()})
    assert rows(run) == {
        100: ("done", 1),
        200: ("failed", 2),
        300: ("failed", 2),
        400: ("done", 1),
        500: ("failed", 2),
        600: ("expired", 0),
        700: ("done", 1),
        800: ("done", 1),
    }
    assert watcher.metric("rksp_checkpoints_processed_total") == 4
    assert watcher.metric("rksp_checkpoints_failed_total") == 3
    assert watcher.metric("rksp_checkpoints_expired_total") == 1
    assert watcher.metric("rksp_replay_duration_seconds_count") == 4
    assert watcher.metric("rksp_replay_worker_restarts_total") >= 1
    assert watcher.end() == 0


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_was(run: Path, start):
    healthy(run, range(10, 110, 10))
    tiny_model.save_folder(run, 105, code=7.0)  # hangs
    first = start("--enforce", *MODEL)
    until(lambda: rows(run)[105][0] == "processing")
    first.end(signal.SIGKILL)
    shutil.rmtree(run / "checkpoints" / "step-00000105")
    ProfileWriter(run, every=10).write(profile(near_unit_mass=0.6), 110, **ALARM)
    second = start("--enforce", *MODEL)
    until(lambda: second.metric("rksp_control_desired_generation") == 1)
    assert second.metric("rksp_checkpoints_processed_total") == 1  # the ten before are not judged again
    assert second.metric("rksp_near_unit_mass_drift") == pytest.approx(-0.2)  # the baseline is that of step 10
    order = (run / "control" / "desired.json").read_bytes()
    second.end(signal.SIGKILL)
    third = start("--enforce", *MODEL)
    until(lambda: third.metric("rksp_risk_level") == 3)
    assert (run / "control" / "desired.json").read_bytes() == order
    assert third.end() == 0
    assert rows(run)[105] == ("expired", 1)


def test_sigterm_gives_a_replay_up_and_a_second_one_changes_nothing(run: Path, start):
    tiny_model.save_folder(run, 100, code=7.0)
    watcher = start(*MODEL)
    until(lambda: watcher.logged("replay worker started"))
    watcher.process.send_signal(signal.SIGTERM)
    assert watcher.end() == 0
    assert rows(run) == {100: ("ready", 0)}
    assert not (run / ".rksp" / "run.owner").exists()


def test_once_exits_by_what_it_saw(run: Path):
    empty = once(run)
    assert empty.returncode == 3
    assert empty.stdout == ""
    healthy(run, range(10, 110, 10))
    assert once(run, "--fail-on", "elevated").returncode == 0
    writer = ProfileWriter(run, every=10)
    for step, norm in ((110, 1.0), (120, 100.0)):  # the weights grow a hundred times: high, not critical
        writer.write(dataclasses.replace(profile(), weights=WeightNorms(1.0, norm)), step)
    assert once(run).returncode == 0
    assert once(run, "--fail-on", "high").returncode == 1
    assert once(run, "--fail-on", "critical").returncode == 0
    writer.write(profile(), 130, **ALARM)
    assert once(run, "--fail-on", "critical").returncode == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "nowhere:build"), "nowhere"),
        (("--probe", "no.safetensors"), "there is no probe"),
        (("--listen", "nowhere"), "host:port"),
        (("--config", "no.yaml"), "cannot read no.yaml"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run: Path, flags: tuple[str, ...], message: str):
    tiny_model.save_folder(run, 100)
    result = once(run, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("rksp: ")


def test_a_second_watcher_is_refused(run: Path, start):
    healthy(run, range(10, 20, 10))
    first = start("--enforce")
    until(lambda: first.metric("rksp_checkpoints_processed_total") == 1)
    second = once(run)
    assert second.returncode == 2
    assert f"already watched by process {first.process.pid}" in second.stderr
    elsewhere = once(run, "--enforce", "--state-dir", str(run.parent / "state"))
    assert elsewhere.returncode == 2
    assert f"gets its orders from process {first.process.pid}" in elsewhere.stderr


def test_a_folder_that_comes_later_is_waited_for(run: Path, start):
    run.rmdir()
    watcher = start("--until-step", "20")
    until(lambda: watcher.get("/readyz"))
    run.mkdir()
    healthy(run, range(10, 30, 10))
    assert watcher.process.wait(60) == 0


def test_a_time_limit_without_anything_judged_is_inconclusive(run: Path, start):
    assert start("--timeout", "1").process.wait(60) == 3


def test_sighup_reloads_the_settings_and_refuses_bad_ones(run: Path, start):
    settings = run.parent / "settings.yaml"
    settings.write_text("policy: {raise_after: 99}")
    healthy(run, range(10, 110, 10))
    watcher = start("--config", str(settings))
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 100)
    settings.write_text("policy: {raise_aftr: 1}")
    watcher.process.send_signal(signal.SIGHUP)
    until(lambda: watcher.logged("settings not reloaded"))
    assert "did you mean 'policy.raise_after'" in watcher.logged("settings not reloaded")[0]["problem"]
    settings.write_text("policy: {raise_after: 1}\nhints: false")
    watcher.process.send_signal(signal.SIGHUP)
    until(lambda: watcher.logged("settings reloaded"))
    assert watcher.logged("these settings take effect at the next start")[0]["settings"] == ["hints"]
    ProfileWriter(run, every=10).write(profile(), 110, **ALARM)
    until(lambda: watcher.metric("rksp_risk_level") == 3)
    assert watcher.end() == 0


def test_a_service_manager_is_told(run: Path, start):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        address = run.parent / "notify"
        channel.bind(str(address))
        channel.settimeout(60)
        watcher = start(NOTIFY_SOCKET=str(address))
        assert channel.recv(100) == b"READY=1"
        heard = {channel.recv(200) for _ in range(3)}
        assert b"WATCHDOG=1" in heard
        watcher.process.send_signal(signal.SIGTERM)
        while channel.recv(200) != b"STOPPING=1":
            pass
        assert watcher.process.wait(60) == 0


def test_a_folder_that_the_trainer_has_just_made_is_not_yet_a_run_without_a_model(
    run: Path, start: Callable[..., Watcher]
):
    watcher = start("--run-id", "named")
    time.sleep(1.5)  # several looks at the empty folder
    (run / "config.yaml").write_text("model: {factory: 'tests.monitor.tiny_model:build_scripted'}")
    tiny_model.save_folder(run, 5)
    until(lambda: rows_of(run, "named").get(5) == "done")
    assert watcher.end() == 0


def test_a_hugging_face_run_is_built_from_its_checkpoints_own_configuration(run: Path, start: Callable[..., Watcher]):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    healthy(run, range(10, 30, 10))  # so that the watch begins before there is a checkpoint
    watcher = start()
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 20)

    def save(step: int) -> None:
        staging = run / f"tmp-checkpoint-{step}"
        model.save_pretrained(staging)
        (staging / "trainer_state.json").write_text("{}")
        staging.rename(run / f"checkpoint-{step}")

    save(30)
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 30)
    assert 'model="' + str(run / "checkpoint-30" / "config.json") in watcher.get("/metrics")
    os.kill(watcher.logged("replay worker started")[0]["pid"], signal.SIGKILL)
    save(40)
    shutil.rmtree(run / "checkpoint-30")  # as a retention policy does; the next worker must build the model again
    until(lambda: watcher.metric("rksp_checkpoint_last_processed_step") == 40)
    assert watcher.end() == 0


def rows_of(run: Path, name: str) -> dict[int, str]:
    address = f"file:{run / '.rksp' / f'{name}.sqlite3'}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
        return dict(database.execute("SELECT step, status FROM events"))
