"""The tests of single figures, against slower or simpler ways to the same number."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from training.experiments.early_warning.dense import lead, report
from training.experiments.early_warning.sequential import change_points, cusum
from training.experiments.early_warning.series import PLACES, series
from training.experiments.early_warning.signals import COLUMNS, Pairs
from training.experiments.ranking import auroc

from .test_early_warning import record, records


def test_pairs_are_counted_as_the_plain_auroc_counts_them() -> None:
    runs = [series(each, 10) for each in records()]
    pairs, place = Pairs(runs, 100), PLACES["near_unit_mass_min"]
    scores: dict[str, list[Any]] = {"score": [], "bad": [], "step": []}
    for run in runs:
        for step, value in zip(run.steps, run.forms["absolute"][:, place], strict=True):
            near = run.onset is not None and run.onset - 100 <= step < run.onset
            if step > 0 and (near or run.kind == "healthy"):
                for name, each in (("score", value), ("bad", near), ("step", step)):
                    scores[name].append(each)
    score, bad, step = (np.array(each) for each in scores.values())
    everything, same = pairs.matched(None), pairs.matched(None, 0)
    found = pairs.auroc("absolute", place, [everything, same])
    assert found[0].value == pytest.approx(auroc(score, bad), rel=1e-12)
    assert found[1].value == pytest.approx(auroc(score, bad, groups=step.tolist()), rel=1e-12)
    assert found[0].low < 0.5 < found[0].high  # it was drawn at random


def test_what_moves_before_an_onset_is_seen_also_at_the_same_step() -> None:
    pairs = Pairs([series(each, 10) for each in records()], 50)
    counted = [pairs.matched(*how) for how in COLUMNS.values()]
    assert [int(each.sum()) > 0 for each in counted] == [True] * 5
    for found in pairs.auroc("baseline", PLACES["log_weight_norm_max"], counted):
        assert found.value == 1.0
    assert counted[1].sum() == 10 * 5 * 20 * 3  # 5 events before, 3 within 10 steps of each


def test_cusum_is_the_largest_excess_of_any_stretch_that_ends_here() -> None:
    sigmas = np.random.default_rng(1).standard_normal(40) + 0.3
    found = cusum(sigmas)
    for end in range(40):
        stretches = [sum(sigmas[start : end + 1] - 0.5) for start in range(end + 1)]
        assert found[end] == pytest.approx(max(0.0, *stretches), rel=1e-12)


def test_a_jump_is_a_change_point_and_its_past_is_not() -> None:
    random = np.random.default_rng(2)
    values = np.concatenate([random.normal(0, 1, 30), random.normal(20, 1, 10)])
    found = change_points(values)
    assert np.isnan(found[:6]).all()
    assert (found[8:30] < 0.5).all()
    assert found[31] > 0.8
    assert found[38] < 0.1


def test_change_points_do_not_look_ahead() -> None:
    values = np.random.default_rng(3).standard_normal(30).cumsum()
    np.testing.assert_array_equal(change_points(values[:20]), change_points(values)[:20])


def test_the_lead_of_a_figure_is_counted_back_from_the_onset() -> None:
    """One value 3, 2, 1 steps before is beyond the healthy ones, and so was one long before that does not count."""
    healthy = [dense(dict.fromkeys(range(60, 101), 1.0 + 0.1 * place), None) for place in range(3)]
    values = dict.fromkeys(range(60, 100), 1.1) | {70: 9.0, 97: 3.0, 98: 3.0, 99: 4.0}
    run = dense(values, 100)
    assert lead("figure", run, healthy) == 3
    assert lead("figure", dense(dict.fromkeys(range(60, 100), 1.1), 100), healthy) == 0
    said = report([run, *healthy])
    assert "| figure | 3 | 3 | 67% |" in said  # the lowest and the highest of three healthy runs are outside the others


def dense(values: dict[int, float], onset: int | None) -> dict[str, Any]:
    found = {step: {"figure": value} for step, value in values.items()}
    diverged_at = None if onset is None else onset + 5
    return {"seed": 1, "rate": 0.01, "onset": onset, "diverged_at": diverged_at, "found": found}


def test_every_second_number_is_another_norm() -> None:
    norms = [series(record(number, diverges=False), 10).norm for number in range(4)]
    assert norms == list(itertools.islice(itertools.cycle(["pre_ln", "no_norm"]), 4))
