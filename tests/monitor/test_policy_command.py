"""``rksp policy replay``: the policy of the time decides as it did, another one says where and what it changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rksp_core.drift import DriftState, measure
from rksp_core.orders import Levers
from rksp_core.policy import Evidence, Hold, Policy, PolicyState, Rule, Rung, decide, replay_decisions
from rksp_monitor.cli import run
from rksp_monitor.config import read_policy
from rksp_monitor.discovery import Sighting
from rksp_monitor.history import read_history
from rksp_monitor.ledger import Outcome, open_ledger
from rksp_monitor.policy_replay import replay
from rksp_monitor.report.policy_replay import LISTED, replay_table
from tests.core.policies import MASSES, as_text
from tests.core.profiles import profile

STEPS = range(0, 400, 50)
FALLING = (0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2)  # it falls after step 50 and after step 250
HOUR = 3600.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose near-unit mass falls twice, one event an hour; the last event is judged while a person holds."""
    made = tmp_path / "run"
    drift_state: DriftState | None = None
    state = PolicyState()
    with open_ledger(made / ".rksp" / "run.sqlite3", "run") as ledger:
        for count, (step, mass) in enumerate(zip(STEPS, FALLING, strict=True)):
            ledger.record(Sighting(made / f"{step}.json", "profile_file", "profile", step, "f", True))
            event = ledger.next_ready("profile")
            ledger.claim(event)
            found = profile(near_unit_mass=mass, step=step, layers=2)
            drift_state, drift = measure(drift_state, found, step)
            evidence = Evidence(drift, count * HOUR, series="profile")
            hold = Hold(Levers(alpha=0.7)) if step == STEPS[-1] else None
            state, decision = decide(state, evidence, MASSES, hold)
            ledger.finish(event, Outcome(found.to_dict(), evidence.to_dict(), decision.to_dict()), {})
    return made


def replayed(*argv: object, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert run(["policy", "replay", *map(str, argv)]) == code
    said = capsys.readouterr()
    return said.out if code != 2 else said.err


def test_the_policy_of_the_time_decides_as_it_did(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "then.yaml"
    path.write_text(as_text())
    assert read_policy(path) == MASSES
    out = replayed(folder, "--policy", path, "--exit-code", capsys=capsys)
    assert "run run: 8 judged events, all are decided as they were" in out
    result = replay(read_history(folder), MASSES)
    assert result.differences == []
    assert result.was.events == result.would.events
    # What a person ordered in the last event is no difference, but it is counted as the order that it was.
    assert result.was.orders == result.would.orders + 1


def test_a_stricter_policy_says_where_it_differs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "strict.yaml"
    path.write_text(as_text(clear_after=1, ladder={1: {"alpha": 0.05, "clip": 1.0, "surprise": 2.0}}))
    document = json.loads(replayed(folder, "--policy", path, "--format", "json", capsys=capsys))
    assert document["schema"] == "rksp.policy-replay/1"
    policy = dataclasses.replace(MASSES, clear_after=1, ladder={1: Rung(alpha=0.05, clip=1.0, surprise=2.0)})
    assert read_policy(path) == policy
    history = list(read_history(folder).rows())
    again = replay_decisions([Evidence.from_dict(row.evidence) for row in history], policy)
    for difference in document["differences"]:
        index = list(STEPS).index(difference["step"])
        assert difference["would"]["level"] == again[index].level
        assert difference["was"]["level"] == history[index].decision["level"]
    assert document["would"]["orders"] == sum(decision.order is not None for decision in again)
    table = replayed(folder, "--policy", path, "--exit-code", capsys=capsys, code=1)
    assert f"8 judged events, {len(document['differences'])} decided otherwise" in table
    assert table.index("first alarm at step") < table.index("order would be"), "the sums come first"
    assert "ok: events, hours" in table
    assert "0.05, clip 1, surprise 2" in table


def test_sums_are_hours_at_each_level_and_the_first_alarm(folder: Path):
    result = replay(read_history(folder), MASSES)
    levels = [row.decision["level"] for row in read_history(folder).rows()]
    assert levels == [0, 0, 1, 1, 1, 1, 1, 1]
    assert result.was.first_alarm == 100
    # Each level holds from its event to the next one; what comes after the last event is not known.
    assert result.was.seconds == (2 * HOUR, 5 * HOUR, 0.0, 0.0)
    assert result.was.events == (2, 6, 0, 0)


def test_of_many_differences_the_first_are_listed_and_a_short_run_is_told_in_minutes(folder: Path):
    result = replay(read_history(folder), Policy(rules=()))
    differing = result.differences[0]
    text = replay_table(dataclasses.replace(result, steps=(differing,) * (LISTED + 5)))
    assert text.splitlines().count(next(line for line in text.splitlines() if line.startswith(" 100"))) == LISTED
    assert text.endswith("and 5 more; --format json has all\n")
    assert "ok: events, minutes" in text
    assert "1 judged event, 1 decided otherwise" in replay_table(dataclasses.replace(result, steps=(differing,)))


def test_a_policy_without_rules_gives_no_alarm(folder: Path):
    nothing = Policy(rules=())
    result = replay(read_history(folder), nothing)
    assert result.would.first_alarm is None
    assert [step.row.step for step in result.differences] == [100, 150, 200, 250, 300, 350]
    only = Policy(rules=(Rule("late", 1, MASSES.rules[2].all, arm_after_step=300),))
    assert replay(read_history(folder), only).would.first_alarm == 300


def test_an_export_gives_the_same_and_one_of_a_part_warns(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    assert run(["history", str(folder), "--all", "--format", "json", "--output-file", str(whole)]) == 0
    assert run(["history", str(folder), "--from-step", "200", "--format", "json", "--output-file", str(part)]) == 0
    capsys.readouterr()
    assert replayed(whole, capsys=capsys) == replayed(folder, capsys=capsys)
    assert run(["policy", "replay", str(part)]) == 0
    assert "leaves events out" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--kind", "profile"], ["--status", "done"]])
def test_an_export_that_leaves_out_nothing_that_was_judged_does_not_warn(
    flags: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "export.json"
    assert run(["history", str(folder), *flags, "--format", "json", "--output-file", str(path)]) == 0
    again = tmp_path / "again.json"
    assert run(["history", str(path), *flags, "--format", "json", "--output-file", str(again)]) == 0
    capsys.readouterr()
    assert run(["policy", "replay", str(again)]) == 0
    assert capsys.readouterr().err == ""


def test_a_whole_settings_file_serves_and_variables_have_no_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "watch.yaml"
    path.write_text("seed: 3\npolicy: {raise_after: 2}\nruns: [{folder: /data}]\n")
    monkeypatch.setenv("RKSP_POLICY__RAISE_AFTER", "4")
    assert read_policy(path) == dataclasses.replace(Policy(), raise_after=2)
    path.write_text("seed: 3\n")
    assert read_policy(path) == Policy()


MISTAKES = {
    "polcy: {}": "unknown key 'polcy'; did you mean 'policy'",
    "cooldown_step: 3": "unknown key 'policy.cooldown_step'; did you mean 'policy.cooldown_steps'",
    "rulez: []": "unknown key 'policy.rulez'; did you mean 'policy.rules'",
    "rules: [{name: a, level: 1, all: [{metric: loss, bye: 1}]}]": "did you mean 'policy.rules.0.all.0.by'",
    "raise_after: 2\nrules: [{name: a, levle: 1}]": "unknown key 'policy.rules.0.levle'; did you mean",
    "raise_after: 0": "raise_after must be at least 1, got 0",
    "policy: {rules: [{name: a, level: 1, all: [{metric: kreiss, by: 1}]}]}": "unknown metric 'kreiss'",
    "policy: [1]": "policy: ",
    "a: [": "is no YAML in line",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_policy_is_one_sentence(
    text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    said = replayed(folder, "--policy", path, capsys=capsys, code=2)
    assert MISTAKES[text] in said
    assert str(path) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no evidence to judge again"),
        ([{"evidence": {}, "decision": {}}], "the evidence of step 7 in"),
        ([{"evidence": {"drift": 3, "at": 0, "series": "", "rewound": False}, "decision": {}}], "cannot be read"),
    ],
)
def test_a_history_without_evidence_is_one_sentence(
    rows: list[dict[str, object]], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "history.json"
    plain = {"kind": "profile", "step": 7, "status": "done"}
    document = {"schema": "rksp.history/1", "run": "r", "complete": True, "rows": [plain | row for row in rows]}
    path.write_text(json.dumps(document))
    said = replayed(path, capsys=capsys, code=2)
    assert says in said
    assert said.count("\n") == 1
