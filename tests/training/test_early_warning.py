"""Alarms on made-up runs: the weights of some grow before they diverge, and so do those of a few healthy ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rksp_core.drift import measure
from tests.core.profiles import profile
from training.experiments.early_warning import __main__ as command
from training.experiments.early_warning import report, sequential
from training.experiments.early_warning.choose import SETS, Candidate, Cases, Table, choose, left_out, peaks
from training.experiments.early_warning.rules import Clause, Rule, first_alarm
from training.experiments.early_warning.series import PLACES, kind_of, series, trailing
from training.experiments.record import SCHEMA

ONSET, HORIZON = 200, 400
GROWTH = Clause("log_weight_norm_max", "trailing", "rises", 0.5)


def record(number: int, *, diverges: bool, learned: bool = True, part: str = "tuning") -> dict[str, Any]:
    """A run of 400 steps, profiled every 10; the weights of one that diverges double every 20 steps from 100 on."""
    random = np.random.default_rng(number)
    steps = np.arange(0, (ONSET + 20 if diverges else HORIZON) + 1, 10)
    grown = 2.0 ** (np.maximum(0, steps - 100) / 20) if diverges else np.ones(len(steps))
    weights = 3.0 * grown * np.exp(0.02 * random.standard_normal(len(steps)))
    losses = 5.0 * np.exp(-np.arange(1, steps[-1] + 1) / 100) + 0.1 * random.standard_normal(steps[-1])
    return {
        "schema": SCHEMA,
        "key": f"run-{number}",
        "part": part,
        "configuration": {
            "model.arguments.norm": ("pre_ln", "no_norm")[number % 2],
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 0.01,
        },
        "profiles": {
            "step": steps.tolist(),
            "features": {"near_unit_mass_min": random.random(len(steps)).tolist()},
            "distances": {},
            "indicators": {"weight_norm_max": weights.tolist()},
        },
        "sharpness": {"step": [40, 80], "largest": [10.0, None], "smallest": [-1.0, None]},
        "steps": {"loss": losses.tolist(), "gradient_norm": [1.0] * int(steps[-1])},
        "labels": {"paper": None, "rksp": ONSET + 25 if diverges else None},
        "onset": ONSET if diverges else None,
        "learned": learned and not diverges,
    }


def records() -> list[dict[str, Any]]:
    many = [record(number, diverges=number % 3 == 0) for number in range(30)]
    return [*many, record(30, diverges=False, learned=False)]


def cases() -> Cases:
    known = [each for each in records() if kind_of(each) != "failed"]
    return Cases({interval: [series(each, interval) for each in known] for interval in (10, 20)})


@pytest.mark.parametrize("interval", [10, 50])
def test_drift_and_sigmas_are_those_of_the_watcher(interval: int) -> None:
    """Value by value, a lost one included, against `rksp_core.drift.measure` on whole profiles."""
    steps = np.arange(0, 30 * interval, interval)
    losses = np.random.default_rng(0).standard_normal(30).cumsum() + 50
    losses[7] = np.nan
    drift, sigmas = trailing(steps, losses[:, None])
    state = None
    for event, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        now = dataclasses.replace(profile(), loss=None if np.isnan(loss) else float(loss))
        state, found = measure(state, now, int(step))
        for values, other in ((drift, found.moved("loss", "trailing")), (sigmas, found.sigmas("loss", "trailing"))):
            assert values[event, 0] == pytest.approx(np.nan if other is None else other, rel=1e-9, nan_ok=True)


def test_a_series_knows_at_each_event_only_what_came_before() -> None:
    """Cutting the record off after an event changes nothing up to it."""
    whole, cut = (series(each, 20) for each in (record(0, diverges=True), shortened(record(0, diverges=True), 120)))
    for form, values in cut.forms.items():
        np.testing.assert_array_equal(values, whole.forms[form][: len(cut.steps)])


def shortened(whole: dict[str, Any], step: int) -> dict[str, Any]:
    kept = sum(each <= step for each in whole["profiles"]["step"])
    sections = {
        name: {key: values[:kept] for key, values in whole["profiles"][name].items()}
        for name in ("features", "distances", "indicators")
    }
    short = {"step": whole["profiles"]["step"][:kept], **sections}
    return whole | {"profiles": short, "steps": {key: values[:step] for key, values in whole["steps"].items()}}


def test_figures_of_the_trainer_are_over_the_steps_since_the_last_event() -> None:
    one = record(1, diverges=False)
    one["steps"]["gradient_norm"][14] = 100.0  # step 15
    level = series(one, 10).forms["absolute"]
    worst = level[:, PLACES["log_gradient_norm_worst"]]
    assert worst[1:4] == pytest.approx([0.0, np.log(100.0), 0.0])
    assert level[2, PLACES["gradient_norm_spike"]] == pytest.approx(np.log(100.0))
    assert level[2, PLACES["loss"]] == one["steps"]["loss"][19]
    sharpness = level[:, PLACES["log_sharpness"]]
    assert np.isnan(sharpness[3])
    assert sharpness[4:8] == pytest.approx([np.log(10.0)] * 4)
    assert np.isnan(sharpness[8])  # measured, and not finite


def test_a_rule_fires_where_its_clauses_do() -> None:
    run = series(record(0, diverges=True), 10)
    assert first_alarm([Rule((GROWTH,), 20)], run) == first_by_hand(run, 20, 1)
    assert first_alarm([Rule((GROWTH,), 20, in_a_row=3)], run) == first_by_hand(run, 20, 3)
    assert first_alarm([Rule((GROWTH,), 180)], run) == 180
    never = Clause("loss", "absolute", "rises", 100.0)
    assert first_alarm([Rule((GROWTH, never), 20)], run) is None
    assert first_alarm([Rule((never,), 20), Rule((GROWTH,), 180)], run) == 180
    low = Clause("loss", "absolute", "falls", 1.5)
    losses = run.forms["absolute"][:, PLACES["loss"]]
    assert first_alarm([Rule((low,), 0)], run) == run.steps[np.flatnonzero(losses < 1.5)[0]]


def first_by_hand(run: Any, armed: int, in_a_row: int) -> int:
    drift, row = run.forms["trailing"][:, PLACES["log_weight_norm_max"]], 0
    for step, moved in zip(run.steps, drift, strict=True):
        row = row + 1 if step >= armed and moved > 0.5 else 0
        if row == in_a_row:
            return int(step)
    raise AssertionError("no alarm")


def test_a_peak_is_the_threshold_at_which_a_rule_stops_to_fire() -> None:
    run = series(record(0, diverges=True), 10)
    keys = (("log_weight_norm_max", "trailing", "rises"), ("near_unit_mass_min", "trailing", "falls"))
    offered = [Candidate(keys[:1], 60), Candidate(keys[:1], 60, 2), Candidate(keys, 60, 1, (2.0, 0.5))]
    for candidate, peak in zip(offered, peaks(offered, [run], 20)[:, 0], strict=True):
        for factor, fires in ((0.999, True), (1.001, False)):
            fired = candidate.rule(float(peak) * factor).fires(run)
            assert fired[run.steps <= ONSET - 20].any() == fires


def test_the_figure_that_grows_is_chosen_and_holds_on_runs_left_out() -> None:
    known = cases()
    offered = [
        Candidate(((metric, "trailing", direction),), 20)
        for metric, direction in (
            ("near_unit_mass_min", "falls"),
            ("loss", "rises"),
            ("log_weight_norm_max", "rises"),
        )
    ]
    table = Table.of(known, offered)
    ((place, threshold),) = choose(table, np.arange(3), 1.0, np.ones(30, dtype=bool))
    assert offered[place].metrics() == {"log_weight_norm_max"}
    assert 0.05 < threshold < 2.0
    verdict = left_out(table, np.arange(3), 1.0)
    assert verdict.caught.sum(axis=1).tolist() == [10, 10]
    assert verdict.false.sum() == 0
    noise = left_out(table, np.array([0]), 1.0)
    assert noise.caught.sum() <= 3


def test_a_false_alarm_has_its_price() -> None:
    known = cases()
    healthy = np.flatnonzero(known.healthy)
    table = Table.from_peaks(known, [], np.where(known.diverged, 1.0, 0.0)[None, None].repeat(2, axis=0))
    table.false[0, healthy[0]] = 2.0  # one healthy run is louder than all that diverge
    everything = np.ones(len(known.healthy), dtype=bool)
    assert [place for place, _ in choose(table, np.array([0]), 4.0, everything)] == [0]
    assert not choose(table, np.array([0]), 11.0, everything)


def packed(path: Path, many: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(each) + "\n" for each in many)
    return path


def test_rules_are_chosen_written_and_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PRICES", (1.0, 0.5))
    monkeypatch.setattr(report, "SETS", {name: SETS[name] for name in ("loss and gradient norm", "weights")})
    monkeypatch.setattr(sequential, "FIGURES", {"log_weight_norm_max": False, "near_unit_mass_min": True})
    others = [each | {"part": "held_out", "key": f"other-{place}"} for place, each in enumerate(records())]
    path = packed(tmp_path / "records.jsonl.gz", [*records(), *others])
    rules = tmp_path / "rules.json"
    assert command.main([str(path), "--choose", str(rules), "--plot", str(tmp_path / "frontier.png")]) == 0
    said = capsys.readouterr().out
    assert "31 runs: 10 diverged, 20 learned, 1 finished without having learned" in said
    assert "| 10 | 10 of 10 | 5 of 5 | 5 of 5 |" in said
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    document = json.loads(rules.read_text())
    assert document["chosen_on"]["runs"] == {"diverged": 10, "healthy": 20, "failed": 1}
    (clause,) = document["sets"]["weights"][0]["all"]
    assert (clause["metric"], clause["direction"]) == ("log_weight_norm_max", "rises")
    assert command.main([str(path), "--on", "held_out", "--rules", str(rules)]) == 0
    said = capsys.readouterr().out
    assert "chosen on 31 runs of the part 'tuning'; 0 of them are among these" in said
    row = next(line for line in said.splitlines() if line.startswith("| weights | 10 |"))
    assert row.split("|")[3].strip() == "10 of 10: 100 % [72, 100]"
    assert row.split("|")[11].strip() == "0 of 20: 0 % [0, 16]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "held_out"], "nothing is chosen on 'held_out'; give --rules"),
        (["--on", "untouched", "--rules", "RULES"], "holds no runs of the part 'untouched'"),
        (["--rules", "nowhere.json"], "cannot read nowhere.json as rksp.warning_rules/1"),
        (["--rules", "OTHER"], "it is a 'something/1'"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed(tmp_path / "records.jsonl.gz", [record(0, diverges=True)])
    nothing = {"part": "tuning", "runs": {}, "keys": []}
    (tmp_path / "RULES").write_text(json.dumps({"schema": "rksp.warning_rules/1", "chosen_on": nothing, "sets": {}}))
    (tmp_path / "OTHER").write_text(json.dumps({"schema": "something/1"}))
    given = [str(tmp_path / each) if each.isupper() else each for each in arguments]
    assert command.main([str(path), *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
