"""The file in which a person holds the policy back: written whole, read by the watcher, damaged in every way."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from rksp_core.errors import ControlError
from rksp_core.orders import Levers
from rksp_core.policy import Hold
from rksp_monitor.hold import held_since, hold_file, read_hold, remove_hold, write_hold

HOLD = Hold(Levers(alpha=0.1, clip=1.0), until=200.0, by="ann", reason="maintenance")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return hold_file(tmp_path / ".rksp" / "run.7.sqlite3")


def test_it_lies_beside_the_ledger_and_only_its_owner_reads_it(path: Path):
    write_hold(path, HOLD, since=100.0)
    assert path.name == "run.7.hold.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["schema"] == "rksp.hold/1"


@pytest.mark.parametrize("hold", [HOLD, Hold(None, None, "", "")])
def test_what_is_written_is_read_again(path: Path, hold: Hold):
    write_hold(path, hold, since=100.0)
    assert read_hold(path, 150.0) == hold
    assert held_since(path) == 100.0


def test_it_runs_out_by_itself(path: Path):
    write_hold(path, HOLD, since=100.0)
    assert [read_hold(path, now) is not None for now in (0.0, 199.9, 200.0)] == [True, True, False]
    write_hold(path, Hold(), since=100.0)
    assert read_hold(path, 1e12) == Hold()


def test_none_is_none_and_can_be_removed_once(path: Path):
    assert read_hold(path, 0.0) is None
    assert held_since(path) is None
    assert not remove_hold(path)
    write_hold(path, HOLD, since=100.0)
    assert remove_hold(path)
    assert read_hold(path, 150.0) is None


DAMAGE = {
    "{": "is no JSON",
    "[" * 100_000: "is no JSON",
    "\xff": "is no JSON",
    "3": "a hold has schema 'rksp.hold/1'",
    '{"schema": "rksp.hold/2"}': "has 'rksp.hold/2'",
    '{"schema": "rksp.hold/1"}': "is no hold",
    '{"schema": "rksp.hold/1", "levers": null, "until": "soon", "by": "", "reason": ""}': "until must be a number",
    '{"schema": "rksp.hold/1", "levers": {"kss": {"alpha": -1}}, "until": null, "by": "", "reason": ""}': "got -1",
    '{"schema": "rksp.hold/1", "levers": {"kss": {"alpho": 1}}, "until": null, "by": "", "reason": ""}': "'alpho'",
    '{"schema": "rksp.hold/1", "levers": 7, "until": null, "by": "", "reason": ""}': "is no hold",
}


@pytest.mark.parametrize("text", DAMAGE, ids=list(range(len(DAMAGE))))
def test_a_damaged_one_is_one_sentence_and_can_be_ended(path: Path, text: str):
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ControlError) as caught:
        read_hold(path, 0.0)
    assert DAMAGE[text] in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert remove_hold(path)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / ".rksp").write_text("a file in its place")
    with pytest.raises(ControlError, match="cannot be written"):
        write_hold(tmp_path / ".rksp" / "run.hold.json", HOLD, since=0.0)
    assert read_hold(tmp_path / ".rksp" / "run.hold.json", 0.0) is None


def test_what_is_no_file_is_one_sentence(path: Path):
    path.mkdir(parents=True)
    with pytest.raises(ControlError, match="cannot be read"):
        read_hold(path, 0.0)
    with pytest.raises(ControlError, match="cannot be removed"):
        remove_hold(path)
