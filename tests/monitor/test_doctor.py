"""``rksp doctor``: what would stop a watcher is one FAIL line with the next step, and nothing is left behind."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry

from rksp_monitor.cli import run
from rksp_monitor.discovery import Sighting
from rksp_monitor.endpoint import serve
from rksp_monitor.ledger import open_ledger
from rksp_monitor.ownership import owned
from tests.monitor import tiny_model
from tests.monitor.certificates import make_certificate

MODEL = "tests.monitor.tiny_model:build"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with two good checkpoints, one unfinished, and a control folder."""
    made = tmp_path / "runs" / "one"
    for step in (100, 200):
        tiny_model.save_folder(made, step)
    (made / "checkpoints" / "step-00000300").mkdir()
    (made / "checkpoints" / "step-00000300" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (made / "control").mkdir()
    return made


def settings(tmp_path: Path, **values: object) -> Path:
    path = tmp_path / "watch.yaml"
    replay = {"samples": 64, "sequences": 4, "length": 8}
    document = {"model": MODEL, "device": "cpu", "listen": "127.0.0.1:0", "replay": replay} | values
    path.write_text(yaml.safe_dump(document))
    return path


def doctor(*argv: object, capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert run(["doctor", *map(str, argv)]) == code
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_a_good_run_is_ok_from_its_folder_to_its_trainer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(folder.rglob("*"))
    out = doctor(folder, "--config", settings(tmp_path), "--deep", capsys=capsys, code=0)
    for line in (
        "ok    3 checkpoints and profiles, steps 100 to 300 (3 folder)",
        "--    step 300: ",
        "ok    newest checkpoint: step 200, folder, complete",
        f"ok    model {MODEL} builds: ",
        "ok    probe of seeded random tokens fits it: sha256 ",
        "ok    the weights of step-00000200 fit it",
        f"ok    control folder {folder / 'control'}: written, read and removed with mode 0600",
        "ok    no hold: the policy orders",
    ):
        assert line in out
    assert "FAIL" not in out
    assert "ok    observes: it logs what it would order, and orders nothing; backlog: all, 0 waiting" in out
    good, notes = (sum(line.startswith(mark) for line in out.splitlines()) for mark in ("ok ", "-- "))
    assert out.endswith(f"\n\n{good} ok, {notes} to know (--), 0 wrong\n")
    assert sorted(folder.rglob("*")) == before


def test_without_deep_no_weights_are_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "the weights of" not in doctor(folder, "--config", settings(tmp_path), capsys=capsys, code=0)


def test_all_runs_of_the_settings_are_checked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_model.save_folder(folder.parent / "two", 7)
    path = settings(tmp_path, runs=[{"folder": f"{folder.parent}/*"}])
    out = doctor("--config", path, capsys=capsys, code=0)
    assert "run 'one' in" in out
    assert "\n\n--    run 'two' in" in out or "\n\nok    run 'two' in" in out, "a blank line before each run"
    assert "control folder" in out.partition("run 'two'")[2]
    path = settings(tmp_path, runs=[{"folder": f"{tmp_path}/none/*"}])
    assert "find no folder yet" in doctor("--config", path, capsys=capsys, code=0)


TROUBLE = {
    "a model that is not there": ({"model": "nowhere:build"}, "FAIL  model: "),
    "a model of other weights": ({"arguments": {"width": 8}}, "does not fit the model"),
    "a probe that does not fit": ({"probe": "{tmp}/p.safetensors"}, "FAIL  probe: "),
    "a device that is not here": ({"device": "cuda:99"}, "FAIL  model: "),
    "a web configuration with a typo": ({"web_config": "{tmp}/web.yaml"}, "did you mean"),
    "a secret that is not there": (
        {"webhooks": [{"url": "https://example.org/hook/of-a-chat", "secret_file": "{tmp}/none"}]},
        "cannot read the secret of the webhook https://example.org",
    ),
    "a command that is not there": ({"hooks": [{"command": ["no-such-program"]}]}, "FAIL  command no-such-program"),
    "a reference without history": ({"reference": "{tmp}/healthy"}, "there is no ledger"),
    "a key that is unknown": ({"polcy": {}}, "unknown key 'polcy'; did you mean 'policy'"),
    "a control folder that is a file": ({"enforce": True, "control": {"folder": "{tmp}/web.yaml/c"}}, "cannot be made"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_each_trouble_is_one_line(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["probe", "make", str(tmp_path / "p.safetensors"), "--vocabulary", "5000", "--sequences", "2"]) == 0
    capsys.readouterr()
    (tmp_path / "web.yaml").write_text("basic_auth_usrs: {}\n")
    values, says = TROUBLE[name]
    path = settings(tmp_path, **json.loads(json.dumps(values).replace("{tmp}", str(tmp_path))))
    out = doctor(folder, "--config", path, "--deep", capsys=capsys, code=2)
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1, failed
    assert says in failed[0]
    assert "of-a-chat" not in out


def test_a_damaged_hold_a_watcher_and_a_taken_address_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ledger = folder / ".rksp" / "one.sqlite3"
    with open_ledger(ledger, "one"), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (folder / ".rksp" / "one.hold.json").write_text("{")
        out = doctor(folder, "--config", settings(tmp_path), "--listen", address, capsys=capsys, code=2)
    assert f"FAIL  {address} is not free" in out
    assert "one.hold.json is no JSON" in out
    (folder / ".rksp" / "one.hold.json").unlink()
    with open_ledger(ledger, "one"):
        out = doctor(folder, "--config", settings(tmp_path), capsys=capsys, code=0)
    assert f"--    already watched by process {os.getpid()} on " in out
    (folder / "control").mkdir(exist_ok=True)
    with owned(folder / "control" / "watcher"):  # of a watcher with another state folder
        out = doctor(folder, "--config", settings(tmp_path), capsys=capsys, code=0)
    assert f"control gets its orders from process {os.getpid()} on " in " ".join(out.split())


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_beside_a_running_watcher_its_address_is_no_trouble(
    encrypted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    web = None
    if encrypted:
        web = tmp_path / "web.yaml"
        make_certificate(tmp_path, "server")
        web.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}\n")
    answers = {"healthy": lambda: False, "ready": lambda: False}
    with serve("127.0.0.1:0", CollectorRegistry(), **answers, web_config=web) as address:
        out = doctor("--listen", address, capsys=capsys, code=0)
    assert f"--    {address} is in use by a watcher that answers" in out


def test_what_failed_was_skipped_or_waits_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with open_ledger(folder / ".rksp" / "one.sqlite3", "one") as ledger:
        for step, status in ((10, "failed"), (20, "failed"), (30, "skipped"), (40, "ready")):
            ledger.record(Sighting(folder / f"step-{step}", "folder", "checkpoint", step, "f", True))
            event = ledger.next_ready("checkpoint")
            if status != "ready":
                ledger.claim(event)
                ledger.close_event(event, status, f"reason {step}")
    path = settings(tmp_path, enforce=True, backlog={"every": 500})
    out = doctor(folder, "--config", path, capsys=capsys, code=0)
    assert "ok    enforces: it writes orders; backlog: every 500 steps, 1 waiting" in out
    assert "--    2 events failed, the last is checkpoint 20: reason 20" in out
    assert "--    1 event skipped, the last is checkpoint 30: reason 30" in out


def test_a_folder_that_is_not_there_and_a_run_that_is_only_observed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = doctor(tmp_path / "nowhere", "--config", settings(tmp_path), capsys=capsys, code=2)
    assert f"FAIL  there is no run folder {tmp_path / 'nowhere'}" in out
    (tmp_path / "file").touch()
    path = settings(tmp_path, control={"folder": str(tmp_path / "file" / "c")})
    assert "(only needed with --enforce)" in doctor(folder, "--config", path, capsys=capsys, code=0)
