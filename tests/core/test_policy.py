"""The policy is a function of values, so whole histories are replayed here in microseconds."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rksp_core.drift import Drift, DriftState, measure
from rksp_core.drift import rewind as rewind_drift
from rksp_core.errors import ConfigError, ControlError, RkspError
from rksp_core.orders import Levers
from rksp_core.policy import (
    Condition,
    Decision,
    Evidence,
    Hold,
    Policy,
    PolicyError,
    PolicyState,
    Rule,
    Rung,
    Series,
    decide,
    decree,
    replay_decisions,
    rewind,
)
from tests.core.policies import MASSES
from tests.core.profiles import profile

ON, STRONG = Levers(alpha=0.1), Levers(alpha=0.2)

# One number is the level it proposes: the loss. Everything else about a history is then easy to write down.
PLAIN = Policy(
    rules=tuple(Rule(f"level {n}", n, (Condition("loss", n - 0.5, "absolute"),)) for n in (1, 2, 3)),
    raise_after=2,
    clear_after=3,
    cooldown_steps=0,
    expires_in=None,
    ratchet=False,
    rollback_margin=0,
    ladder={0: Rung(), 2: Rung(0.1), 3: Rung(0.2)},
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


@pytest.mark.parametrize(
    ("before", "after", "due"),
    [(10.0, None, 2), (None, 10.0, 2), (10.0, 100.0, 2), (100.0, 10.0, 2), (10.0, 12.0, 6), (12.0, 10.0, 9)],
)
def test_a_standing_order_gets_another_expiry_with_the_next_event(before: float | None, after: float | None, due: int):
    """At once where it would end much too early or late; otherwise in time, before half of its new life is left."""
    policy = dataclasses.replace(PLAIN, raise_after=1, expires_in=before)
    state, decision = decide(PolicyState(), Evidence(Drift(1, {"loss": 2.0}), 1.0), policy)
    assert (decision.order, state.ordered_until) == (ON, None if before is None else 1.0 + before)
    policy, at = dataclasses.replace(policy, expires_in=after), 1
    while decision.order is None or at == 1:
        at += 1
        state, decision = decide(state, Evidence(Drift(at, {"loss": 2.0}), float(at)), policy)
    assert (at, state.ordered_until) == (due, None if after is None else due + after)


def test_off_needs_no_renewal():
    assert not any(d.order for d in history([0] * 50, dataclasses.replace(PLAIN, expires_in=1.0)))


def test_a_level_that_is_not_listed_takes_the_next_lower_one():
    policy = Policy(ladder={1: Rung(0.1)})
    assert [policy.rung(level).levers for level in range(4)] == [Levers(), ON, ON, ON]


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


def test_a_condition_may_ask_in_sigmas_or_for_both():
    drift = Drift(1, {"loss": 2.0}, trailing={"loss": 1.0}, sigmas_from_trailing={"loss": 4.5})
    assert Condition("loss", sigmas=4).judge(drift).held
    assert not Condition("loss", sigmas=5).judge(drift).held
    assert not Condition("loss", sigmas=4, direction="falls").judge(drift).held
    assert Condition("loss", 0.9, sigmas=4).judge(drift).held
    assert not Condition("loss", 1.1, sigmas=4).judge(drift).held, "certain, and too small to matter"
    assert not Condition("loss", 0.9, sigmas=5).judge(drift).held, "large, and it may be noise"
    assert not Condition("loss", sigmas=1, against="baseline").judge(drift).held, "without a noise there are no sigmas"


def test_a_condition_may_compare_with_the_reference_run_and_ask_for_a_distance():
    drift = Drift(
        1,
        {"loss": 2.0},
        reference={"loss": 1.5},
        distances={"wasserstein_mean": {"trailing": 0.2, "reference": 0.4}},
        sigmas_from_reference={"wasserstein_mean": 3.0},
    )
    assert Condition("loss", 0.4, "reference").judge(drift).held
    assert not Condition("loss", 0.6, "reference").judge(drift).held
    assert Condition("wasserstein_mean", 0.3, "reference", sigmas=2.5).judge(drift).held
    assert not Condition("wasserstein_mean", 0.3, "trailing").judge(drift).held
    assert not Condition("wasserstein_max", 0.0, "reference").judge(drift).held
    # A run without a reference has nothing that could fire.
    assert not Condition("loss", -9.0, "reference").judge(Drift(1, {"loss": 2.0})).held


def test_a_conjunction_needs_both_and_waits_until_it_is_armed():
    def last(step: int, **figures: float) -> Decision:
        state, _ = measure(None, profile(), step - 20)
        state, _ = measure(state, profile(), step - 10)
        _, drift = measure(state, profile(**figures), step)
        return decide(PolicyState(), Evidence(drift), MASSES)[1]

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


# -- series


def hear(state: PolicyState, step: int, level: int, series: str, policy: Policy) -> tuple[PolicyState, Decision]:
    return decide(state, Evidence(Drift(step, {"loss": float(level)}), series=series), policy)


def test_a_series_that_fell_silent_does_not_count_until_it_is_heard_again():
    policy = dataclasses.replace(PLAIN, raise_after=1, clear_after=2, silent_after_steps=100)
    state, _ = hear(PolicyState(), 1000, 3, "checkpoint", policy)
    state, decision = hear(state, 1100, 0, "profile", policy)
    assert decision.level == 3
    state, decision = hear(state, 1101, 1, "profile", policy)
    assert decision.level == 1
    state, decision = hear(state, 1150, 0, "checkpoint", policy)
    assert decision.level == 3, "one quiet event of two that clear it"
    _, decision = hear(state, 1151, 0, "checkpoint", policy)
    assert decision.level == 1


def test_a_series_may_count_for_ever():
    policy = dataclasses.replace(PLAIN, raise_after=1, silent_after_steps=None)
    state, _ = hear(PolicyState(), 0, 3, "checkpoint", policy)
    assert hear(state, 10**9, 0, "profile", policy)[1].level == 3


def test_the_cool_down_counts_from_the_newest_step_of_the_run():
    policy = dataclasses.replace(PLAIN, raise_after=1, clear_after=1, cooldown_steps=50)
    state, _ = hear(PolicyState(), 1000, 0, "profile", policy)
    state, decision = hear(state, 100, 2, "checkpoint", policy)
    assert (decision.order, state.ordered_step) == (ON, 1000)
    state, decision = hear(state, 200, 0, "checkpoint", policy)
    assert decision.order is None
    assert hear(state, 1050, 0, "profile", policy)[1].order == Levers()


# -- hold


def holding(levers: Levers | None = None, until: float | None = None) -> Hold:
    return Hold(levers, until, by="ann", reason="a look at the data")


QUICK = dataclasses.replace(PLAIN, raise_after=1, clear_after=1)


def test_a_hold_lets_levels_move_and_orders_nothing():
    state = PolicyState()
    for step, level in ((10, 3), (20, 0), (30, 2)):
        state, decision = decide(state, Evidence(Drift(step, {"loss": float(level)})), QUICK, holding())
        assert (decision.level, decision.order, decision.hold) == (level, None, holding())
    # Its end brings what the level asks for, without an event and without a cool-down.
    state, decision = decree(state, dataclasses.replace(QUICK, cooldown_steps=10**6), None, 5.0)
    assert decision is not None
    assert (decision.order, decision.level, decision.reason.checkpoint_step, decision.hold) == (ON, 2, 30, None)
    assert decree(state, QUICK, None, 6.0) == (state, None)


def test_a_hold_orders_its_levers_at_once_and_once():
    state, _ = decide(PolicyState(), Evidence(Drift(10, {"loss": 2.0})), QUICK)
    assert state.ordered == ON
    state, decision = decree(state, QUICK, holding(STRONG), 1.0)
    assert decision is not None
    assert (decision.order, decision.hold) == (STRONG, holding(STRONG))
    assert decree(state, QUICK, holding(STRONG), 2.0) == (state, None)
    state, decision = decide(state, Evidence(Drift(20, {"loss": 3.0}), 3.0), QUICK, holding(STRONG))
    assert decision.order is None
    state, decision = decree(state, QUICK, holding(Levers()), 4.0)
    assert decision is not None
    assert decision.order == Levers(), "a person may switch it off at any level"
    state, decision = decree(state, QUICK, None, 5.0)
    assert decision is not None
    assert decision.order == STRONG, "the level is 3 by now"


def test_a_hold_ends_by_itself():
    state, _ = decree(PolicyState(), QUICK, holding(ON, until=10.0), 1.0)
    assert decree(state, QUICK, holding(ON, until=10.0), 9.9)[1] is None
    state, decision = decree(state, QUICK, holding(ON, until=10.0), 10.0)
    assert decision is not None
    assert (decision.order, decision.hold, state.held) == (Levers(), None, False)


def test_what_a_hold_orders_is_renewed_with_or_without_events():
    policy = dataclasses.replace(QUICK, expires_in=10.0)
    state, _ = decree(PolicyState(), policy, holding(ON), 0.0)
    assert decree(state, policy, holding(ON), 5.0)[1] is None
    renewed, decision = decree(state, policy, holding(ON), 5.1)
    assert decision is not None
    assert (decision.order, renewed.ordered_at) == (ON, 5.1)
    _, decision = decide(state, Evidence(Drift(10, {"loss": 0.0}), 5.1), policy, holding(ON))
    assert decision.order == ON


def test_what_a_hold_orders_ends_with_it_and_is_not_repeated_until_the_hold_is_longer():
    policy = dataclasses.replace(QUICK, expires_in=100.0)
    state, _ = decree(PolicyState(), policy, holding(ON, until=10.0), 0.0)
    assert state.ordered_until == 10.0
    assert all(decree(state, policy, holding(ON, until=10.0), at)[1] is None for at in (1.0, 5.0, 9.9))
    longer, decision = decree(state, policy, holding(ON, until=60.0), 5.0)
    assert decision is not None
    assert (decision.order, longer.ordered_until) == (ON, 60.0)


def test_without_a_hold_nothing_is_decreed():
    state, _ = decide(PolicyState(), Evidence(Drift(10, {"loss": 2.0})), QUICK)
    later = dataclasses.replace(QUICK, ladder={2: Rung(0.2)}, expires_in=1.0)
    assert decree(state, later, None, 1e6) == (state, None), "an order of the policy needs evidence"


def test_a_hold_that_tells_nothing_lets_the_last_order_run_out_and_its_end_brings_it_back():
    policy = dataclasses.replace(QUICK, expires_in=10.0)
    state, _ = decide(PolicyState(), Evidence(Drift(10, {"loss": 2.0}), 0.0), policy)
    state, decision = decree(state, policy, holding(), 8.0)
    assert decision is None
    _, decision = decree(state, policy, None, 12.0)
    assert decision is not None
    assert decision.order == ON


@given(
    events=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30),
    expires=st.sampled_from([None, 3.0, 50.0]),
)
def test_while_a_hold_is_in_force_every_order_is_its_own(events: list[tuple[int, bool]], expires: float | None):
    policy, state = dataclasses.replace(QUICK, expires_in=expires, cooldown_steps=30), PolicyState()
    slow = holding(Levers(learning_rate_scale=0.5))
    for n, (level, held) in enumerate(events):
        hold = slow if held else None
        state, decreed = decree(state, policy, hold, float(n))
        state, decision = decide(state, Evidence(Drift(n, {"loss": float(level)}), n + 0.5), policy, hold)
        for each in (decreed, decision):
            if each is not None and each.order is not None:
                assert (each.order == slow.levers) == held
        if held:
            assert state.ordered == slow.levers


@pytest.mark.parametrize("hold", [holding(), holding(Levers(0.1, variant="hinge", clip=1.0), until=12.5)])
def test_a_hold_survives_json(hold: Hold):
    assert Hold.from_dict(json.loads(json.dumps(hold.to_dict()))) == hold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levers": {"kss": {"alpha": -1}}}, "kss.alpha must be a number of at least 0, got -1"),
        ({"levers": {"kss": {"alfa": 1}}}, "kss has no setting 'alfa'"),
        ({"until": "noon"}, "is no hold .* write one with `rksp control hold`"),
        ({"by": None}, "by and reason must be texts"),
        ({"levers": 3}, "is no hold"),
    ],
)
def test_what_is_no_hold_is_refused_in_one_sentence(change: dict[str, object], message: str):
    with pytest.raises(ControlError, match=message):
        Hold.from_dict(holding().to_dict() | change)


# -- histories


def test_what_is_undone_holds_no_level_and_what_was_ordered_stays_ordered():
    policy = dataclasses.replace(QUICK, clear_after=2)
    events = [(10, 0, "profile"), (20, 2, "profile"), (25, 1, "checkpoint"), (30, 3, "profile"), (40, 0, "profile")]
    evidences = [Evidence(Drift(step, {"loss": float(level)}), series=name) for step, level, name in events]
    state = PolicyState()
    for evidence in evidences:
        state, _ = decide(state, evidence, policy)
    assert (state.level, state.ordered, state.ordered_step) == (3, STRONG, 30)
    known = rewind(state, 26, policy, evidences)
    assert (known.level, known.step, known.ordered, known.ordered_step) == (2, 25, STRONG, 26)
    assert known.series["profile"] == Series(2, 20, (0, 2))
    assert known.series["checkpoint"] == state.series["checkpoint"]
    unknown = rewind(state, 26, policy)
    assert (unknown.level, list(unknown.series)) == (1, ["checkpoint"])
    assert rewind(state, 5, policy, evidences).level == 0


@st.composite
def runs(draw: st.DrawFn) -> list[Evidence]:
    """Judge a run as the watcher does: two series through `measure`, now and then late, now and then from before."""
    drifts: dict[str, DriftState | None] = {"profile": None, "checkpoint": None}
    evidences: list[Evidence] = []
    kept: list[Evidence] = []
    for n in range(draw(st.integers(1, 25))):
        series, step = draw(st.sampled_from(sorted(drifts))), draw(st.integers(0, 60))
        state, rewound, back = drifts[series], False, None
        if state is not None and step <= state.step and draw(st.booleans()):
            rewound = True
            kept = [each for each in kept if each.drift.step < step]
            state = rewind_drift(state, step, [each.drift for each in kept if each.series == series])
        elif state is not None and state.baseline_step < step and draw(st.booleans()):
            rewound, back = True, draw(st.integers(state.baseline_step, step - 1))
            kept = [each for each in kept if each.drift.step <= back]
            state = rewind_drift(state, back + 1, [each.drift for each in kept if each.series == series])
        loss, mass = draw(st.floats(0.0, 4.0)), draw(st.floats(0.0, 1.0))
        noise = {"near_unit_mass_min": draw(st.floats(0.0, 0.1))}
        drifts[series], drift = measure(state, profile(loss=loss, near_unit_mass=mass, noise=noise), step)
        evidences.append(Evidence(drift, 10.0 * n + draw(st.floats(0.0, 1.0)), series, rewound, back))
        kept.append(evidences[-1])
    return evidences


MIXED = dataclasses.replace(
    PLAIN,
    rules=(
        *PLAIN.rules,
        Rule("both", 3, (Condition("near_unit_mass_min", 0.1, direction="falls", sigmas=1.0),)),
        Rule("moved", 1, (Condition("near_unit_mass_mean", sigmas=2.0, against="baseline"),), arm_after_step=20),
    ),
    cooldown_steps=15,
    expires_in=35.0,
    silent_after_steps=20,
    ladder={0: Rung(), 2: Rung(0.1), 3: Rung(0.2, rollback=True)},
)


@settings(max_examples=40)
@given(runs())
def test_a_stored_history_replays_to_the_decisions_that_were_made(evidences: list[Evidence]):
    state, made = PolicyState(), []
    for n, evidence in enumerate(evidences):
        if evidence.rewound:
            # Of what came before, the ledger has set aside what each going back undid.
            kept: list[Evidence] = []
            for each in evidences[:n]:
                if each.rewound:
                    kept = [other for other in kept if other.drift.step < each.undone_from]
                kept.append(each)
            state = rewind(state, evidence.undone_from, MIXED, kept)
        state, decision = decide(state, evidence, MIXED)
        state = PolicyState.from_dict(json.loads(json.dumps(state.to_dict())))
        made.append(decision)
    stored = [json.loads(json.dumps(each.to_dict(), allow_nan=False)) for each in evidences]
    again = [Evidence.from_dict(document) for document in stored]
    assert again == evidences
    assert replay_decisions(again, MIXED) == made
    assert [Decision.from_dict(json.loads(json.dumps(each.to_dict(), allow_nan=False))) for each in made] == made


def test_a_decision_says_the_numbers_that_made_it():
    drift = Drift(
        70,
        {"near_unit_mass_min": 0.6, "loss": 2.0},
        trailing={"near_unit_mass_min": 0.8},
        distances={"wasserstein_mean": {"baseline": 0.25}},
        sigmas_from_trailing={"near_unit_mass_min": -5.0},
    )
    rules = (
        Rule(
            "moves",
            2,
            (
                Condition("near_unit_mass_min", 0.1, direction="falls", sigmas=4),
                Condition("wasserstein_mean", 0.2, "baseline"),
                Condition("loss", 3.0, "absolute", "falls"),
            ),
            arm_after_step=60,
        ),
        Rule("grows", 1, (Condition("gradient_norm", 5.0),), arm_after_step=100),
    )
    _, decision = decide(PolicyState(), Evidence(drift), Policy(rules=rules))
    assert decision.explanation == [
        (
            "moves: near_unit_mass_min falls by 0.1 and 4 sigmas against trailing: 0.8 -> 0.6 (-5.0 sigmas); "
            "wasserstein_mean rises by 0.2 against baseline: 0.25; loss below 3: 2"
        )
    ]
    moves, grows = decision.to_dict()["rules"]
    assert moves["conditions"][0] == {
        "metric": "near_unit_mass_min",
        "by": 0.1,
        "against": "trailing",
        "direction": "falls",
        "sigmas": 4,
        "value": 0.6,
        "reference": 0.8,
        "deviation": -5.0,
        "held": True,
    }
    assert (grows["fired"], grows["armed"], "value" in grows["conditions"][0]) == (False, False, False)


def test_a_level_may_order_the_learning_rate_alone_and_it_is_renewed_and_cleared():
    slow = Levers(learning_rate_scale=0.5)
    policy = dataclasses.replace(
        PLAIN, raise_after=1, clear_after=1, expires_in=10.0, ladder={2: Rung(learning_rate_scale=0.5)}
    )
    orders = [d.order for d in history([2] * 7 + [0], policy)]
    assert orders == [slow, None, None, None, None, None, slow, Levers()]


@pytest.mark.parametrize("ordered", [STRONG, Levers(0.2, variant="hinge", clip=0.5, learning_rate_scale=0.1)])
def test_the_state_survives_json(ordered: Levers):
    series = {"checkpoint": Series(2, 40, (0, 2, 2)), "profile": Series(0, None, ())}
    state = PolicyState(2, series, ordered, 2, 40, 17.5, 99.5, True, 3, 1.5, 30, 2, 40)
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
        (lambda: Policy(ladder={4: Rung()}), "levels are 0 ok"),
        (lambda: Condition("loss", float("nan")), "by must be a finite number, got nan"),
        (lambda: Policy(expires_in=float("nan")), "expires_in must be above 0 seconds .* or null, got nan"),
        (lambda: Policy(expires_in=1e300), "at most 1e.09, or null, got 1e.300"),
        (lambda: Policy(clear_after=float("nan")), "clear_after must be at least 1, got nan"),
        (lambda: Policy(silent_after_steps=0), "silent_after_steps must be at least 1, got 0"),
        (lambda: Condition("loss"), "a rule about loss says not how far it must move; give by, sigmas or both"),
        (lambda: Condition("loss", sigmas=0.0), "sigmas must be a number above 0, got 0.0"),
        (lambda: Condition("loss", 1.0, "absolute", sigmas=3.0), "an absolute value has no sigmas"),
        (lambda: Condition("wasserstein_mean", 1.0, "absolute"), "a distance rises, against trailing, baseline or"),
        (lambda: Condition("wasserstein_max", 1.0, direction="falls"), "a distance rises"),
        (lambda: Condition("wasserstein", 1.0), "did you mean 'wasserstein_max'"),
    ],
)
def test_an_impossible_policy_is_refused_in_one_sentence(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"rules": [{"name": "a", "level": 1, "all": [{"metric": "losss", "by": 1}]}]}, ("rules", 0, "all", 0)),
        ({"rules": [{"name": "a", "level": 1, "all": []}]}, ("rules", 0)),
        ({"ladder": {2: {"alpha": -1}}}, ("ladder", 2)),
        ({"ladder": {5: {"alpha": 1}}}, ()),
    ],
)
def test_a_reader_of_settings_can_say_where_a_mistake_stands(document: dict[str, object], place: tuple[object, ...]):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Policy).validate_python(document)
    (found,) = caught.value.errors()
    assert found["loc"] == place
    assert isinstance(found["ctx"]["error"], RkspError)


def test_a_loss_that_is_not_finite_is_critical_and_quotes_no_baseline():
    lost = dataclasses.replace(profile(step=100), not_finite=("loss",))
    _, drift = measure(None, lost, 100)
    _, decision = decide(PolicyState(), Evidence(drift, 1.0), Policy())
    assert decision.level == 3
    assert decision.reason.metric == "not_finite_figures"
    assert decision.reason.baseline is None, "an absolute rule has a threshold and nothing it compares with"


BACK = dataclasses.replace(
    PLAIN,
    raise_after=1,
    clear_after=1,
    ladder={0: Rung(), 2: Rung(0.1, rollback=True), 3: Rung(0.2, rollback=True)},
)


def backs(levels: list[int], policy: Policy = BACK) -> list[tuple[int, int | None]]:
    """The orders of a history: the step of each, and how far back it sends the trainer."""
    decisions = history(levels, policy)
    return [(d.reason.checkpoint_step, d.rollback_to) for d in decisions if d.order is not None]


def test_a_rollback_goes_to_the_newest_step_at_which_nothing_was_wrong_once_an_excursion():
    assert backs([0, 0, 1, 0, 2, 2, 2]) == [(50, 40)]
    assert backs([0, 0, 1, 1, 2, 2, 2]) == [(50, 20)], "the trouble began with the first event that a rule fired on"
    assert backs([0, 2, 2, 3, 3]) == [(20, 10), (40, 10)], "it got worse"
    assert backs([0, 2, 0, 0, 0, 2]) == [(20, 10), (30, None), (60, 50)], "another excursion"


def test_a_margin_goes_further_back_but_never_before_the_start():
    assert backs([0, 0, 0, 2], dataclasses.replace(BACK, rollback_margin=15)) == [(40, 15)]
    assert backs([0, 0, 0, 2], dataclasses.replace(BACK, rollback_margin=90)) == [(40, 0)]


def test_a_checkpoint_that_is_judged_late_says_that_the_trouble_is_older_than_the_profiles_knew():
    state = PolicyState()
    for name, step, level in (("profile", 10, 0.0), ("profile", 20, 0.0), ("checkpoint", 15, 3.0)):
        state, decision = decide(state, Evidence(Drift(step, {"loss": level}), step, name), BACK)
    assert decision.rollback_to == 14


def test_without_an_event_in_health_there_is_nowhere_to_go_back_to():
    assert backs([2, 2, 3]) == [(10, None), (30, None)]


def test_a_single_event_that_raises_nothing_is_not_healthy_either():
    policy = dataclasses.replace(BACK, raise_after=2)
    assert backs([0, 2, 2], policy) == [(30, 10)]


def test_a_renewal_takes_nobody_back_again():
    policy = dataclasses.replace(BACK, expires_in=4.0)
    assert backs([0, 2, 2, 2, 2, 2, 2], policy) == [(20, 10), (50, None)]


def test_rollbacks_keep_their_distance_while_the_levers_of_a_higher_level_do_not_wait():
    policy = dataclasses.replace(BACK, cooldown_steps=50)
    low = dataclasses.replace(policy, ladder={0: Rung(), 1: Rung(0.1, rollback=True), 2: Rung(0.2, rollback=True)})
    assert backs([0, 1, 2, 2, 2, 2, 2], low) == [(20, 10), (30, None), (70, 10)]
    assert backs([0, 2, 3, 3, 3, 3, 3], policy) == [(20, 10), (30, 10)]  # critical: there may be no later event


def test_a_ratchet_slows_a_trainer_down_no_further_than_trainers_allow():
    policy = dataclasses.replace(BACK, ratchet=True, ladder={3: Rung(learning_rate_scale=0.1, rollback=True)})
    state, scales = PolicyState(), []
    for begin in (100, 80, 60):
        state = rewind(state, begin, policy)
        for step, loss in ((begin, 0.0), (begin + 10, 3.0)):
            state, decision = decide(state, Evidence(Drift(step, {"loss": loss}), float(step)), policy)
        scales.append(decision.order and decision.order.learning_rate_scale)
    assert scales == [0.1, pytest.approx(0.01), 0.01]


def test_a_trainer_that_went_back_is_healthy_again_and_is_taken_back_when_it_goes_wrong_once_more():
    policy = dataclasses.replace(BACK, ratchet=True, ladder={3: Rung(learning_rate_scale=0.5, rollback=True)})
    state, evidences = PolicyState(), []
    for step, loss in ((10, 0.0), (20, 0.0), (30, 3.0)):
        evidences.append(Evidence(Drift(step, {"loss": loss}), float(step)))
        state, decision = decide(state, evidences[-1], policy)
    assert (decision.order, decision.rollback_to) == (Levers(learning_rate_scale=0.5), 20)
    state = rewind(state, 11, policy, evidences)
    assert (state.level, state.healthy_step, state.ordered) == (0, 10, Levers(learning_rate_scale=0.5))
    made = []
    for step, loss in ((20, 0.0), (30, 0.0), (40, 3.0)):
        state, decision = decide(state, Evidence(Drift(step, {"loss": loss}), 100.0 + step), policy)
        made.append((decision.order, decision.rollback_to))
    assert made == [(None, None), (None, None), (Levers(learning_rate_scale=0.25), 30)]  # half was not enough
    assert PolicyState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_with_a_ratchet_the_tighter_of_two_limits_of_surprise_holds_and_is_not_taken_back():
    ladder = {1: Rung(surprise=2.0), 2: Rung(clip=1.0), 3: Rung(surprise=1.0)}
    policy = dataclasses.replace(BACK, ratchet=True, ladder=ladder)
    loose, tight = Levers(surprise=2.0), Levers(surprise=1.0)
    assert [d.order for d in history([0, 1, 2, 3, 0], policy)] == [
        None,
        loose,
        Levers(clip=1.0, surprise=2.0),  # the rung's own levers, with the limit that holds already
        tight,
        None,
    ]
    wider = dataclasses.replace(policy, ladder={2: Rung(surprise=1.0), 3: Rung(surprise=4.0)})
    assert [d.order for d in history([0, 2, 3, 0], wider)] == [None, tight, None, None]
    plain = dataclasses.replace(policy, ratchet=False, clear_after=1, cooldown_steps=0)
    assert [d.order for d in history([1, 2, 0], plain)] == [loose, Levers(clip=1.0), Levers()]


def test_a_ratchet_keeps_no_limit_of_surprise_that_a_person_ordered():
    policy = dataclasses.replace(BACK, ratchet=True, ladder={1: Rung(surprise=2.0), 3: Rung(clip=1.0)})
    state, _ = decide(PolicyState(), Evidence(Drift(10, {"loss": 1.0}), 10.0), policy)
    state, decision = decree(state, policy, holding(Levers(surprise=0.5)), 11.0)
    assert decision is not None
    assert (decision.order, state.kept_surprise) == (Levers(surprise=0.5), 2.0)
    state, decision = decree(state, policy, None, 12.0)
    assert decision is not None
    assert decision.order == Levers(surprise=2.0)
    _, decision = decide(state, Evidence(Drift(20, {"loss": 3.0}), 20.0), policy)
    assert decision.order == Levers(clip=1.0, surprise=2.0)
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision


def test_a_rollback_that_was_asked_for_and_not_made_does_not_count():
    """The rung's rate comes once more for each time that the trainer really went back."""
    policy = dataclasses.replace(BACK, ratchet=True, ladder={3: Rung(learning_rate_scale=0.5, rollback=True)})
    state, orders = PolicyState(), []
    for step, loss in ((10, 0.0), (20, 3.0), (30, 0.0), (40, 3.0), (50, 0.0)):
        state, decision = decide(state, Evidence(Drift(step, {"loss": loss}), float(step)), policy)
        state = PolicyState.from_dict(json.loads(json.dumps(state.to_dict())))
        orders.append((decision.rollback_to, decision.order and decision.order.learning_rate_scale))
    assert orders == [(None, None), (10, 0.5), (None, None), (30, 0.5), (None, None)]
    assert state.backs == 0
    state = rewind(state, 31, policy)
    assert rewind(state, 31, policy).backs == state.backs == 1, "what a trainer does of itself is none of ours"
    for step, loss in ((40, 0.0), (50, 3.0)):
        state, decision = decide(state, Evidence(Drift(step, {"loss": loss}), float(step)), policy)
    assert (decision.rollback_to, decision.order) == (40, Levers(learning_rate_scale=0.25))


def test_a_rule_that_asks_for_several_events_counts_them_in_its_own_series():
    rule = Rule("stays", 2, (Condition("loss", 1.0, "absolute"),), arm_after_step=20, in_a_row=2)
    policy, state, fired = Policy(rules=(rule,), clear_after=1), PolicyState(), []
    for step, loss, series in (
        (10, 9.0, "profile"),  # not armed yet: it does not count
        (20, 9.0, "profile"),
        (25, 9.0, "checkpoint"),
        (30, 9.0, "profile"),
        (40, 0.0, "profile"),
        (50, 9.0, "profile"),
        (60, 9.0, "profile"),
    ):
        evidence = Evidence(Drift(step, {"loss": loss}), float(step), series)
        state, decision = decide(state, evidence, policy)
        state = PolicyState.from_dict(json.loads(json.dumps(state.to_dict())))
        fired.append(bool(decision.rules[0].fired))
    assert fired == [False, False, False, True, False, False, True]
    with pytest.raises(PolicyError, match="in_a_row must be at least 1, got 0"):
        dataclasses.replace(rule, in_a_row=0)


def test_a_ratchet_gives_way_to_nothing_but_a_higher_level_and_a_person():
    policy = dataclasses.replace(PLAIN, raise_after=1, clear_after=1, ratchet=True)
    assert [d.order for d in history([2, 0, 0, 3, 0, 2, 0], policy)] == [ON, None, None, STRONG, None, None, None]
    state = PolicyState()
    for step, loss in ((10, 2.0), (20, 0.0)):
        state, _ = decide(state, Evidence(Drift(step, {"loss": loss}), float(step)), policy)
    state, decision = decree(state, policy, Hold(Levers()), 30.0)
    assert decision is not None
    assert decision.order == Levers()
    state, decision = decree(state, policy, None, 40.0)
    assert decision is not None
    assert decision.order == ON


def test_a_person_sends_a_trainer_back_once():
    hold = Hold(Levers(0.3), by="ann", reason="a look", rollback_to=70)
    state, decision = decree(PolicyState(), BACK, hold, 1.0, news=True)
    assert decision is not None
    assert (decision.order, decision.rollback_to) == (Levers(0.3), 70)
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    assert decree(state, BACK, hold, 2.0) == (state, None)
    _, again = decree(state, BACK, dataclasses.replace(hold, rollback_to=60), 3.0, news=True)
    assert again is not None
    assert (again.order, again.rollback_to) == (Levers(0.3), 60)


@pytest.mark.parametrize("bad", [{"rollback_to": -1}, {"rollback_to": "10"}, {"rollback_to": 5, "levers": None}])
def test_a_hold_that_goes_nowhere_is_refused(bad: dict):
    document = Hold(Levers(), rollback_to=3).to_dict() | bad
    with pytest.raises(ControlError, match="the document is no hold"):
        Hold.from_dict(document)
