"""What is chosen offline is what the watcher does: rules, and single figures, against `rksp_core.policy.decide`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rksp_core import policy
from rksp_core.drift import Drift, DriftState, measure
from rksp_core.features import FEATURES, features
from rksp_core.profile import WeightNorms
from tests.core.profiles import profile
from training.experiments.early_warning import rules as module
from training.experiments.early_warning import sequential
from training.experiments.early_warning.chosen import read_chosen
from training.experiments.early_warning.rules import RESCUE, Clause, Rule
from training.experiments.early_warning.series import FORMS, PLACES, SIGNALS, Series, trailing

KNOWN = ("near_unit_mass_min", "log_kreiss_mean", "log_weight_norm_head", "loss", "log_gradient_norm")
SHIPPED = read_chosen(Path(module.__file__).with_name("rules.json"))
CHOSEN = [
    rule
    for rules in (*SHIPPED.sets.values(), RESCUE)
    for rule in rules
    if {clause.metric for clause in rule.all} <= set(FEATURES)
]


@st.composite
def judged(draw: st.DrawFn) -> tuple[Series, list[Drift]]:
    """A run as the experiments have it, and as `measure` hands it to the policy."""
    steps = np.cumsum([0, *draw(st.lists(st.sampled_from((10, 20, 50)), min_size=2, max_size=12))])
    level = np.full((len(steps), len(SIGNALS)), math.nan)
    state: DriftState | None = None
    drifts = []
    scale = st.floats(0.05, 50.0)
    for event, step in enumerate(steps):
        known = profile(near_unit_mass=draw(st.floats(0.0, 1.0)), kreiss_constant=draw(st.floats(1.0, 50.0)))
        now = dataclasses.replace(
            known,
            weights=WeightNorms(draw(scale), draw(st.none() | scale)),
            loss=draw(st.none() | st.floats(0.0, 60.0)),
            gradient_norm=draw(st.none() | st.floats(0.05, 800.0)),
        )
        for name, value in features(now).items():
            if name in PLACES:
                level[event, PLACES[name]] = value
        state, drift = measure(state, now, int(step))
        drifts.append(drift)
    drift, sigmas = trailing(steps, level)
    forms = {"absolute": level, "baseline": level - level[:1], "trailing": drift, "sigmas": sigmas}
    return Series("run", "healthy", None, "pre_ln", "adamw", 0.01, steps, forms), drifts


CLAUSES = st.builds(
    Clause, st.sampled_from(KNOWN), st.sampled_from(FORMS), st.sampled_from(("falls", "rises")), st.floats(0.01, 2.0)
)
RULES = st.builds(
    Rule,
    st.lists(CLAUSES, min_size=1, max_size=2).map(tuple),
    st.sampled_from((0, 20, 60)),
    st.integers(1, 3),
)


def watched(rule: Rule) -> policy.Rule:
    """The same rule, as settings of `rksp watch` say it."""
    conditions = [
        policy.Condition(clause.metric, direction=clause.direction, sigmas=clause.by)
        if clause.form == "sigmas"
        else policy.Condition(clause.metric, clause.by, clause.form, clause.direction)
        for clause in rule.all
    ]
    return policy.Rule("rule", 2, tuple(conditions), rule.arm_after_step, rule.in_a_row)


@pytest.mark.parametrize(("level", "name"), [(1, "spectra"), (2, "weights")])
def test_the_shipped_rules_are_those_that_were_chosen(level: int, name: str) -> None:
    shipped = [dataclasses.replace(rule, name="rule", level=2) for rule in policy.DEFAULT_RULES if rule.level == level]
    assert shipped == [watched(rule) for rule in SHIPPED.sets[name]]


def fires(rule: Rule, drifts: list[Drift]) -> list[bool]:
    """At which events the policy says that the rule fired."""
    state, fired = policy.PolicyState(), []
    for drift in drifts:
        state, decision = policy.decide(state, policy.Evidence(drift), policy.Policy(rules=(watched(rule),)))
        fired.append(bool(decision.fired))
    return fired


def undecided(run: Series, clause: Clause) -> bool:
    """Whether a value lies so near the threshold that rounding decides."""
    values = run.forms[clause.form][:, PLACES[clause.metric]]
    return bool((np.abs(np.abs(values) - abs(clause.by)) < 1e-9 * max(1.0, abs(clause.by))).any())


@settings(max_examples=150, deadline=None)
@given(judged(), st.one_of(st.sampled_from(CHOSEN), RULES))
def test_a_rule_fires_at_the_events_at_which_the_policy_says_so(
    run_and_drifts: tuple[Series, list[Drift]], rule: Rule
) -> None:
    run, drifts = run_and_drifts
    assume(not any(undecided(run, clause) for clause in rule.all))
    assert rule.fires(run).tolist() == fires(rule, drifts)


@settings(max_examples=100, deadline=None)
@given(judged(), CLAUSES, st.sampled_from((0, 20, 60)), st.integers(1, 3))
def test_a_figure_peaks_at_the_threshold_at_which_the_policy_falls_silent(
    run_and_drifts: tuple[Series, list[Drift]], clause: Clause, armed: int, in_a_row: int
) -> None:
    run, drifts = run_and_drifts
    clause = dataclasses.replace(clause, form="trailing")
    assume(not undecided(run, clause))
    found = sequential.statistics(run, clause.metric, falls=clause.direction == "falls")
    peak = sequential.peak(found["trailing"], run, 10, armed, in_a_row)
    assert (peak > clause.by) == any(fires(Rule((clause,), armed, in_a_row), drifts))
