"""The watcher's decisions about the events of one run, with a fake worker and a clock that the test moves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from rksp_core import ProfileWriter
from rksp_core.control import ControlListener, ControlWriter
from rksp_core.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    ExpiredCheckpoint,
    ModelError,
    UnsupportedCheckpoint,
)
from rksp_core.limits import Limits
from rksp_core.orders import KSSSettings, Levers, Reason, seconds
from rksp_core.policy import Decision, Evidence, Hold, replay_decisions
from rksp_monitor.config import RunSettings
from rksp_monitor.discovery import Sighting
from rksp_monitor.history import Selection, read_history
from rksp_monitor.hold import hold_file, remove_hold, write_hold
from rksp_monitor.ledger import open_ledger
from rksp_monitor.metrics import Board
from rksp_monitor.packed import unpack
from rksp_monitor.replay import Abandoned, Replayed
from rksp_monitor.run import Run
from rksp_monitor.watcher import Ending, RunWatcher, Surroundings, Watched
from tests.core.policies import MASSES
from tests.core.profiles import profile
from tests.monitor import tiny_model

ALARM = {"near_unit_mass": 0.6, "henrici_departure": 0.5}


class FakeReplayer:
    """Answers from a script: by step, a profile or an error (one of a list for each attempt)."""

    restarts = 0

    def __init__(self, script: dict[int, Any]) -> None:
        self.script, self.seen, self.noise = script, [], []

    def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
        tick()
        self.noise.append(noise)
        step = int(path.name[5:])
        self.seen.append(step)
        answer = self.script.get(step, profile())
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, type | Exception):
            raise answer
        return Replayed(answer, 0.5)


class Bench:
    """A run folder, and daemons on it, one after another, as after restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 1_700_000_000.0
        self.writer = ProfileWriter(folder, every=10)
        self.logs: list[dict[str, Any]] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.control = ControlWriter(folder / "control", clock=lambda: self.now)
        self.described = Run("run", folder, None, None, folder / "control", folder / ".rksp" / "run.sqlite3")

    def run(
        self,
        replayer: FakeReplayer | None = None,
        *,
        until_step: int | None = None,
        subject: str = "",
        **settings: Any,
    ) -> Watched:
        policy = settings.pop("policy", {})
        if isinstance(policy, dict):
            policy = vars(MASSES) | policy
        self.board = Board({})
        self.board.add_run("run", {})
        with structlog.testing.capture_logs() as logs, self.ledger() as ledger:
            around = Surroundings(
                structlog.get_logger(),
                self.board,
                announce=lambda event, _, document: self.told.append((event, dict(document))),
                poll_interval=0.05,
                clock=self.clock,
            )
            watcher = RunWatcher(
                self.described,
                RunSettings(policy=policy, **settings),
                ledger=ledger,
                replayer=replayer,
                control=self.control,
                around=around,
                ending=Ending(),
                subject=subject,
            )
            try:
                return watcher.watch(once=True, until_step=until_step)
            finally:
                self.logs += logs

    def clock(self) -> float:
        # Moves by itself, so that a back-off ends.
        self.now += 0.01
        return self.now

    def ledger(self) -> contextlib.AbstractContextManager[Any]:
        return open_ledger(self.folder / ".rksp" / "run.sqlite3", "run", clock=self.clock)

    def statuses(self) -> dict[int, str]:
        with self.ledger() as ledger:
            return {event.step: event.status for event in ledger.events()}

    def counter(self, name: str) -> float:
        families = {family.name: family for family in self.board.families()}
        return families[f"rksp_checkpoints_{name}"].samples[0].value

    def gauge(self, name: str) -> float | None:
        families = {family.name: family for family in self.board.families()}
        return families[name].samples[0].value if families[name].samples else None

    def healthy(self, until: int, since: int = 10, loss: float = 2.0) -> None:
        for step in range(since, until + 1, 10):
            self.writer.write(profile(), step, loss=loss, gradient_norm=1.0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_is_known_to_be_whole_at_once_does_not_overtake_what_settles(bench: Bench):
    """Step 50 carries the mark that is written last, the others were copied: they are judged in order all the same."""
    for step in (10, 20, 30, 50):
        path = tiny_model.save_folder(bench.folder, step)
        if step < 50:
            (path / "checkpoint.json").unlink()
    replayer = FakeReplayer({})
    bench.run(replayer)
    assert replayer.seen == [10, 20, 30, 50]
    assert not [log for log in bench.logs if log["event"] == "rewound"]


def desired(bench: Bench) -> dict[str, Any]:
    return json.loads((bench.folder / "control" / "desired.json").read_text())


def test_a_healthy_run_is_judged_and_nothing_is_ordered(bench: Bench):
    bench.healthy(100)
    assert bench.run(enforce=True) == Watched(10, 0, "once")
    assert not (bench.folder / "control").exists()
    assert bench.gauge("rksp_checkpoint_last_processed_step") == 100
    assert bench.gauge("rksp_control_desired_generation") == 0
    assert bench.counter("processed") == 10


def test_observing_decides_and_writes_nothing(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    assert bench.run().level == 2
    assert not (bench.folder / "control").exists()
    assert bench.gauge("rksp_risk_level") == 2
    assert bench.gauge("rksp_kss_desired_weight") == 0.15
    assert [log["kss"]["alpha"] for log in bench.logs if log["event"] == "would order"] == [0.15]


def test_enforcing_orders_once_and_reads_the_answer(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    order = desired(bench)
    assert (order["generation"], order["kss"]["alpha"]) == (1, 0.15)
    assert order["reason"]["metric"] == "near_unit_mass_min"
    assert order["reason"]["checkpoint_step"] == 110
    trainer = ControlListener(bench.folder / "control", "run", clock=lambda: bench.now)
    trainer.acknowledge(trainer.poll(111), 111)
    bench.run(enforce=True)
    assert bench.gauge("rksp_control_applied_generation") == 1
    assert bench.gauge("rksp_kss_applied_weight") == 0.15
    assert desired(bench) == order


def test_a_restart_keeps_baseline_average_level_and_generation(bench: Bench):
    bench.healthy(50)
    bench.run(enforce=True)
    bench.healthy(100, since=60)
    bench.writer.write(profile(**ALARM), 110)
    assert bench.run(enforce=True) == Watched(6, 2, "once")
    assert desired(bench)["generation"] == 1
    bench.now += 86400 * 0.6  # past half of the order's life: the next event renews it
    bench.writer.write(profile(**ALARM), 120)
    bench.run(enforce=True)
    assert desired(bench)["generation"] == 2
    with bench.ledger() as ledger:
        assert ledger.load("drift/profile")["baseline_step"] == 10


def test_an_order_that_a_crash_kept_from_the_trainer_is_delivered_with_its_generation(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    order = desired(bench)
    (bench.folder / "control" / "desired.json").unlink()
    bench.run(enforce=True)
    assert desired(bench) == order


def test_going_from_observing_to_enforcing_orders_what_holds(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run()
    bench.writer.write(profile(**ALARM), 120)
    bench.run(enforce=True)
    assert desired(bench)["kss"]["alpha"] == 0.15


def test_an_unwritable_control_folder_stops_nothing_and_is_tried_again(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    (bench.folder / "control").write_text("in the way")
    bench.run(enforce=True)
    assert [log["event"] for log in bench.logs if log["log_level"] == "error"]
    (bench.folder / "control").unlink()
    bench.run(enforce=True)
    assert desired(bench)["generation"] == 1


def test_a_bad_checkpoint_is_tried_a_few_times_and_the_others_are_judged(bench: Bench):
    for step in (100, 200, 300):
        tiny_model.save_folder(bench.folder, step)
    replayer = FakeReplayer({200: CorruptCheckpoint("bad")})
    assert bench.run(replayer, replay={"attempts": 3, "retry_delay": 0.05}).judged == 2
    assert bench.statuses() == {100: "done", 200: "failed", 300: "done"}
    assert replayer.seen.count(200) == 3
    assert (bench.counter("failed"), bench.counter("processed")) == (1, 2)


def test_a_passing_failure_is_retried_and_judged(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    replayer = FakeReplayer({100: [CheckpointError("crash"), profile()]})
    assert bench.run(replayer, replay={"retry_delay": 0.05}).judged == 1
    assert bench.statuses() == {100: "done"}


def test_what_vanishes_is_expired_and_no_failure(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    bench.run(FakeReplayer({100: ExpiredCheckpoint("gone")}))
    assert bench.statuses() == {100: "expired"}
    assert (bench.counter("expired"), bench.counter("failed")) == (1, 0)


def test_without_a_model_checkpoints_are_skipped_and_profiles_judged(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    bench.healthy(20)
    assert bench.run(None).judged == 2
    assert bench.statuses()[100] == "skipped"


def test_a_profile_on_another_probe_is_refused_with_the_reason(bench: Bench):
    bench.healthy(20)
    bench.writer.write(profile(probe="other"), 30)
    bench.writer.write(profile(), 40)
    bench.run()
    assert bench.statuses() == {10: "done", 20: "done", 30: "skipped", 40: "done"}
    assert next(log for log in bench.logs if log["event"] == "skipped")["problem"].startswith("the profile of step 30")


def test_profiles_and_checkpoints_have_baselines_of_their_own(bench: Bench):
    bench.healthy(20)
    tiny_model.save_folder(bench.folder, 15)
    bench.run(FakeReplayer({15: profile(probe="theirs")}))
    assert set(bench.statuses().values()) == {"done"}
    with bench.ledger() as ledger:
        assert ledger.load("drift/checkpoint")["identity"] != ledger.load("drift/profile")["identity"]


def test_an_old_checkpoint_does_not_clear_what_newer_profiles_raised(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run()
    for step in (20, 40, 60, 80, 100):
        tiny_model.save_folder(bench.folder, step)
    assert bench.run(FakeReplayer({})) == Watched(5, 2, "once")
    assert bench.gauge("rksp_risk_level") == 2


def test_a_run_of_which_nothing_was_judged_has_no_level(bench: Bench):
    bench.run()
    assert bench.gauge("rksp_risk_level") is None, "0 would say that it is well"
    bench.healthy(10)
    bench.run()
    assert bench.gauge("rksp_risk_level") == 0


def test_a_run_that_goes_back_to_an_earlier_step_is_followed_there(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(loss=99.0), 110, loss=99.0)
    assert bench.run().level == 3
    bench.healthy(200, since=60, loss=1.9)  # rolled back to step 50, with a lower rate
    bench.run()
    assert [log["step"] for log in bench.logs if log["event"] == "rewound"] == [60]
    assert bench.gauge("rksp_risk_level") == 0
    assert bench.gauge("rksp_checkpoint_last_processed_step") == 200
    with bench.ledger() as ledger:
        assert ledger.load("drift/profile")["baseline_step"] == 10


def test_a_step_that_comes_late_is_kept_and_moves_nothing(bench: Bench):
    bench.healthy(100)
    bench.run()
    bench.writer.write(profile(**ALARM), 95)
    assert bench.run() == Watched(1, 0, "once")
    assert bench.statuses()[95] == "done"
    assert bench.gauge("rksp_checkpoint_last_processed_step") is None


def test_a_document_that_makes_us_stumble_fails_alone(bench: Bench):
    bench.healthy(20)
    path = bench.folder / "profiles" / "step-00000015.json"
    document = profile().to_dict()
    document["layers"][0]["near_unit_mass"] = "much"
    path.write_text(json.dumps(document))
    bench.run(replay={"retry_delay": 0.05})
    assert bench.statuses() == {10: "done", 15: "failed", 20: "done"}


def test_profiles_are_judged_while_a_checkpoint_is_replayed(bench: Bench):
    class Slow(FakeReplayer):
        def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
            bench.writer.write(profile(**ALARM), 110)
            end = time.monotonic() + 10
            while not (bench.folder / "control" / "desired.json").exists() and time.monotonic() < end:
                tick()
            return super().replay(path, noise=noise, tick=tick)

    bench.healthy(100)
    tiny_model.save_folder(bench.folder, 105)
    assert bench.run(Slow({}), enforce=True).judged == 12
    judged = [log["step"] for log in bench.logs if log["event"] == "judged"]
    assert judged[-2:] == [110, 105]
    assert desired(bench)["reason"]["checkpoint_step"] == 110


def test_until_step_ends_the_watch(bench: Bench):
    bench.healthy(100)
    assert bench.run(until_step=50).ended_by == "until_step"


def test_a_stop_during_a_replay_gives_the_event_back(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    replayer = FakeReplayer({100: [Abandoned, profile()]})
    bench.run(replayer)
    with bench.ledger() as ledger:
        (event,) = ledger.events()
    assert (event.status, event.attempts) == ("done", 1)


def test_a_model_that_cannot_be_built_ends_the_watch_and_costs_no_attempt(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    with pytest.raises(ModelError):
        bench.run(FakeReplayer({100: ModelError("no module")}))
    with bench.ledger() as ledger:
        (event,) = ledger.events()
    assert (event.status, event.attempts) == ("ready", 0)


def test_an_unfinished_file_is_no_failure_until_its_time_is_over(bench: Bench):
    folder = tiny_model.save_folder(bench.folder, 100)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert bench.run(FakeReplayer({})).judged == 0
    assert bench.statuses() == {100: "seen"}
    bench.now += 3601
    bench.run(FakeReplayer({}))
    assert bench.statuses() == {100: "failed"}


def test_a_profile_is_stored_without_its_eigenvalues(bench: Bench):
    bench.healthy(10)
    bench.run()
    database = sqlite3.connect(bench.folder / ".rksp" / "run.sqlite3")
    (stored,) = database.execute("SELECT profile FROM events").fetchone()
    database.close()
    document, whole = unpack(stored), profile().to_dict()
    assert document["schema"] == "rksp.profile/1"
    assert "eigenvalues" not in document["layers"][0]
    assert len(stored) < len(json.dumps(whole)) / 2


def test_checkpoints_that_failed_are_tried_again_when_the_model_is_another(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    bench.run(None, subject="none")
    assert bench.statuses()[100] == "skipped"
    bench.run(FakeReplayer(script={100: CorruptCheckpoint("of another model")}), subject="wrong")
    assert bench.statuses()[100] == "failed"
    unchanged = FakeReplayer({})
    bench.run(unchanged, subject="wrong")
    assert unchanged.seen == [], "the same model would fail the same way"
    bench.run(FakeReplayer({}), subject="right")
    assert bench.statuses()[100] == "done"


def test_a_step_that_was_judged_before_ends_a_watch_until_it(bench: Bench):
    bench.healthy(50)
    bench.run(until_step=50)
    assert bench.run(until_step=50).ended_by == "until_step"


def test_what_the_trainer_answers_is_logged_once_whoever_it_is(bench: Bench):
    bench.healthy(10)
    listener = ControlListener(bench.folder / "control", "another")
    ControlWriter(bench.folder / "control").issue("run", KSSSettings(alpha=0.1), Reason())
    assert listener.poll(1) is None
    bench.run()
    answers = [log for log in bench.logs if log["event"] == "answer"]
    assert [(log["trainer"], log["status"], log["log_level"]) for log in answers] == [("another", "ignored", "warning")]


def test_levers_beside_the_regularizer_are_ordered_and_the_answer_is_logged(bench: Bench):
    policy = {"ladder": {2: {"alpha": 0.15, "clip": 0.5, "learning_rate_scale": 0.25, "surprise": 2.0}}}
    limits = Limits(clip=(0.1, 1), learning_rate_scale=(0.1, 1), surprise=(0.1, 10))
    trainer = ControlListener(bench.folder / "control", "run", limits, clock=lambda: bench.now)
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True, policy=policy)
    assert desired(bench)["schema"] == "rksp.control/3"
    limits_shown = [bench.gauge(f"rksp_surprise_{whose}_limit") for whose in ("desired", "applied")]
    assert limits_shown == [2.0, None]
    trainer.acknowledge(trainer.poll(111), 111)
    bench.run(enforce=True, policy=policy)
    assert desired(bench)["generation"] == 1, "what holds is not ordered again"
    (order,) = [log for log in bench.logs if log["event"] == "order"]
    (answer,) = [log for log in bench.logs if log["event"] == "answer"]
    assert (order["clip"], order["learning_rate_scale"], order["surprise"]) == (0.5, 0.25, 2.0)
    assert answer["active"] == {"kss": order["kss"], "clip": 0.5, "learning_rate_scale": 0.25, "surprise": 2.0}
    assert bench.gauge("rksp_surprise_applied_limit") == 2.0
    assert [bench.gauge(f"rksp_learning_rate_{whose}_ratio") for whose in ("desired", "applied")] == [0.25, 0.25]
    bench.now += 2 * 86400  # nobody watched, and its time is over
    bench.run(enforce=True, policy=policy)
    assert bench.gauge("rksp_surprise_desired_limit") is None
    assert bench.gauge("rksp_learning_rate_desired_ratio") == 1.0


def test_a_backlog_of_latest_passes_over_what_is_old_already(bench: Bench):
    for step in (100, 200, 300):
        tiny_model.save_folder(bench.folder, step)
    replayer = FakeReplayer({})
    bench.run(replayer, backlog="latest")
    assert replayer.seen == [300]
    assert bench.statuses() == {100: "skipped", 200: "skipped", 300: "done"}
    assert bench.counter("skipped") == 2
    assert [log["log_level"] for log in bench.logs if log["event"] == "skipped"] == ["warning", "info"], "said once"


def test_a_backlog_of_every_so_many_steps_judges_those_that_lie_apart(bench: Bench):
    for step in range(100, 1100, 100):
        tiny_model.save_folder(bench.folder, step)
    replayer = FakeReplayer({})
    bench.run(replayer, backlog={"every": 300})
    assert replayer.seen == [100, 400, 700, 1000]
    assert bench.counter("skipped") == 6


def test_an_order_that_is_not_answered_in_time_is_an_alarm_once(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True, control={"acknowledge_within": 60})
    assert bench.gauge("rksp_control_acknowledgement_overdue") == 0
    bench.now += 61
    bench.run(enforce=True, control={"acknowledge_within": 60})
    assert bench.gauge("rksp_control_acknowledgement_overdue") == 1
    assert [document["generation"] for event, document in bench.told if event == "acknowledgement_overdue"] == [1]
    trainer = ControlListener(bench.folder / "control", "run", clock=lambda: bench.now)
    trainer.acknowledge(trainer.poll(111), 111)
    bench.run(enforce=True, control={"acknowledge_within": 60})
    assert bench.gauge("rksp_control_acknowledgement_overdue") == 0


def test_a_hold_keeps_the_policy_from_ordering_and_its_release_lets_it(bench: Bench):
    hold = hold_file(bench.described.ledger)
    write_hold(hold, Hold(by="ann", reason="maintenance"), bench.now)
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    assert bench.gauge("rksp_risk_level") == 2
    assert bench.gauge("rksp_control_held") == 1
    assert not (bench.folder / "control").exists()
    remove_hold(hold)
    bench.run(enforce=True)
    assert desired(bench)["kss"]["alpha"] == 0.15
    assert bench.gauge("rksp_control_held") == 0


@pytest.mark.parametrize("why", ["its time was over", "released"])
def test_the_end_of_a_hold_says_whether_anybody_released_it(bench: Bench, why: str):
    file = hold_file(bench.described.ledger)
    write_hold(file, Hold(until=bench.now + 60, by="ann", reason="a minute"), bench.now)
    tiny_model.save_folder(bench.folder, 100)

    class Slow(FakeReplayer):
        def replay(self, path: Path, **options: Any) -> Replayed:
            if why == "released":
                remove_hold(file)
            else:
                bench.now += 60
            return super().replay(path, **options)

    bench.run(Slow({100: [CheckpointError("crash"), profile()]}))  # so there is another scan
    assert [log.get("ended") for log in bench.logs if log["event"] == "hold"] == [None, why]


def test_a_persons_word_is_in_the_history_as_the_decision_it_is(bench: Bench):
    """When it was heard, once however often the watcher starts, with the order it led to; then its release."""
    hold = hold_file(bench.described.ledger)
    bench.healthy(20)
    bench.run(enforce=True)
    asked = [Hold(by="ann", reason="maintenance"), Hold(Levers(alpha=0.3), by="ann", reason="a try")]
    for each in asked:
        write_hold(hold, each, bench.now)
        bench.run(enforce=True)
        bench.run(enforce=True)
    remove_hold(hold)
    bench.healthy(30, since=30)
    bench.run(enforce=True)
    rows = [row for row in read_history(bench.described.ledger).rows() if row.kind == "hold"]
    decisions = [Decision.from_dict(row.decision) for row in rows]
    assert [(row.step, row.status, row.evidence, row.profile) for row in rows] == [(20, "done", None, None)] * 3
    assert [decision.hold for decision in decisions] == [*asked, None]
    assert [decision.order for decision in decisions] == [None, Levers(alpha=0.3), Levers()]
    assert [row.step for row in read_history(bench.described.ledger).rows()] == [10, 20, 20, 20, 20, 30]
    assert desired(bench)["generation"] == 2


def test_old_evidence_that_later_events_overtake_gives_no_order(bench: Bench):
    """A watcher that is attached to a run in its midst: the alarm of step 110 is long over."""
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.healthy(300, since=120)
    for path in (bench.folder / "profiles").iterdir():
        os.utime(path, (bench.now - 3600, bench.now - 3600))
    bench.run(enforce=True)
    assert [log["now"] for log in bench.logs if log["event"] == "risk level"] == ["high", "ok"]
    assert not (bench.folder / "control").exists()
    bench.writer.write(profile(**ALARM), 310)
    bench.run(enforce=True)
    assert desired(bench)["kss"]["alpha"] == 0.15


def test_what_a_person_sets_for_a_time_ends_with_it_though_nobody_watches(bench: Bench):
    bench.healthy(20)
    bench.run(enforce=True)
    hold = Hold(Levers(alpha=0.3), until=bench.now + 600, by="ann", reason="a try")
    write_hold(hold_file(bench.described.ledger), hold, bench.now)
    bench.run(enforce=True)
    order = desired(bench)
    assert seconds(order["expires_at"]) == pytest.approx(hold.until, abs=0.01)
    assert order["reason"]["metric"] == "a person: ann, a try"


def test_orders_of_another_watcher_are_noticed(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    ControlWriter(bench.folder / "control").issue("run", KSSSettings(alpha=0.9), Reason())
    bench.run(enforce=True)
    assert [log["generation"] for log in bench.logs if log["event"] == "another watcher"] == [2]


def test_what_a_person_sets_is_ordered_without_waiting_for_an_event(bench: Bench):
    bench.healthy(20)
    bench.run(enforce=True)
    write_hold(hold_file(bench.described.ledger), Hold(Levers(alpha=0.3), by="ann", reason="a try"), bench.now)
    bench.run(enforce=True)
    bench.run(enforce=True)
    assert (desired(bench)["generation"], desired(bench)["kss"]["alpha"]) == (1, 0.3)


def test_every_decision_is_stored_with_its_evidence_and_can_be_made_again(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.healthy(200, since=60, loss=1.9)  # the trainer went back
    bench.run()
    bench.writer.write(profile(**ALARM), 210)
    bench.run(enforce=True)
    rows = list(read_history(bench.described.ledger).rows(Selection(set_aside=True)))
    evidences = [Evidence.from_dict(row.evidence) for row in rows]
    again = replay_decisions(evidences, MASSES)
    assert [one.to_dict() for one in again] == [dict(row.decision) for row in rows]


def test_an_old_file_that_is_touched_or_copied_back_is_no_rollback(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    order = desired(bench)
    for step in (10, 20, 30, 40):
        os.utime(bench.folder / "profiles" / f"step-{step:08d}.json")
    bench.run(enforce=True)
    assert bench.gauge("rksp_risk_level") == 2
    assert not [log for log in bench.logs if log["event"] == "rewound"]
    assert desired(bench) == order


def test_a_run_folder_that_is_renamed_is_not_judged_again(bench: Bench):
    bench.healthy(50)
    bench.run()
    (bench.folder / "profiles").rename(bench.folder / "elsewhere")
    (bench.folder / "elsewhere").rename(bench.folder / "profiles")
    with contextlib.closing(sqlite3.connect(bench.described.ledger)) as database, database:
        database.execute("UPDATE events SET path = replace(path, '/profiles/', '/other/')")
    assert bench.run().judged == 0


def test_a_replay_that_ends_late_does_not_hide_newer_spectra(bench: Bench):
    class Slow(FakeReplayer):
        def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
            bench.healthy(50)
            time.sleep(0.1)
            tick()
            return super().replay(path, noise=noise, tick=tick)

    tiny_model.save_folder(bench.folder, 1)
    bench.run(Slow({}))
    assert set(bench.statuses()) == {1, 10, 20, 30, 40, 50}
    assert bench.gauge("rksp_checkpoint_last_processed_step") == 50


def test_what_came_after_a_step_that_was_gone_back_to_is_set_aside(bench: Bench):
    bench.healthy(100)
    bench.run()
    bench.healthy(80, since=60, loss=1.9)
    bench.run()
    with contextlib.closing(sqlite3.connect(bench.described.ledger)) as database:
        rows = database.execute("SELECT step, set_aside FROM events ORDER BY id").fetchall()
    assert rows == [(step, int(step >= 60)) for step in range(10, 110, 10)] + [(60, 0), (70, 0), (80, 0)]


def test_a_rollback_to_steps_that_no_file_had_before_is_recognised_at_the_third(bench: Bench):
    bench.healthy(100)
    bench.run()
    for step in (55, 65, 75):
        bench.writer.write(profile(), step)
    bench.run()
    assert [log["step"] for log in bench.logs if log["event"] == "rewound"] == [75]
    assert bench.gauge("rksp_checkpoint_last_processed_step") == 75


def test_profiles_go_on_while_the_model_cannot_be_built(bench: Bench):
    tiny_model.save_folder(bench.folder, 15)
    bench.healthy(20)
    with pytest.raises(ModelError):
        bench.run(FakeReplayer({15: ModelError("no module")}))
    assert bench.statuses() == {10: "done", 15: "ready", 20: "done"}
    assert [document["problem"] for event, document in bench.told if event == "run_suspended"] == ["no module"]


def test_a_kind_of_checkpoint_that_is_not_read_is_skipped(bench: Bench):
    tiny_model.save_folder(bench.folder, 100)
    bench.run(FakeReplayer({100: UnsupportedCheckpoint("zarr arrays")}))
    assert bench.statuses() == {100: "skipped"}


def test_the_noise_is_measured_of_the_baseline_and_now_and_then(bench: Bench):
    for step in range(100, 600, 100):
        tiny_model.save_folder(bench.folder, step)
    replayer = FakeReplayer({})
    bench.run(replayer, replay={"noise_every": 2})
    assert replayer.noise == [True, False, True, False, True]
    silent = FakeReplayer({})
    tiny_model.save_folder(bench.folder, 600)
    bench.run(silent, replay={"noise_groups": 0})
    assert silent.noise == [False]


def test_a_ledger_that_is_removed_under_the_watcher_is_noticed(bench: Bench):
    class Removing(FakeReplayer):
        def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
            bench.described.ledger.unlink()
            return super().replay(path, noise=noise, tick=tick)

    for step in (100, 200):
        tiny_model.save_folder(bench.folder, step)
    with pytest.raises(ConfigError, match="was removed or replaced"):
        bench.run(Removing({}))


def test_a_rollback_is_seen_though_only_some_checkpoints_are_wanted(bench: Bench):
    for step in range(100, 600, 100):
        tiny_model.save_folder(bench.folder, step)
    bench.run(FakeReplayer({}), backlog={"every": 200})
    for step in (300, 400):
        shutil.rmtree(bench.folder / "checkpoints" / f"step-{step:08d}")
        tiny_model.save_folder(bench.folder, step)
    replayer = FakeReplayer({300: profile(near_unit_mass=0.7)})
    bench.run(replayer, backlog={"every": 200})
    assert replayer.seen == [300]
    assert [log["step"] for log in bench.logs if log["event"] == "rewound"] == [300]


def test_that_the_probe_or_a_setting_is_another_is_said_once(bench: Bench):
    bench.healthy(20)
    bench.run()
    for step in (30, 40, 50):
        bench.writer.write(profile(probe="other"), step)
    bench.run()
    skipped = [log for log in bench.logs if log["event"] == "skipped"]
    assert [log["log_level"] for log in skipped] == ["warning", "info", "info"]
    assert "--new-baseline" in skipped[0]["problem"]


def test_an_order_is_renewed_in_time_though_the_watcher_only_observed_meanwhile(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    bench.now += 0.6 * 86400
    bench.writer.write(profile(**ALARM), 120)
    bench.run()
    bench.now += 0.2 * 86400
    bench.writer.write(profile(**ALARM), 130)
    bench.run(enforce=True)
    assert desired(bench)["generation"] == 2, "the first one ends in a fifth of a day"


def test_a_reload_with_another_expiry_reaches_the_standing_order_at_the_next_event(bench: Bench):
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.run(enforce=True)
    first = desired(bench)
    assert seconds(first["expires_at"]) == pytest.approx(seconds(first["issued_at"]) + 86400, abs=1)
    endless = dataclasses.replace(MASSES, expires_in=None)
    bench.run(enforce=True, policy=endless)
    assert desired(bench) == first, "an order of the policy needs evidence"
    bench.writer.write(profile(**ALARM), 120)
    bench.run(enforce=True, policy=endless)
    again = desired(bench)
    assert (again["generation"], again["expires_at"], again["kss"]) == (2, None, first["kss"])
    bench.writer.write(profile(**ALARM), 130)
    bench.run(enforce=True, policy=endless)
    assert desired(bench) == again


def test_a_folder_that_cannot_be_listed_during_a_replay_costs_the_checkpoint_nothing(bench: Bench):
    class Meanwhile(FakeReplayer):
        def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
            aside = path.parent.rename(bench.folder / "aside")
            path.parent.symlink_to(path.parent)  # it is there, and `ls` says that it cannot be listed
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                tick()
            path.parent.unlink()
            aside.rename(path.parent)
            return super().replay(path, noise=noise, tick=tick)

    tiny_model.save_folder(bench.folder, 100)
    bench.run(Meanwhile({}))
    with bench.ledger() as ledger:
        (event,) = ledger.events()
    assert (event.status, event.attempts) == ("done", 1)


def test_the_back_off_of_a_checkpoint_that_is_tried_for_ever_stays_bounded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def hurried() -> float:
        bench.now += 50
        return bench.now

    tiny_model.save_folder(bench.folder, 100)
    with pytest.raises(ModelError):
        bench.run(FakeReplayer({100: ModelError("no module")}))
    with bench.ledger() as ledger:
        ledger._database.execute("UPDATE events SET attempts = 2000")
    monkeypatch.setattr(bench, "clock", hurried)
    bench.run(FakeReplayer({100: [CorruptCheckpoint("bad"), profile()]}), replay={"attempts": 10_000})
    assert [log["seconds"] for log in bench.logs if log["event"] == "retry"] == [300]
    assert bench.statuses() == {100: "done"}


RESCUE = {
    **vars(MASSES),
    "cooldown_steps": 20,
    "ratchet": True,
    "ladder": {3: {"learning_rate_scale": 0.5, "rollback": True}},
}


def rescued(bench: Bench, reached: int | None = 80, **settings: Any) -> None:
    """A run whose loss blows up at step 107, between two profiles, and a trainer that goes back as it is told."""
    bench.healthy(100)
    bench.writer.write(profile(loss=99.0), 107, loss=99.0)
    bench.run(policy=RESCUE, **settings)
    if "rollback_to" not in desired(bench):
        return
    trainer = ControlListener(
        bench.folder / "control", "run", Limits(learning_rate_scale=(0.1, 1.0)), clock=bench.clock
    )
    trainer.acknowledge(trainer.poll(106), 106, message="", rolled_back_to=reached)
    for path in (bench.folder / "profiles").iterdir():
        if reached is not None and int(path.stem[5:]) > reached:
            path.unlink()


def test_a_run_is_sent_back_to_before_its_trouble_and_followed_there(bench: Bench):
    rescued(bench, enforce=True)
    order = desired(bench)
    assert (order["schema"], order["rollback_to"], order["learning_rate_scale"]) == ("rksp.control/3", 100, 0.5)
    assert [told["rollback_to"] for event, told in bench.told if event == "order"] == [100]
    bench.healthy(150, since=90, loss=1.9)
    bench.run(enforce=True, policy=RESCUE)
    assert [(log["step"], log["generation"]) for log in bench.logs if log["event"] == "rolled back"] == [(80, 1)]
    families = {family.name: family for family in bench.board.families()}
    assert families["rksp_control_rollbacks"].samples[0].value == 1
    assert (bench.gauge("rksp_risk_level"), bench.gauge("rksp_checkpoint_last_processed_step")) == (0, 150)
    assert desired(bench) == order, "the lower rate stays, though the level has fallen"
    bench.run(enforce=True, policy=RESCUE)
    assert len([log for log in bench.logs if log["event"] == "rolled back"]) == 1


def test_what_a_trainer_undid_is_set_aside_and_the_history_replays(bench: Bench):
    rescued(bench, enforce=True)
    bench.healthy(120, since=90, loss=1.9)
    bench.writer.write(profile(loss=99.0), 125, loss=99.0)
    bench.run(enforce=True, policy=RESCUE)
    assert (desired(bench)["generation"], desired(bench)["rollback_to"]) == (2, 120), "another excursion"
    rows = list(read_history(bench.described.ledger).rows(Selection(set_aside=True)))
    assert [row.step for row in rows if row.set_aside] == [90, 100, 107]
    evidences = [Evidence.from_dict(row.evidence) for row in rows]
    assert [evidence.back_to for evidence in evidences if evidence.rewound] == [80]
    assert replay_decisions(evidences, RunSettings(policy=RESCUE).policy) == [
        Decision.from_dict(row.decision) for row in rows
    ]


def test_a_trainer_that_could_not_go_back_goes_on_at_its_level(bench: Bench):
    rescued(bench, reached=None, enforce=True)
    bench.writer.write(profile(loss=99.0), 110, loss=99.0)
    bench.run(enforce=True, policy=RESCUE)
    assert bench.gauge("rksp_risk_level") == 3
    assert desired(bench)["generation"] == 1
    answers = [told for event, told in bench.told if event == "answer"]
    assert [answer["rolled_back_to"] for answer in answers] == [None]


def test_a_person_sends_a_run_back_once(bench: Bench):
    bench.healthy(100)
    bench.run(enforce=True)
    hold = Hold(Levers(learning_rate_scale=0.5), by="ann", reason="a spike", rollback_to=60)
    write_hold(hold_file(bench.described.ledger), hold, bench.now)
    for _ in range(2):
        bench.run(enforce=True)
        assert (desired(bench)["generation"], desired(bench)["rollback_to"]) == (1, 60)


@pytest.mark.parametrize("seen", ["before", "meanwhile", "after"])
def test_a_checkpoint_that_the_trainer_undid_says_nothing_about_the_run_that_went_on(bench: Bench, seen: str):
    """It was written before the trainer went back, which leaves it there; it is replayed then, or later."""

    def go_back() -> None:
        trainer = ControlListener(
            bench.folder / "control", "run", Limits(learning_rate_scale=(0.1, 1.0)), clock=bench.clock
        )
        trainer.acknowledge(trainer.poll(106), 106, rolled_back_to=80)
        bench.now += 60

    def save(step: int) -> None:
        path = tiny_model.save_folder(bench.folder, step)
        os.utime(path, (bench.now, bench.now))

    class Slow(FakeReplayer):
        def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
            if seen == "meanwhile" and not self.seen:
                go_back()
                time.sleep(0.1)
                tick()
            return super().replay(path, noise=noise, tick=tick)

    bench.healthy(100)
    bench.writer.write(profile(loss=99.0), 107, loss=99.0)
    bench.run(policy=RESCUE, enforce=True)
    save(105)
    bench.now += 1
    if seen == "before":
        with bench.ledger() as ledger:
            ledger.record(Sighting(bench.folder / "checkpoints/step-00000105", "folder", "checkpoint", 105, "f", True))
    if seen != "meanwhile":
        go_back()
    replayer = Slow({105: profile(loss=99.0)})
    bench.run(replayer, policy=RESCUE, enforce=True)
    assert (bench.gauge("rksp_risk_level"), bench.statuses()[105]) == (0, "skipped")
    assert desired(bench)["generation"] == 1
    save(106)  # of the run that went on
    bench.run(replayer, policy=RESCUE, enforce=True)
    assert bench.statuses()[106] == "done"


def test_what_an_observing_watcher_would_have_ordered_does_not_bind_one_that_enforces(bench: Bench):
    rescue = RESCUE | {"cooldown_steps": 1}
    bench.healthy(100)
    bench.writer.write(profile(loss=99.0), 107, loss=99.0)
    bench.run(policy=rescue)
    assert not (bench.folder / "control" / "desired.json").exists()
    bench.writer.write(profile(loss=99.0), 110, loss=99.0)
    bench.run(policy=rescue, enforce=True)
    assert (desired(bench)["rollback_to"], desired(bench)["learning_rate_scale"]) == (100, 0.5)


def test_a_person_sends_a_run_back_though_the_watcher_only_observed_at_first(bench: Bench):
    bench.healthy(100)
    write_hold(hold_file(bench.described.ledger), Hold(Levers(0.1), by="ann", rollback_to=60), bench.now)
    bench.run()
    bench.run(enforce=True)
    bench.run(enforce=True)
    assert (desired(bench)["generation"], desired(bench)["rollback_to"]) == (1, 60)


def test_a_rollback_that_the_trainer_has_not_read_yet_is_asked_again_by_the_next_order(bench: Bench):
    rescue = {"cooldown_steps": 50, "raise_after": 1, "ladder": {2: {"alpha": 0.1, "rollback": True}, 3: {"clip": 1.0}}}
    bench.healthy(100)
    bench.writer.write(profile(**ALARM), 110)
    bench.writer.write(profile(loss=99.0), 120, loss=99.0)
    bench.run(policy=rescue, enforce=True)
    assert (desired(bench)["generation"], desired(bench)["clip"], desired(bench)["rollback_to"]) == (2, 1.0, 100)
