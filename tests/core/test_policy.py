"""The policy is a function of values, so whole histories are replayed here in microseconds."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.drift import Drift, measure
from rksp_core.errors import ConfigError
from rksp_core.orders import Levers
from rksp_core.policy import Condition, Decision, Evidence, Policy, PolicyState, Rule, Series, decide
from tests.core.profiles import profile

ON, STRONG = Levers(alpha=0.1), Levers(alpha=0.2)

# One number is the level it proposes: the loss. Everything else about a history is then easy to write down.
PLAIN = Policy(
    rules=tuple(Rule(f"level {n}", n, (Condition("loss", n - 0.5, "absolute"),)) for n in (1, 2, 3)),
    raise_after=2,
    clear_after=3,
    cooldown_steps=0,
    expires_in=None,
    ladder={0: Levers(), 2: ON, 3: STRONG},
)


def history(levels: list[int], policy: Policy = PLAIN, *, every: int = 10, seconds: float = 1.0) -> list[Decision]:
    state, decisions = PolicyState(), []
    for n, level in enumerate(levels, start=1):
        state, decision = decide(state, Evidence(Drift(every * n, {"loss": float(level)}), seconds * n), policy)
        decisions.append(decision)
    return decisions


def test_one_event_does_not_raise_and_two_do():
    assert [d.level for d in history([0, 2, 0, 2, 2])] == [0, 0, 0, 0, 2]


def test_the_level_rises_to_what_every_event_supports_and_falls_to_the_worst_of_the_last():
    assert [d.level for d in history([3, 1, 3, 3, 0, 1, 0, 0, 0, 0])] == [0, 1, 1, 3, 3, 3, 1, 1, 0, 0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_hysteresis_never_leaves_the_range_of_recent_proposals(levels: list[int]):
    decisions = history(levels)
    for n in range(1, len(levels)):
        before, now = decisions[n - 1].level, decisions[n].level
        if now > before:
            assert min(levels[n - 1 : n + 1]) == now
        if now < before:
            assert max(levels[n - 2 : n + 1]) == now


def test_an_order_comes_once_per_change_of_settings():
    orders = [d.order for d in history([0, 1, 1, 2, 2, 3, 3, 3])]
    assert orders == [None, None, None, None, ON, None, STRONG, None]


def test_a_cleared_level_orders_off_again():
    orders = [d.order for d in history([2, 2, 0, 0, 0, 0])]
    assert orders == [None, ON, None, None, Levers(), None]


def test_the_cool_down_delays_all_but_a_higher_level():
    policy = dataclasses.replace(PLAIN, raise_after=1, clear_after=1, cooldown_steps=50)
    decisions = history([2, 0, 0, 3, 0, 0, 0, 0, 0, 0], policy)
    assert [(10 * n, d.order) for n, d in enumerate(decisions, start=1) if d.order] == [
        (10, ON),
        (40, STRONG),
        (90, Levers()),
    ]


def test_an_order_is_renewed_before_it_expires_while_the_level_holds():
    policy = dataclasses.replace(PLAIN, raise_after=1, expires_in=10.0, cooldown_steps=10**6)
    orders = [d.order for d in history([2] * 14, policy, seconds=1.0)]
    assert [n for n, order in enumerate(orders, start=1) if order] == [1, 7, 13]


def test_off_needs_no_renewal():
    assert not any(d.order for d in history([0] * 50, dataclasses.replace(PLAIN, expires_in=1.0)))


def test_a_level_that_is_not_listed_takes_the_next_lower_one():
    policy = Policy(ladder={1: ON})
    assert [policy.levers(level) for level in range(4)] == [Levers(), ON, ON, ON]


def test_a_late_event_changes_nothing():
    state = PolicyState(level=1, series={"checkpoint": Series(1, 5, (1, 1))})
    after, decision = decide(state, Evidence(Drift(5, {"loss": 3.0}, late=True)), PLAIN)
    assert after is state
    assert decision.level == 1
    assert decision.order is None
    assert decision.late


def test_each_series_has_its_own_order_and_the_run_the_highest_level():
    plain = dataclasses.replace(PLAIN, raise_after=1, clear_after=1)

    def judge(state: PolicyState, step: int, level: int, series: str) -> tuple[PolicyState, Decision]:
        return decide(state, Evidence(Drift(step, {"loss": float(level)}), series=series), plain)

    state, _ = judge(PolicyState(), 100, 1, "profile")
    state, decision = judge(state, 90, 3, "checkpoint")
    assert (decision.late, decision.level) == (False, 3), "its replay took long; the newest checkpoint counts"
    state, decision = judge(state, 110, 0, "profile")
    assert decision.level == 3
    after, decision = judge(state, 90, 0, "checkpoint")
    assert after is state
    assert decision.late
    state, decision = judge(state, 95, 0, "checkpoint")
    assert decision.level == 0


def test_conditions_compare_with_what_they_say():
    drift = Drift(1, {"loss": 2.0}, baseline={"loss": 5.0}, trailing={"loss": 1.0})
    assert Condition("loss", 0.9, "trailing", "rises").judge(drift).held
    assert not Condition("loss", 1.0, "trailing", "rises").judge(drift).held
    assert Condition("loss", 2.9, "baseline", "falls").judge(drift).held
    assert Condition("loss", 2.1, "absolute", "falls").judge(drift).held
    assert not Condition("gradient_norm", 0.0, "absolute").judge(drift).held


def test_the_shipped_conjunction_needs_both_and_waits_until_it_is_armed():
    def last(step: int, **figures: float) -> Decision:
        state, _ = measure(None, profile(), step - 20)
        state, _ = measure(state, profile(), step - 10)
        _, drift = measure(state, profile(**figures), step)
        return decide(PolicyState(), Evidence(drift), Policy())[1]

    both = {"near_unit_mass": 0.74, "henrici_departure": 0.4}
    assert last(100, **both).fired == ("mass_falls_and_henrici_rises",)
    assert last(100, **both).level == 2
    assert last(100, **both).reason.metric == "near_unit_mass_min"
    assert last(50, **both).fired == ()
    assert last(100, near_unit_mass=0.74).fired == ()
    assert last(100, henrici_departure=0.4).fired == ()


@pytest.mark.parametrize(
    "bad", [{"loss": 51.0}, {"gradient_norm": 501.0}, {"status": ("not_finite",)}], ids=lambda bad: next(iter(bad))
)
def test_the_trainers_own_figures_are_critical_at_any_step(bad: dict[str, object]):
    _, drift = measure(None, profile(**bad), 1)
    assert decide(PolicyState(), Evidence(drift), Policy())[1].level == 3


def test_a_model_that_is_not_finite_from_the_start_is_critical():
    _, drift = measure(None, profile(near_unit_mass=None, status=("not_finite",)), 1)
    assert decide(PolicyState(), Evidence(drift), Policy())[1].level == 3


def test_a_level_may_order_the_learning_rate_alone_and_it_is_renewed_and_cleared():
    slow = Levers(learning_rate_scale=0.5)
    policy = dataclasses.replace(PLAIN, raise_after=1, clear_after=1, expires_in=10.0, ladder={2: slow})
    orders = [d.order for d in history([2] * 7 + [0], policy)]
    assert orders == [slow, None, None, None, None, None, slow, Levers()]


@pytest.mark.parametrize("ordered", [STRONG, Levers(0.2, variant="hinge", clip=0.5, learning_rate_scale=0.1)])
def test_the_state_survives_json(ordered: Levers):
    series = {"checkpoint": Series(2, 40, (0, 2, 2)), "profile": Series(0, None, ())}
    state = PolicyState(2, series, ordered, 2, 40, 17.5, held=True)
    assert PolicyState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


# As the releases wrote it that kept one level for all series: before and after an order set more than the regularizer.
OLD = {
    "level": 2,
    "step": 40,
    "proposals": [0, 2, 2],
    "ordered": {"alpha": 0.2, "interval": 10, "layer_fraction": 0.5, "gamma": 0.4},
    "ordered_level": 2,
    "ordered_step": 40,
    "ordered_at": 17.5,
}
LESS_OLD = OLD | {"ordered": OLD["ordered"] | {"variant": None, "clip": None, "learning_rate_scale": None}}


@pytest.mark.parametrize("document", [OLD, LESS_OLD])
def test_a_ledger_of_before_goes_on(document: dict[str, object]):
    state = PolicyState.from_dict(document)
    assert (state.level, state.step, state.ordered, state.ordered_at) == (2, 40, STRONG, 17.5)
    late, _ = decide(state, Evidence(Drift(40, {"loss": 0.0}), series="profile"), PLAIN)
    assert late is state
    # The first series that is heard goes on with the level and the last proposals, and clears after one more quiet one.
    for step, level in ((50, 2), (60, 2), (70, 0)):
        state, decision = decide(state, Evidence(Drift(step, {"loss": 0.0}), 18.0, "profile"), PLAIN)
        assert decision.level == level
    assert decision.order == Levers()
    assert list(state.series) == ["profile"]
    assert PolicyState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Condition("near_unit", 1.0), "did you mean 'near_unit_mass_min'"),
        (lambda: Rule("r", 4, (Condition("loss", 1.0),)), "level must be 1, 2 or 3, got 4"),
        (lambda: Rule("r", 1, ()), "would always fire"),
        (lambda: Policy(raise_after=0), "raise_after must be at least 1"),
        (lambda: Policy(expires_in=0.0), "expires_in must be above 0"),
        (lambda: Policy(ladder={4: ON}), "levels are 0 ok"),
        (lambda: Condition("loss", float("nan")), "by must be a finite number, got nan"),
        (lambda: Policy(expires_in=float("nan")), "expires_in must be above 0 seconds .* or null, got nan"),
        (lambda: Policy(expires_in=1e300), "at most 1e.09, or null, got 1e.300"),
        (lambda: Policy(clear_after=float("nan")), "clear_after must be at least 1, got nan"),
    ],
)
def test_an_impossible_policy_is_refused_in_one_sentence(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_loss_that_is_not_finite_is_critical_and_quotes_no_baseline():
    lost = dataclasses.replace(profile(step=100), not_finite=("loss",))
    _, drift = measure(None, lost, 100)
    _, decision = decide(PolicyState(), Evidence(drift, 1.0), Policy())
    assert decision.level == 3
    assert decision.reason.metric == "not_finite_figures"
    assert decision.reason.baseline is None, "an absolute rule has a threshold and nothing it compares with"
