"""Both ends of the control folder, with a clock that the test moves."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.control import ControlListener, ControlWriter
from rksp_core.errors import ConfigError, ControlError
from rksp_core.limits import Limits
from rksp_core.orders import Acknowledgement, Desired, KSSSettings, Levers, Reason

ON = KSSSettings(alpha=0.15)
ALL_LEVERS = Levers(0.15, variant="hinge", clip=0.5, learning_rate_scale=0.25)
WIDE = Limits(clip=(0.1, 10.0), learning_rate_scale=(0.1, 1.0), surprise=(0.5, 100.0))


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


def test_a_resumed_trainer_goes_on_with_its_order_when_a_newer_one_is_rejected(writer: ControlWriter, clock: Clock):
    held = writer.issue("run", ON, Reason(), expires_in=60)
    writer.issue("run", ON, Reason(), clip=1.0)
    resumed = ControlListener(writer.folder, "run", clock=clock)
    resumed.restore(held)
    assert resumed.poll(1) is None
    assert answer(writer.folder)["status"] == "rejected"
    assert resumed.active == (1, ON)
    clock.now += 61
    ended = resumed.poll(2)
    assert ended is not None
    assert (ended.generation, ended.expired) == (1, True)


def test_an_order_whose_time_ended_while_the_trainer_was_down_is_over_once(writer: ControlWriter, clock: Clock):
    held = writer.issue("run", ON, Reason(), expires_in=60)
    clock.now += 61
    resumed = ControlListener(writer.folder, "run", clock=clock)
    resumed.restore(held)
    ended = resumed.poll(1)
    assert ended is not None
    assert ended.expired
    resumed.acknowledge(ended, 1)
    assert resumed.poll(2) is None
    assert answer(writer.folder)["status"] == "expired"


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
    "more than a tensor holds": '{"schema": "rksp.control/1", "run_id": "run", "generation": 2, "kss": '
    f'{{"alpha": 1, "interval": 1{"0" * 400}}}}}',
    "clip in the first version": '{"schema": "rksp.control/1", "run_id": "run", "generation": 2, "kss": {}, "clip": 1}',
    "variant in the first version": '{"schema": "rksp.control/1", "run_id": "run", "generation": 2, "kss": '
    '{"alpha": 1, "variant": "hinge"}}',
    "rollback in the first version": '{"schema": "rksp.control/1", "run_id": "run", "generation": 2, "kss": {}, '
    '"rollback_to": 3}',
    "no alpha": '{"schema": "rksp.control/2", "run_id": "run", "generation": 2, "kss": {}, "clip": 1}',
    "misspelt lever": '{"schema": "rksp.control/2", "run_id": "run", "generation": 2, "kss": {"alpha": 0}, "klip": 1}',
    "no clip": '{"schema": "rksp.control/2", "run_id": "run", "generation": 2, "kss": {"alpha": 0}, "clip": 0}',
    "rollback in the second version": '{"schema": "rksp.control/2", "run_id": "run", "generation": 2, "kss": '
    '{"alpha": 0}, "rollback_to": 3}',
    "nothing of the third version": '{"schema": "rksp.control/3", "run_id": "run", "generation": 2, "kss": '
    '{"alpha": 0}}',
    "surprise in the second version": '{"schema": "rksp.control/2", "run_id": "run", "generation": 2, "kss": '
    '{"alpha": 0}, "surprise": 1}',
    "no surprise": '{"schema": "rksp.control/3", "run_id": "run", "generation": 2, "kss": {"alpha": 0}, "surprise": 0}',
    "no step to go back to": '{"schema": "rksp.control/3", "run_id": "run", "generation": 2, "kss": {"alpha": 0}, '
    '"rollback_to": -1}',
    "unknown variant": '{"schema": "rksp.control/2", "run_id": "run", "generation": 2, "kss": '
    '{"alpha": 1, "variant": "x"}}',
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


HUGE = (
    '{"schema": "rksp.control.ack/1", "run_id": "run", "generation": 1, "step": 1, "at": "", "status": "applied", '
    f'"message": "", "active": {{"generation": 1, "kss": {{"alpha": 1{"0" * 400}}}}}}}'
)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "rksp.control.ack/1"}', HUGE])
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
    "settings",
    [{"alpha": -0.1}, {"alpha": "1"}, {"interval": 0}, {"layer_fraction": 0.0}, {"gamma": 1.5}, {"variant": "hinges"}],
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


@given(
    alpha=st.floats(0, 10),
    interval=st.integers(1, 100),
    variant=st.sampled_from([None, "paper", "hinge"]),
    clip=st.none() | st.floats(1e-6, 1e6),
    scale=st.none() | st.floats(1e-6, 1e6),
    surprise=st.none() | st.floats(1e-6, 1e6),
    back=st.none() | st.integers(0, 10**6),
)
def test_orders_and_answers_survive_json_in_the_first_version_that_can_say_them(
    alpha, interval, variant, clip, scale, surprise, back
):
    kss = KSSSettings(alpha, interval, variant=variant)
    order = Desired("run", 3, kss, clip=clip, learning_rate_scale=scale, surprise=surprise, rollback_to=back)
    answer = Acknowledgement("run", 3, 9, "", "applied", "", 3, kss, clip, scale, surprise, back is not None, back)
    first = 1 if (variant, clip, scale) == (None, None, None) else 2
    version = first if (surprise, back) == (None, None) else 3
    assert order.to_dict()["schema"] == f"rksp.control/{version}"
    assert answer.to_dict()["schema"] == f"rksp.control.ack/{version}"
    assert Desired.from_dict(json.loads(json.dumps(order.to_dict()))) == order
    assert Acknowledgement.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_an_order_that_says_nothing_new_is_written_as_before(writer: ControlWriter):
    writer.issue("run", ON, Reason(2, 100, "near_unit_mass_min", 0.6, 0.8, 0.0475), expires_in=60)
    assert (
        (writer.folder / "desired.json").read_text()
        == """{
 "schema": "rksp.control/1",
 "run_id": "run",
 "generation": 1,
 "kss": {
  "alpha": 0.15,
  "interval": 10,
  "layer_fraction": 0.5,
  "gamma": 0.4
 },
 "issued_at": "2023-11-14T22:13:20.000Z",
 "expires_at": "2023-11-14T22:14:20.000Z",
 "reason": {
  "risk_level": 2,
  "checkpoint_step": 100,
  "metric": "near_unit_mass_min",
  "value": 0.6,
  "baseline": 0.8,
  "threshold": 0.0475
 }
}
"""
    )


def test_every_lever_is_applied_acknowledged_and_goes_back_when_its_time_is_over(tmp_path: Path, clock: Clock):
    writer = ControlWriter(tmp_path, clock=clock)
    listener = ControlListener(tmp_path, "run", WIDE, clock=clock)
    writer.issue("run", ALL_LEVERS.kss, Reason(), clip=0.5, learning_rate_scale=0.25, expires_in=60)
    order = listener.poll(1)
    assert order is not None
    assert order.levers == ALL_LEVERS
    listener.acknowledge(order, 1)
    assert answer(tmp_path)["schema"] == "rksp.control.ack/2"
    assert answer(tmp_path)["active"] == {
        "generation": 1,
        "kss": {"alpha": 0.15, "interval": 10, "layer_fraction": 0.5, "gamma": 0.4, "variant": "hinge"},
        "clip": 0.5,
        "learning_rate_scale": 0.25,
    }
    assert writer.applied().active == ALL_LEVERS
    clock.now += 61
    ended = listener.poll(2)
    assert ended is not None
    assert ended.expired
    assert ended.levers == Levers()
    listener.acknowledge(ended, 2)
    assert answer(tmp_path)["schema"] == "rksp.control.ack/1"
    assert answer(tmp_path)["status"] == "expired"


def test_an_order_of_the_second_version_names_only_what_it_sets(tmp_path: Path):
    document = {"schema": "rksp.control/2", "run_id": "run", "generation": 1, "kss": {"alpha": 0.1}, "clip": 2}
    (tmp_path / "desired.json").write_text(json.dumps(document))
    order = ControlListener(tmp_path, "run", WIDE).poll(1)
    assert order is not None
    assert order.levers == Levers(alpha=0.1, clip=2)


def test_an_order_of_surprise_is_of_the_third_version_with_or_without_going_back(tmp_path: Path, clock: Clock) -> None:
    writer = ControlWriter(tmp_path, clock=clock)
    listener = ControlListener(tmp_path, "run", WIDE, clock=clock)
    for back in (None, 20):
        sent = writer.issue("run", KSSSettings(), Reason(), surprise=1.0, rollback_to=back, expires_in=60)
        document = json.loads((tmp_path / "desired.json").read_text())
        assert (document["schema"], document["surprise"], "rollback_to" in document) == (
            "rksp.control/3",
            1.0,
            bool(back),
        )
        order = listener.poll(25)
        assert order == sent
        listener.acknowledge(order, 25)
        said = answer(tmp_path)
        assert (said["schema"], said["active"]["surprise"]) == ("rksp.control.ack/3", 1.0)
        assert ("rolled_back_to" in said, writer.applied().rollback) == (bool(back), bool(back))
    clock.now += 61
    ended = listener.poll(30)
    assert ended is not None
    assert ended.levers == Levers()


def test_what_stands_in_the_way_of_levers_within_the_limits_is_said_and_what_held_goes_on(
    tmp_path: Path, clock: Clock
) -> None:
    def obstacle(levers: Levers) -> str | None:
        return None if levers.surprise is None else "this trainer has SGD"

    writer = ControlWriter(tmp_path, clock=clock)
    listener = ControlListener(tmp_path, "run", WIDE, obstacle=obstacle, clock=clock)
    writer.issue("run", ON, Reason(), clip=0.5, expires_in=60)
    listener.acknowledge(listener.poll(1), 1)
    writer.issue("run", ON, Reason(), surprise=1.0, expires_in=6000)
    assert listener.poll(2) is None
    said = writer.applied()
    assert said is not None
    assert (said.status, said.message, said.active) == ("rejected", "this trainer has SGD", Levers(0.15, clip=0.5))
    clock.now += 61
    ended = listener.poll(3)
    assert ended is not None
    assert (ended.generation, ended.expired) == (1, True)


def test_a_clock_set_back_over_a_restart_does_not_revive_an_expired_order(writer: ControlWriter, clock: Clock):
    writer.issue("run", ON, Reason(), expires_in=60)
    first = ControlListener(writer.folder, "run", clock=clock)
    first.acknowledge(first.poll(1), 1)
    clock.now += 61
    first.acknowledge(first.poll(2), 2)
    clock.now -= 3600
    again = ControlListener(writer.folder, "run", clock=clock).poll(2)
    assert again is not None, "the trainer may have been resumed from a checkpoint with the order in force"
    assert again.expired
    assert again.kss.alpha == 0.0


OUTSIDE = [
    (Levers(0.3), "kss.alpha 0.3, this trainer allows 0 to 0.2 (limits.alpha)"),
    (Levers(0.1, 5), "kss.interval 5, this trainer allows 10 to 20 (limits.interval)"),
    (Levers(0.1, 10, 0.9), "kss.layer_fraction 0.9, this trainer allows 0.5 to 0.5 (limits.layer_fraction)"),
    (Levers(0.1, gamma=0.6), "kss.gamma 0.6, this trainer allows 0.3 to 0.5 (limits.gamma)"),
    (Levers(0.1, variant="hinge"), "kss.variant hinge, this trainer allows paper (limits.variants)"),
    (Levers(clip=0.5), "clip 0.5, this trainer has no such lever; its limits.clip must allow it"),
    (
        Levers(learning_rate_scale=2.0),
        "learning_rate_scale 2.0, this trainer allows 0.1 to 1 (limits.learning_rate_scale)",
    ),
    (Levers(surprise=0.1), "surprise 0.1, this trainer allows 0.5 to 9 (limits.surprise)"),
]


@pytest.mark.parametrize(("bad", "message"), OUTSIDE)
def test_an_order_outside_the_limits_is_rejected_and_what_held_goes_on(
    tmp_path: Path, clock: Clock, bad: Levers, message: str
):
    writer = ControlWriter(tmp_path, clock=clock)
    limits = Limits((0, 0.2), (10, 20), (0.5, 0.5), (0.3, 0.5), ("paper",), None, (0.1, 1), (0.5, 9))
    listener = ControlListener(tmp_path, "run", limits, clock=clock)
    writer.issue("run", ON, Reason(), learning_rate_scale=0.5, expires_in=60)
    listener.acknowledge(listener.poll(1), 1)
    writer.issue("run", bad, Reason())
    assert listener.poll(2) is None
    said = writer.applied()
    assert said is not None
    assert (said.status, said.generation, said.message) == ("rejected", 2, f"the order asks for {message}")
    assert (said.active_generation, said.active) == (1, Levers(0.15, learning_rate_scale=0.5))
    assert listener.poll(3) is None
    clock.now += 61
    ended = listener.poll(4)
    assert ended is not None, "the order that held still ends at its time"
    assert (ended.generation, ended.expired) == (1, True)


def test_off_is_never_outside_the_limits():
    narrow = Limits((0.1, 0.2), (20, 30), (0.9, 1.0), (0.5, 0.5), ("hinge",))
    assert narrow.refusal(Desired("run", 1, KSSSettings())) is None
    assert Limits().refusal(Desired("run", 1, KSSSettings(1e9, 10**9, 1e-9, 1.0, "hinge"))) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"alpha": (0.2, 0.1)}, "limits.alpha must be [lowest, highest], got (0.2, 0.1)"),
        ({"alpha": None}, "limits.alpha must be [lowest, highest], got None"),
        ({"clip": (0.0, math.nan)}, "limits.clip must be [lowest, highest]"),
        ({"learning_rate_scale": 0.5}, "limits.learning_rate_scale must be [lowest, highest], got 0.5"),
        ({"surprise": (2.0, 1.0)}, "limits.surprise must be [lowest, highest], got (2.0, 1.0)"),
        ({"variants": ("papers",)}, "limits.variants has 'papers'; the variants are paper, hinge"),
        ({"rollbacks": -1}, "limits.rollbacks must be a whole number of at least 0, got -1; correct it"),
    ],
)
def test_impossible_limits_are_refused_in_one_sentence(bad: dict, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Limits(**bad)


@pytest.mark.parametrize("lever", ["clip", "learning_rate_scale", "surprise"])
def test_a_lever_out_of_range_is_never_written(writer: ControlWriter, lever: str):
    with pytest.raises(ControlError, match=f"{lever} must be a number above 0"):
        writer.issue("run", ON, Reason(), **{lever: 0.0})
    assert not (writer.folder / "desired.json").exists()


LAST_OF_VERSION_1 = "e6a17f5"


def test_a_trainer_of_the_first_version_refuses_the_second_by_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The reader itself, from the project's history: it goes on with what held, and says why."""
    package, root = tmp_path / "first_version", Path(__file__).parents[2]
    package.mkdir()
    for name in ("__init__", "atomic", "errors", "orders", "control"):
        shown = subprocess.run(
            ["git", "show", f"{LAST_OF_VERSION_1}:rksp_core/{name}.py"], cwd=root, capture_output=True, text=True
        )
        if shown.returncode:
            pytest.skip("the project's history is not here")
        (package / f"{name}.py").write_text(shown.stdout.replace("rksp_core", "first_version"))
    monkeypatch.syspath_prepend(tmp_path)
    listener = importlib.import_module("first_version.control").ControlListener(tmp_path / "control", "run")
    writer = ControlWriter(tmp_path / "control")
    writer.issue("run", ON, Reason())
    order = listener.poll(1)
    assert dataclasses.asdict(order.kss) == writer.prepare("run", ON, Reason()).to_dict()["kss"]
    listener.acknowledge(order, 1)
    writer.issue("run", ON, Reason(), clip=0.5)
    assert listener.poll(2) is None
    said = writer.applied()
    assert said is not None
    assert (said.status, said.generation, said.active_generation) == ("rejected", 2, 1)
    assert "an order has schema 'rksp.control/1', got 'rksp.control/2'" in said.message
    for name in [name for name in sys.modules if name.startswith("first_version")]:
        monkeypatch.delitem(sys.modules, name)


def test_an_order_may_be_given_its_levers_in_one(tmp_path: Path) -> None:
    levers = Levers(alpha=0.1, clip=0.5, learning_rate_scale=0.25, surprise=2.0)
    assert ControlWriter(tmp_path).issue("run", levers, Reason()).levers == levers


def test_a_refused_order_is_logged_and_the_answer_says_what_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener = ControlListener(tmp_path, "run", own=KSSSettings(alpha=0.05))
    writer = ControlWriter(tmp_path)
    writer.issue("run", KSSSettings(), Reason(), learning_rate_scale=0.5)
    assert listener.poll(3) is None
    assert "step 3: order 1 is rejected: the order asks for learning_rate_scale 0.5" in caplog.text
    answer = writer.applied()
    assert answer is not None
    assert (answer.status, answer.active_kss.alpha) == ("rejected", 0.05)


def test_going_back_happens_once_whoever_starts_again_and_is_over_with_the_order(
    writer: ControlWriter, listener: ControlListener, clock: Clock
) -> None:
    writer.issue("run", ON, Reason(), rollback_to=20, expires_in=60)
    order = listener.poll(25)
    assert order is not None
    assert order.rollback_to == 20
    listener.acknowledge(order, 25, message="went back to step 16", rolled_back_to=16)
    said = writer.applied()
    assert said is not None
    assert (said.rollback, said.rolled_back_to, said.step) == (True, 16, 25)
    again = ControlListener(writer.folder, "run", clock=clock).poll(18)
    assert again == order.standing, "its levers hold, but the trainer is where it is"
    resumed = ControlListener(writer.folder, "run", clock=clock)
    (writer.folder / "applied.json").unlink()
    resumed.restore(order)
    assert resumed.poll(18) == order.standing
    clock.now += 61
    ended = ControlListener(writer.folder, "run", clock=clock).poll(30)
    assert ended is not None
    assert (ended.expired, ended.rollback_to) == (True, None)


def test_an_answer_says_that_a_loop_which_knows_no_rollback_stayed_where_it_was(
    writer: ControlWriter, listener: ControlListener
) -> None:
    writer.issue("run", ON, Reason(), rollback_to=20)
    listener.acknowledge(listener.poll(25), 25)
    assert answer(writer.folder)["schema"] == "rksp.control.ack/3"
    assert answer(writer.folder)["rolled_back_to"] is None
