"""Both ends of the control folder, with a clock that the test moves."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.control import ControlListener, ControlWriter
from rksp_core.errors import ControlError
from rksp_core.orders import Acknowledgement, Desired, KSSSettings, Reason

ON = KSSSettings(alpha=0.15)


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def writer(tmp_path: Path, clock: Clock) -> ControlWriter:
    return ControlWriter(tmp_path / "control", clock=clock)


@pytest.fixture
def listener(tmp_path: Path, clock: Clock) -> ControlListener:
    return ControlListener(tmp_path / "control", "run", clock=clock)


def answer(folder: Path) -> dict:
    return json.loads((folder / "applied.json").read_text())


def test_an_order_is_applied_once_and_acknowledged(writer: ControlWriter, listener: ControlListener):
    assert listener.poll(0) is None
    sent = writer.issue("run", ON, Reason(2, 100, "near_unit_mass_min", 0.6, 0.8, 0.0475))
    got = listener.poll(1)
    assert got == sent
    assert listener.poll(2) is None
    listener.acknowledge(got, 2)
    acknowledged = writer.applied()
    assert acknowledged is not None
    assert (acknowledged.status, acknowledged.step) == ("applied", 2)
    assert (acknowledged.active_generation, acknowledged.active_kss) == (1, ON)


def test_files_have_the_documented_form_and_only_the_owner_reads_them(writer: ControlWriter, listener: ControlListener):
    writer.issue("run", ON, Reason(2), expires_in=60)
    listener.acknowledge(listener.poll(1), 1)
    desired = json.loads((writer.folder / "desired.json").read_text())
    assert set(desired) == {"schema", "run_id", "generation", "issued_at", "expires_at", "kss", "reason"}
    assert desired["schema"] == "rksp.control/1"
    assert desired["kss"] == {"alpha": 0.15, "interval": 10, "layer_fraction": 0.5, "gamma": 0.4}
    assert desired["issued_at"] == "2023-11-14T22:13:20.000Z"
    assert desired["expires_at"] == "2023-11-14T22:14:20.000Z"
    assert set(answer(writer.folder)) == {"schema", "run_id", "generation", "step", "at", "status", "message", "active"}
    for name in ("desired.json", "applied.json"):
        assert stat.S_IMODE((writer.folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(writer.folder.stat().st_mode) == 0o700


@given(known=st.integers(0, 50), desired=st.integers(1, 50), applied=st.integers(0, 50))
def test_a_generation_exceeds_the_ledgers_and_both_files(tmp_path_factory, known: int, desired: int, applied: int):
    writer = ControlWriter(tmp_path_factory.mktemp("control"))
    writer.write(Desired("run", desired, ON))
    document = Acknowledgement("run", applied, 1, "", "applied", "", applied, ON).to_dict()
    (writer.folder / "applied.json").write_text(json.dumps(document))
    assert writer.prepare("run", ON, Reason(), known=known).generation == max(known, desired, applied) + 1


def test_preparing_writes_nothing(writer: ControlWriter):
    order = writer.prepare("run", ON, Reason())
    assert writer.desired_generation() == 0
    writer.write(order)
    assert writer.desired_generation() == 1


def test_an_order_for_another_run_is_ignored_and_what_held_goes_on(writer: ControlWriter, listener: ControlListener):
    listener.acknowledge(writer.issue("run", ON, Reason()), 1)
    writer.issue("other", KSSSettings(alpha=0.9), Reason())
    assert listener.poll(2) is None
    document = answer(writer.folder)
    assert document["status"] == "ignored"
    assert "'other'" in document["message"]
    assert document["active"] == {"generation": 1, "kss": {**document["active"]["kss"], "alpha": 0.15}}


def test_an_older_generation_is_ignored(writer: ControlWriter, listener: ControlListener):
    writer.write(Desired("run", 5, ON))
    listener.acknowledge(listener.poll(1), 1)
    writer.write(Desired("run", 4, KSSSettings(alpha=0.9)))
    assert listener.poll(2) is None
    assert answer(writer.folder)["status"] == "ignored"
    assert listener.active == (5, ON)


def test_an_order_expires_by_itself(writer: ControlWriter, listener: ControlListener, clock: Clock):
    writer.issue("run", ON, Reason(), expires_in=60)
    listener.acknowledge(listener.poll(1), 1)
    clock.now += 59.9
    assert listener.poll(2) is None
    clock.now += 0.2
    ended = listener.poll(3)
    assert ended is not None
    assert ended.expired
    assert ended.kss.alpha == 0.0
    listener.acknowledge(ended, 3)
    assert answer(writer.folder)["status"] == "expired"
    assert listener.poll(4) is None


def test_an_order_that_arrives_expired_means_off(writer: ControlWriter, listener: ControlListener, clock: Clock):
    writer.issue("run", ON, Reason(), expires_in=60)
    clock.now += 61
    order = listener.poll(1)
    assert order is not None
    assert order.expired
    assert order.kss.alpha == 0.0


def test_a_restarted_trainer_applies_the_order_that_held_and_none_before_it(tmp_path: Path, writer: ControlWriter):
    first = ControlListener(writer.folder, "run")
    writer.issue("run", ON, Reason())
    first.acknowledge(first.poll(1), 1)
    again = ControlListener(writer.folder, "run")
    order = again.poll(2)
    assert order is not None
    assert order.kss == ON


BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "another schema": '{"schema": "rksp.control/9"}',
    "no kss": '{"schema": "rksp.control/1", "run_id": "run", "generation": 1}',
    "negative": '{"schema": "rksp.control/1", "run_id": "run", "generation": 1, "kss": {"alpha": -1}}',
    "not a number": '{"schema": "rksp.control/1", "run_id": "run", "generation": 1, "kss": {"alpha": NaN}}',
    "true": '{"schema": "rksp.control/1", "run_id": "run", "generation": true, "kss": {"alpha": 1}}',
    "unknown setting": '{"schema": "rksp.control/1", "run_id": "run", "generation": 1, "kss": {"alfa": 1}}',
    "bad time": '{"schema": "rksp.control/1", "run_id": "run", "generation": 1, "kss": {}, "expires_at": "soon"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_an_order_that_cannot_be_read_is_rejected_with_a_sentence(
    writer: ControlWriter, listener: ControlListener, text: str
):
    listener.acknowledge(writer.issue("run", ON, Reason()), 1)
    (writer.folder / "desired.json").write_text(text)
    assert listener.poll(2) is None
    document = answer(writer.folder)
    assert document["status"] == "rejected"
    assert document["message"]
    assert document["active"]["generation"] == 1


def test_an_order_replaced_while_it_is_read_is_taken_once(
    writer: ControlWriter, listener: ControlListener, monkeypatch: pytest.MonkeyPatch
):
    """The poll sees the first file's times and the second one's content."""
    writer.issue("run", KSSSettings(alpha=0.1), Reason())
    stat_of = os.stat

    def then_replaced(path: str) -> os.stat_result:
        found = stat_of(path)
        monkeypatch.undo()
        writer.issue("run", ON, Reason())
        return found

    monkeypatch.setattr(os, "stat", then_replaced)
    order = listener.poll(1)
    assert order is not None
    assert (order.generation, order.kss) == (2, ON)
    listener.acknowledge(order, 1)
    assert listener.poll(2) is None
    assert answer(writer.folder)["status"] == "applied"


def test_an_order_that_may_not_be_read_is_rejected_by_its_cause(listener: ControlListener):
    (listener.folder / "desired.json").mkdir(parents=True)
    assert listener.poll(1) is None
    document = answer(listener.folder)
    assert document["status"] == "rejected"
    assert "Is a directory" in document["message"]
    (listener.folder / "applied.json").unlink()
    assert listener.poll(2) is None
    assert not (listener.folder / "applied.json").exists()  # answered once, not at every step


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "rksp.control.ack/1"}'])
def test_an_acknowledgement_that_cannot_be_read_is_none(writer: ControlWriter, text: str):
    writer.issue("run", ON, Reason())
    (writer.folder / "applied.json").write_text(text)
    assert writer.applied() is None


def test_an_acknowledgement_with_words_for_numbers_is_none(writer: ControlWriter):
    writer.issue("run", ON, Reason())
    document = Acknowledgement("run", 1, 1, "", "applied", "", 1, ON).to_dict() | {"generation": "one"}
    (writer.folder / "applied.json").write_text(json.dumps(document))
    assert writer.applied() is None


def test_a_control_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ControlError, match="cannot write an order to"):
        ControlWriter(tmp_path / "file" / "control").issue("run", ON, Reason())


@pytest.mark.parametrize(
    "settings", [{"alpha": -0.1}, {"alpha": "1"}, {"interval": 0}, {"layer_fraction": 0.0}, {"gamma": 1.5}]
)
def test_settings_out_of_range_are_refused(settings: dict):
    with pytest.raises(ControlError, match=f"kss.{next(iter(settings))} must be"):
        KSSSettings(**settings)


@pytest.mark.parametrize(("mode", "folder_mode"), [(0o600, 0o700), (0o640, 0o770)])
def test_a_group_that_may_read_orders_may_answer_them(tmp_path: Path, mode: int, folder_mode: int) -> None:
    before = os.umask(0o007)
    try:
        ControlWriter(tmp_path / "control", mode=mode).issue("run", KSSSettings(), Reason())
    finally:
        os.umask(before)
    assert (tmp_path / "control").stat().st_mode & 0o777 == folder_mode
