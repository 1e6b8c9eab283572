"""``rksp control``: what a person asks for lies in a file, and what is said of it is true."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from rksp_core.control import ControlListener, ControlWriter
from rksp_core.orders import Levers, Reason, timestamp
from rksp_core.policy import Hold
from rksp_monitor.cli import run
from rksp_monitor.commands.control import duration
from rksp_monitor.hold import read_hold
from rksp_monitor.ledger import open_ledger
from rksp_monitor.orders import sole_orderer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a trainer that has limits, and a ledger whose watcher is gone."""
    made = tmp_path / "run"
    made.mkdir()
    limits = {"alpha": [0.0, 1.0], "clip": None, "learning_rate_scale": [0.1, 1.0], "surprise": [0.5, 10.0]}
    (made / "config.yaml").write_text(yaml.safe_dump({"run_id": "seven", "control": {"limits": limits}}))
    with open_ledger(made / ".rksp" / "seven.sqlite3", "seven"):
        pass
    return made


def hold_of(folder: Path) -> Hold | None:
    return read_hold(folder / ".rksp" / "seven.hold.json", time.time())


def control(*argv: object, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert run(["control", *map(str, argv)]) == code
    said = capsys.readouterr()
    return said.out, said.err


def status(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(control("status", folder, "--format", "json", capsys=capsys)[0])


class TestHold:
    """A hold is a file; it is replaced, runs out, and is released."""

    def test_the_policy_is_held_until_it_is_released(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        out, err = control("hold", folder, "--reason", "a look at the data", capsys=capsys)
        assert "run seven is held: the policy gives no orders, until it is released; by " in out
        assert err == "rksp: no watcher runs, so nothing will happen until one does\n"
        held = hold_of(folder)
        assert (held.levers, held.until, held.reason) == (None, None, "a look at the data")
        assert held.by
        assert "the policy's again" in control("release", folder, capsys=capsys)[0]
        assert hold_of(folder) is None
        assert "was not held" in control("release", folder, capsys=capsys)[0]

    def test_it_may_end_by_itself(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        control("hold", folder, "--reason", "r", "--for", "2h", capsys=capsys)
        assert hold_of(folder).until - time.time() == pytest.approx(7200, abs=60)
        control("hold", folder, "--reason", "r", "--until", "2100-01-01T00:00", capsys=capsys)
        assert timestamp(hold_of(folder).until) == "2100-01-01T00:00:00.000Z"
        control("hold", folder, "--reason", "r", "--until", "2100-01-01T00:00+02:00", capsys=capsys)
        assert timestamp(hold_of(folder).until) == "2099-12-31T22:00:00.000Z"

    def test_a_person_orders_in_the_policys_place(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        flags = ["--alpha", "0.2", "--interval", "5", "--layer-fraction", "1", "--gamma", "0.3", "--variant", "hinge"]
        beside = ["--learning-rate-scale", "0.5", "--surprise", "2", "--reason", "r"]
        out, err = control("set", folder, *flags, *beside, capsys=capsys)
        assert hold_of(folder).levers == Levers(0.2, 5, 1.0, 0.3, "hinge", learning_rate_scale=0.5, surprise=2.0)
        assert "ordered is KSS 0.2 (every 5 steps on 1 of the layers, gamma 0.3, hinge), " in out
        assert "learning-rate scale 0.5, surprise 2, until" in out
        assert "reject" not in err

    def test_a_person_may_send_the_trainer_back(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        flags = ["--alpha", "0", "--learning-rate-scale", "0.5", "--rollback-to", "300", "--reason", "r"]
        out = control("set", folder, *flags, capsys=capsys)[0]
        assert hold_of(folder).rollback_to == 300
        assert "learning-rate scale 0.5, back to the checkpoint at or before step 300, until it is released" in out
        trainer = yaml.safe_load((folder / "config.yaml").read_text())
        trainer["control"]["limits"]["rollbacks"] = 0
        (folder / "config.yaml").write_text(yaml.safe_dump(trainer))
        err = control("set", folder, *flags, capsys=capsys, code=2)[1]
        assert "the order asks to go back, this trainer never does (limits.rollbacks)" in err

    def test_what_is_left_out_is_the_trainers_own(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        assert (
            "KSS off, and all else the trainer's own"
            in control("set", folder, "--alpha", "0", "--reason", "r", capsys=capsys)[0]
        )
        assert hold_of(folder).levers.idle

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--alpha", "3"], "the order asks for kss.alpha 3.0, this trainer allows 0 to 1 (limits.alpha)"),
            (
                ["--alpha", "0", "--clip", "1"],
                "the order asks for clip 1.0, this trainer has no such lever; its limits.clip must allow it",
            ),
            (
                ["--alpha", "0", "--surprise", "0.1"],
                "the order asks for surprise 0.1, this trainer allows 0.5 to 10 (limits.surprise)",
            ),
        ],
    )
    def test_what_the_trainer_would_reject_is_refused(
        self, folder: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
    ):
        control("set", folder, "--alpha", "0.5", "--reason", "before", capsys=capsys)
        err = control("set", folder, *flags, "--reason", "r", capsys=capsys, code=2)[1]
        assert err == f"rksp: nothing is ordered, as the trainer would reject it: {says}\n"
        assert hold_of(folder).reason == "before"

    def test_a_damaged_one_can_be_replaced_and_released(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        path = folder / ".rksp" / "seven.hold.json"
        path.write_text("{")
        assert "is no JSON" in control("status", folder, capsys=capsys, code=2)[1]
        control("hold", folder, "--reason", "r", capsys=capsys)
        path.write_text("{")
        assert "the policy's again" in control("release", folder, capsys=capsys)[0]


MISTAKES = {
    "no folder": (["hold", "{tmp}/nowhere", "--reason", "r"], "there is no run folder {tmp}/nowhere"),
    "no reason": (["hold", "{run}"], "Missing option '--reason'"),
    "an empty reason": (["hold", "{run}", "--reason", " "], "--reason is empty"),
    "no alpha": (["set", "{run}", "--reason", "r"], "Missing option '--alpha'"),
    "a negative weight": (
        ["set", "{run}", "--reason", "r", "--alpha", "-1"],
        "kss.alpha must be a number of at least 0, got -1.0",
    ),
    "no number": (["set", "{run}", "--reason", "r", "--alpha", "nan"], "kss.alpha must be a number of at least 0"),
    "no share": (
        ["set", "{run}", "--reason", "r", "--alpha", "1", "--layer-fraction", "0"],
        "kss.layer_fraction must be a number in (0, 1], got 0.0",
    ),
    "no surprise": (["set", "{run}", "--reason", "r", "--alpha", "1", "--surprise", "-1"], "surprise must be a number"),
    "no norm": (["set", "{run}", "--reason", "r", "--alpha", "1", "--clip", "0"], "clip must be a number above 0"),
    "no length": (["hold", "{run}", "--reason", "r", "--for", "2 weeks"], "such as 90s or 2h, got '2 weeks'"),
    "both": (["hold", "{run}", "--reason", "r", "--for", "2h", "--until", "2100-01-01"], "give one of them"),
    "no moment": (["hold", "{run}", "--reason", "r", "--until", "tomorrow"], "--until takes a moment"),
    "over": (["hold", "{run}", "--reason", "r", "--until", "2020-01-01"], "--until must lie ahead, got 2020-01-01"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_holds_nothing(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv, message = MISTAKES[name]
    err = control(*(word.format(tmp=tmp_path, run=folder) for word in argv), capsys=capsys, code=2)[1]
    assert message.format(tmp=tmp_path) in err
    assert err.count("\n") == 1
    assert hold_of(folder) is None
    assert not (tmp_path / "nowhere").exists()


def test_lengths_of_time():
    assert [duration(text) for text in ("90s", "30m", "2h", "1d", "1.5h")] == [90, 1800, 7200, 86400, 5400]


class TestStatus:
    """How things stand, from the files of a watcher, a trainer and a person."""

    def test_nothing_has_happened_yet(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        document = status(folder, capsys)
        assert document["schema"] == "rksp.standing/1"
        assert (document["run"], document["level"], document["order"], document["generation_gap"]) == (
            "seven",
            *[None] * 2,
            0,
        )
        lines = control("status", folder, capsys=capsys)[0]
        assert "level     unknown: nothing was judged yet" in lines
        assert "answer    the trainer has not said anything" in lines

    def test_the_watcher_is_looked_up(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        owner = folder / ".rksp" / "seven.owner"
        here, gone = socket.gethostname(), _pid_of_nobody()
        for text, alive, words in (
            (f"process {os.getpid()} on {here}", True, f"process {os.getpid()} on {here}, only observes"),
            (f"process {gone} on {here}", False, "which runs no more"),
            ("process 1 on elsewhere", None, "which cannot be looked up from here"),
        ):
            owner.write_text(text)
            assert status(folder, capsys)["watcher"] == {"owner": text, "alive": alive, "enforces": False}
            assert words in control("status", folder, capsys=capsys)[0]

    def test_a_watcher_that_only_observes_is_said(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        (folder / ".rksp" / "seven.owner").write_text(f"process {os.getpid()} on {socket.gethostname()}")
        err = control("hold", folder, "--reason", "r", capsys=capsys)[1]
        assert err == "rksp: the watcher only observes, so the trainer will not be told; start it with --enforce\n"
        settings = folder.parent / "watch.yaml"
        settings.write_text("enforce: true\n")
        assert control("hold", folder, "--reason", "r", "--config", settings, capsys=capsys)[1] == ""

    @pytest.mark.parametrize("asked", [["status"], ["release"], ["hold", "--reason", "r"]], ids=lambda asked: asked[0])
    def test_a_run_whose_watcher_keeps_its_ledger_elsewhere_is_said(
        self, asked: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
    ):
        other = folder.parent / "other"
        err = control(asked[0], folder, *asked[1:], "--state-dir", other, capsys=capsys, code=2)[1]
        assert f"there is no ledger {other}/seven-" in err
        assert "say where its watcher keeps it with --state-dir" in err
        assert err.count("\n") == 1
        assert not other.exists()

    def test_a_run_may_be_held_before_its_first_watcher_where_that_will_look(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ):
        (other := folder.parent / "other").mkdir()
        err = control("hold", folder, "--reason", "r", "--state-dir", other, capsys=capsys)[1]
        assert "no watcher has kept a ledger in" in err
        assert len(list(other.glob("*.hold.json"))) == 1

    def test_a_watcher_that_orders_from_another_ledger_is_seen(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        (writer := ControlWriter(folder / "control")).make_folder()
        with sole_orderer(writer):
            me = f"process {os.getpid()} on {socket.gethostname()}"
            assert status(folder, capsys)["other_watcher"] == me
            assert f"orders    come from {me}, a watcher that keeps" in control("status", folder, capsys=capsys)[0]
            err = control("hold", folder, "--reason", "r", capsys=capsys)[1]
            assert f"another watcher, {me}, gives this trainer its orders" in err
            (folder / ".rksp" / "seven.owner").write_text(me)
            assert status(folder, capsys)["other_watcher"] is None, "it is this one"
        assert status(folder, capsys)["other_watcher"] is None

    def test_an_order_and_its_answer(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        writer = ControlWriter(folder / "control")
        order = writer.prepare("seven", Levers(alpha=0.15, clip=1.0, surprise=2.0), Reason(2, 100), expires_in=3600.0)
        with open_ledger(folder / ".rksp" / "seven.sqlite3", "seven") as ledger:
            ledger.store({"order": order.to_dict()})
        assert status(folder, capsys)["delivered"] is False
        assert "the control folder has not got it yet" in control("status", folder, capsys=capsys)[0]
        writer.write(order)
        document = status(folder, capsys)
        assert (document["delivered"], document["answered"], document["generation_gap"]) == (True, False, 1)
        ControlListener(folder / "control", "seven").poll(120)  # this trainer lets no order set a clip threshold
        document = status(folder, capsys)
        assert (document["answered"], document["generation_gap"]) == (True, 1)
        assert document["acknowledgement"]["status"] == "rejected"
        told = control("status", folder, capsys=capsys)[0]
        assert "answer    rejected 1 at step 120" in told
        assert "ago: KSS 0.15 (every 10 steps on 0.5 of the layers, gamma 0.4), clip 1, surprise 2" in told
        writer.issue("seven", Levers(alpha=0.2), Reason(2, 200))
        listener = ControlListener(folder / "control", "seven")
        listener.acknowledge(listener.poll(130), 130, message="\x1b[2J no terminal's\nbusiness")
        assert r"(\x1b[2J no terminal's\nbusiness)" in control("status", folder, capsys=capsys)[0]
        document = status(folder, capsys)
        assert (document["order"]["generation"], document["generation_gap"], document["answered"]) == (2, 0, True)
        assert "in force is 2: KSS 0.2" in control("status", folder, capsys=capsys)[0]

    def test_another_runs_trainer_answers_for_itself_alone(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        ControlWriter(folder / "control").issue("seven", Levers(alpha=0.2), Reason())
        ControlListener(folder / "control", "eight").poll(1)
        assert status(folder, capsys)["answered"] is False
        assert "by the trainer of 'eight', which is another run" in control("status", folder, capsys=capsys)[0]

    def test_a_hold_is_shown_until_it_runs_out(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        control("set", folder, "--alpha", "0.1", "--reason", "r", "--for", "1h", capsys=capsys)
        document = status(folder, capsys)
        assert document["hold"]["levers"]["kss"]["alpha"] == 0.1
        assert document["hold"]["until"].endswith("Z")
        path = folder / ".rksp" / "seven.hold.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"until": 1.0}))
        assert status(folder, capsys)["hold"] is None

    def test_the_files_are_left_as_they_were(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        control("status", folder, capsys=capsys)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def _pid_of_nobody() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid
