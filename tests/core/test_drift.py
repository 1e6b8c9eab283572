"""Drift against closed forms: an EWMA of a step is known, and a memory in steps does not depend on the interval."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.drift import DriftState, measure, rewind
from rksp_core.errors import ProfileError
from rksp_core.features import FEATURES, features, identity
from rksp_core.profile import ModelProfile
from tests.core.profiles import layer, profile


def follow(profiles: dict[int, ModelProfile]):
    state, drifts = None, []
    for step, each in profiles.items():
        state, drift = measure(state, each, step)
        drifts.append(drift)
    return state, drifts


def test_features_aggregate_over_the_layers_on_the_documented_scale():
    layers = (layer(near_unit_mass=0.2, kreiss_constant=2.0), layer(near_unit_mass=0.6, kreiss_constant=8.0))
    numbers = features(ModelProfile(layers, loss=3.0))
    assert numbers["near_unit_mass_mean"] == pytest.approx(0.4)
    assert numbers["near_unit_mass_min"] == 0.2
    assert numbers["log_kreiss_max"] == pytest.approx(math.log(8.0))
    assert numbers["log_kreiss_mean"] == pytest.approx(math.log(5.0))
    assert numbers["loss"] == 3.0
    assert "gradient_norm" not in numbers
    assert set(numbers) <= set(FEATURES)


def test_what_a_profile_does_not_know_is_left_out():
    unknown = layer(near_unit_mass=None, kreiss_constant=None, status=("not_finite",))
    numbers = features(ModelProfile((unknown, unknown)))
    assert "near_unit_mass_min" not in numbers
    assert numbers["not_finite_layers"] == 2.0


def test_the_departure_of_a_normal_operator_has_a_finite_logarithm():
    assert math.isfinite(features(profile(henrici_departure=0.0))["log_henrici_max"])


def test_the_first_usable_profile_is_the_baseline():
    blank = ModelProfile((layer(near_unit_mass=None, status=("not_finite",)),))
    state, drift = measure(None, blank, 0)
    assert state is None
    assert drift.from_baseline("near_unit_mass_mean") is None
    state, drift = measure(state, profile(), 10)
    assert state is not None
    assert state.baseline_step == 10
    assert drift.from_baseline("near_unit_mass_mean") == 0.0
    assert drift.from_trailing("near_unit_mass_mean") is None


@given(interval=st.integers(1, 200), events=st.integers(1, 12), jump=st.floats(-0.7, 0.1))
def test_the_trailing_average_of_a_jump_forgets_a_tenth_in_ten_steps(interval: int, events: int, jump: float):
    figures = {0: profile(near_unit_mass=0.8)} | {
        interval * n: profile(near_unit_mass=0.8 + jump) for n in range(1, events + 1)
    }
    state, drifts = follow(figures)
    # Before event n the average has seen n - 1 intervals of the new value.
    for n, drift in enumerate(drifts[1:], start=1):
        expected = jump * 0.9 ** (interval * (n - 1) / 10)
        assert drift.from_trailing("near_unit_mass_min") == pytest.approx(expected, abs=1e-12)
        assert drift.from_baseline("near_unit_mass_min") == pytest.approx(jump, abs=1e-12)
    assert state is not None
    assert state.trailing["near_unit_mass_min"] == pytest.approx(0.8 + jump * (1 - 0.9 ** (interval * events / 10)))


def test_sigmas_are_deviations_over_the_trailing_deviation():
    wobble = {10 * n: profile(near_unit_mass=0.5 + 0.01 * (-1) ** n) for n in range(1, 200)}
    state, drifts = follow(wobble)
    assert "near_unit_mass_min" not in drifts[1].sigmas_from_trailing  # nothing has deviated yet
    assert state is not None
    _, drift = measure(state, profile(near_unit_mass=0.4), 2000)
    # A fast alternation of +-0.01 leaves the average near 0.5 and a deviation near 0.01.
    assert drift.sigmas_from_trailing["near_unit_mass_min"] == pytest.approx(-10.0, rel=0.15)


def test_an_event_that_comes_late_moves_no_average():
    state, _ = follow({10: profile(), 20: profile(near_unit_mass=0.7)})
    after, drift = measure(state, profile(near_unit_mass=0.1), 15)
    assert after is state
    assert drift.late
    assert drift.from_baseline("near_unit_mass_min") == pytest.approx(-0.7)


def test_a_rewound_run_keeps_its_baseline_and_starts_a_new_average():
    state, _ = follow({10: profile(), 20: profile(near_unit_mass=0.4)})
    assert state is not None
    after, drift = measure(rewind(state, 15), profile(near_unit_mass=0.7), 15)
    assert not drift.late
    assert drift.from_trailing("near_unit_mass_min") is None
    assert drift.from_baseline("near_unit_mass_min") == pytest.approx(-0.1)
    assert after is not None
    assert (after.step, after.trailing["near_unit_mass_min"]) == (15, 0.7)


@pytest.mark.parametrize("other", [profile(probe="bb"), profile(settings={"eps": 1e-4})])
def test_another_probe_or_other_settings_are_refused(other: ModelProfile):
    state, _ = measure(None, profile(), 10)
    with pytest.raises(ProfileError, match="another probe or other settings"):
        measure(state, other, 20)


def test_identity_ignores_the_order_of_settings():
    one, two = profile(settings={"a": 1, "b": 2}), profile(settings={"b": 2, "a": 1})
    assert identity(one) == identity(two)


def test_the_state_survives_json():
    state, _ = follow({10 * n: profile(near_unit_mass=0.8 - 0.01 * n, loss=2.0) for n in range(1, 6)})
    assert state is not None
    assert DriftState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_figure_that_is_not_finite_poisons_no_average(bad: float) -> None:
    state, _ = measure(None, profile(kreiss_constant=bad, loss=bad), 0)
    for step in (10, 20):
        state, drift = measure(state, profile(kreiss_constant=2.0, loss=1.0), step)
    assert drift.from_trailing("log_kreiss_mean") == 0.0
    assert drift.from_trailing("loss") == 0.0
