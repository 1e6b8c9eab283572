"""Ranking and calibration on cases that can be counted by hand, and on probabilities that are known to be right."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from training.experiments.ranking import (
    auroc,
    calibration_by_chance,
    calibration_error,
    estimate,
    expected_calibration_error,
    reliability,
)


def test_the_area_is_that_of_a_library() -> None:
    random = np.random.default_rng(0)
    bad = random.random(200) < 0.3
    scores = np.round(bad + random.normal(0, 1, 200), 1)  # with ties
    assert auroc(scores, bad) == pytest.approx(roc_auc_score(bad, scores), rel=1e-12)


def test_within_groups_only_pairs_of_one_group_count() -> None:
    scores, bad = np.array([9.0, 8.0, 1.0, 2.0]), np.array([True, True, False, True])
    assert auroc(scores, bad) == 1.0
    assert auroc(scores, bad, ["a", "a", "b", "b"]) == 1.0
    assert auroc(-scores, bad, ["a", "a", "b", "b"]) == 0.0
    assert np.isnan(auroc(scores, bad, ["a", "b", "c", "d"]))


def test_a_score_that_tells_groups_apart_tells_nothing_within_them() -> None:
    """As near-unit mass does with the norms."""
    random = np.random.default_rng(0)
    group = np.repeat([0, 1], 500)
    bad = random.random(1000) < np.where(group, 0.9, 0.1)
    scores = group + random.normal(0, 0.01, 1000)
    assert auroc(scores, bad) > 0.85
    assert auroc(scores, bad, list(group)) == pytest.approx(0.5, abs=0.07)


def test_honest_probabilities_have_next_to_no_error_and_dishonest_ones_theirs() -> None:
    random = np.random.default_rng(0)
    honest = random.random(20_000)
    bad = random.random(20_000) < honest
    assert calibration_error(honest, bad) < 0.01
    assert calibration_error(np.clip(honest + 0.2, 0, 1), bad) == pytest.approx(0.19, abs=0.02)  # clipped at the top
    assert calibration_error(np.full(20_000, 0.9), bad) == pytest.approx(0.4, abs=0.01)


def test_few_runs_with_honest_probabilities_are_not_called_dishonest() -> None:
    """The plain estimate would say .1."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(50):
        honest = random.random(100)
        found.append(calibration_error(honest, random.random(100) < honest))
    assert np.median(found) < 0.04


def test_what_chance_alone_shows_is_the_plain_error_of_honest_probabilities() -> None:
    random = np.random.default_rng(0)
    honest = random.random(200)
    plain = [expected_calibration_error(honest, random.random(200) < honest) for _ in range(300)]
    chance = calibration_by_chance(honest)
    assert np.mean(plain) == pytest.approx(chance.value, rel=0.05)
    assert np.quantile(plain, [0.025, 0.975]) == pytest.approx([chance.low, chance.high], rel=0.15)
    assert expected_calibration_error(np.full(10, 0.9), np.arange(10) < 4, bins=1) == pytest.approx(0.5, rel=1e-12)


def test_an_interval_covers_what_it_should() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        values = random.normal(0, 1, 60)
        found = estimate(lambda chosen, values=values: float(values[chosen].mean()), 60, seed=trial)
        covered += found.low < 0 < found.high
    assert 33 <= covered <= 40  # 38 of 40 are expected


def test_reliability_counts_each_run_once() -> None:
    rows = reliability(np.linspace(0, 1, 25), np.arange(25) >= 12)
    assert sum(count for _, _, count in rows) == 25
    assert [round(p, 2) for p, _, _ in rows] == sorted(round(p, 2) for p, _, _ in rows)
    assert rows[0][1] == 0.0
    assert rows[-1][1] == 1.0
