"""Drift against closed forms: an EWMA of a step is known, and a memory in steps does not depend on the interval."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.drift import Drift, DriftState, measure, rewind
from rksp_core.errors import ProfileError
from rksp_core.features import DISTANCES, FEATURES, features, identity
from rksp_core.profile import ModelProfile
from rksp_core.reference import Reference
from tests.core.profiles import layer, profile, spectrum


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
    assert numbers["log_growth_max"] == pytest.approx(math.log(1.7))
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


@pytest.mark.parametrize("interval", [10, 100, 1000])
def test_a_run_that_only_wanders_is_rarely_three_sigmas_away_at_any_interval(interval: int):
    generator = np.random.default_rng(0)
    _, drifts = follow(
        {interval * n: profile(near_unit_mass=float(x)) for n, x in enumerate(generator.normal(0.5, 0.01, 1000))}
    )
    sigmas = np.array([drift.sigmas_from_trailing["near_unit_mass_min"] for drift in drifts[2:]])
    assert np.mean(np.abs(sigmas) > 3) < 0.02  # 0.003 of a normal distribution whose deviation is known exactly
    assert np.std(sigmas) == pytest.approx(1.0, abs=0.15)
    # At first it is the plain mean square of the deviations so far, each from the average before it.
    moved = [drift.from_trailing("near_unit_mass_min") for drift in drifts[1:12]]
    assert sigmas[9] == pytest.approx(moved[10] / np.sqrt(np.mean(np.square(moved[:10]))))


def test_a_loss_that_is_as_large_as_a_float_can_be_is_measured():
    state, _ = measure(None, profile(loss=1.0), 0)
    for step, loss in ((10, 1e200), (20, 1e308), (30, 2.0)):
        state, drift = measure(state, profile(loss=loss), step)
    assert math.isfinite(drift.sigmas_from_trailing["loss"])


def test_sigmas_from_the_baseline_are_over_the_noise_of_both_profiles():
    state, first = measure(None, profile(near_unit_mass=0.8, noise={"near_unit_mass_min": 0.03}), 0)
    assert first.sigmas_from_baseline["near_unit_mass_min"] == 0.0
    state, drift = measure(state, profile(near_unit_mass=0.7, noise={"near_unit_mass_min": 0.04}), 10)
    assert drift.sigmas_from_baseline["near_unit_mass_min"] == pytest.approx(-0.1 / 0.05)
    assert drift.sigmas_from_trailing["near_unit_mass_min"] == pytest.approx(-0.1 / 0.04), "nothing has deviated yet"
    assert "log_sigma_max" not in drift.sigmas_from_baseline, "its noise is not known"
    # Noise is measured now and then: until it is again, the last one holds.
    _, drift = measure(state, profile(near_unit_mass=0.7), 20)
    assert drift.noise == {"near_unit_mass_min": 0.04}
    assert drift.sigmas_from_baseline["near_unit_mass_min"] == pytest.approx(-0.1 / 0.05)


def test_a_baseline_without_noise_takes_the_first_that_was_measured():
    state, _ = measure(None, profile(near_unit_mass=0.8), 0)
    state, drift = measure(state, profile(near_unit_mass=0.7), 10)
    assert drift.sigmas_from_baseline == {}
    for step in (20, 30):
        state, drift = measure(state, profile(near_unit_mass=0.7, noise={"near_unit_mass_min": 0.03}), step)
        assert drift.sigmas_from_baseline["near_unit_mass_min"] == pytest.approx(-0.1 / (0.03 * math.sqrt(2)))


@given(wobble=st.floats(1e-3, 0.1), noise=st.floats(1e-3, 0.1))
def test_noise_and_the_trailing_deviation_add_in_squares(wobble: float, noise: float):
    figures = [0.5, 0.5 + wobble, 0.5 - wobble, 0.45]
    _, plain = follow({10 * n: profile(near_unit_mass=figure) for n, figure in enumerate(figures)})
    _, noisy = follow(
        {10 * n: profile(near_unit_mass=x, noise={"near_unit_mass_min": noise}) for n, x in enumerate(figures)}
    )
    moved = plain[-1].from_trailing("near_unit_mass_min")
    deviation = moved / plain[-1].sigmas_from_trailing["near_unit_mass_min"]
    expected = moved / math.hypot(deviation, noise)
    assert noisy[-1].sigmas_from_trailing["near_unit_mass_min"] == pytest.approx(expected)
    assert noisy[-1].from_trailing("near_unit_mass_min") == moved


def test_the_distance_of_spectra_is_taken_to_the_baseline_and_to_the_average_of_quantiles():
    moved = {0: 1.0, 10: 1.5, 20: 2.0}
    state, drifts = follow({step: profile(modulus_quantiles=spectrum(x)) for step, x in moved.items()})
    assert drifts[0].distances["wasserstein_mean"] == {"baseline": 0.0}
    assert drifts[1].distances["wasserstein_mean"] == pytest.approx({"baseline": 0.5, "trailing": 0.5})
    # A tenth of the way from 1 to 1.5 is forgotten to after ten steps.
    assert drifts[2].distances["wasserstein_mean"] == pytest.approx({"baseline": 1.0, "trailing": 0.95})
    assert drifts[2].distances["wasserstein_max"] == pytest.approx({"baseline": 1.0, "trailing": 0.95})
    assert drifts[2].from_baseline("wasserstein_mean") == pytest.approx(1.0)
    assert state is not None
    assert state.trailing_curves["h.1"] == pytest.approx(spectrum(1.05 + 0.1 * 0.95))


def test_a_distance_in_sigmas_is_over_the_distances_so_far_and_its_noise():
    moved = {0: 1.0, 10: 1.5, 20: 2.0}
    _, drifts = follow(
        {step: profile(modulus_quantiles=spectrum(x), noise={"wasserstein_mean": 0.2}) for step, x in moved.items()}
    )
    variance = 0.5**2  # of the one deviation so far
    assert drifts[2].sigmas_from_trailing["wasserstein_mean"] == pytest.approx(0.95 / math.sqrt(variance + 0.04))
    assert drifts[2].sigmas_from_baseline["wasserstein_mean"] == pytest.approx(1.0 / math.sqrt(0.08))


def test_a_profile_without_spectra_has_no_distance_and_ends_no_average():
    with_spectra, without = profile(modulus_quantiles=spectrum(1.0)), profile()
    _, drifts = follow({0: with_spectra, 10: without, 20: profile(modulus_quantiles=spectrum(1.3))})
    assert drifts[1].distances == {}
    assert drifts[2].distances["wasserstein_mean"] == pytest.approx({"baseline": 0.3, "trailing": 0.3})
    _, drifts = follow({0: without, 10: with_spectra, 20: with_spectra})
    assert drifts[2].distances["wasserstein_mean"] == {"trailing": 0.0}, "the baseline has none"


def test_a_reference_stands_beside_the_run_at_the_same_step():
    noise = {"near_unit_mass_min": 0.03}
    healthy = {step: profile(near_unit_mass=0.8 - step / 100, noise=noise) for step in (0, 20)}
    reference = Reference.of("good", healthy.items())
    state, first = measure(None, profile(near_unit_mass=0.8), 0, reference)
    assert first.moved("near_unit_mass_min", "reference") == 0.0
    now = profile(near_unit_mass=0.5, noise={"near_unit_mass_min": 0.04})
    state, drift = measure(state, now, 10, reference)
    assert drift.reference["near_unit_mass_min"] == pytest.approx(0.7)
    assert drift.moved("near_unit_mass_min", "reference") == pytest.approx(-0.2)
    assert drift.sigmas_from_reference["near_unit_mass_min"] == pytest.approx(-0.2 / 0.05)
    _, drift = measure(state, profile(near_unit_mass=0.5), 30, reference)
    assert drift.reference == {}, "the reference ended before"


def test_a_reference_with_another_probe_is_refused():
    reference = Reference.of("good", [(0, profile(probe="bb"))])
    with pytest.raises(ProfileError, match="than the reference run good"):
        measure(None, profile(), 10, reference)


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


@given(figures=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), undone=st.lists(st.floats(0.0, 1.0), max_size=5))
def test_a_rewound_run_that_knows_its_events_has_the_average_it_had(figures: list[float], undone: list[float]):
    def at(n: int, x: float) -> ModelProfile:
        return profile(near_unit_mass=x, loss=10 * x, modulus_quantiles=spectrum(x) if n % 3 else None)

    before, kept = follow({10 * n: at(n, x) for n, x in enumerate(figures)})
    state = before
    for n, x in enumerate(undone, start=len(figures)):
        state, _ = measure(state, at(n, x), 10 * n)
    assert before is not None
    assert state is not None
    late = measure(state, profile(), 0)[1]
    # A drift does not hold the spectrum, so that average alone starts anew.
    assert rewind(state, 10 * len(figures), [*kept, late]) == dataclasses.replace(before, trailing_curves={})


def test_a_run_that_went_back_before_its_baseline_keeps_it():
    state, kept = follow({50: profile(), 60: profile(near_unit_mass=0.4)})
    assert state is not None
    after, drift = measure(rewind(state, 30, kept), profile(near_unit_mass=0.7), 30)
    assert after is not None
    assert (drift.late, after.step, after.baseline_step) == (False, 30, 50)


@pytest.mark.parametrize("other", [profile(probe="bb"), profile(settings={"eps": 1e-4})])
def test_another_probe_or_other_settings_are_refused(other: ModelProfile):
    state, _ = measure(None, profile(), 10)
    with pytest.raises(ProfileError, match="another probe or other settings"):
        measure(state, other, 20)


def test_identity_ignores_the_order_of_settings():
    one, two = profile(settings={"a": 1, "b": 2}), profile(settings={"b": 2, "a": 1})
    assert identity(one) == identity(two)


def test_the_state_survives_json():
    state, _ = follow(
        {
            10 * n: profile(near_unit_mass=0.8 - 0.01 * n, loss=2.0, modulus_quantiles=spectrum(n), noise={"loss": 0.1})
            for n in range(1, 6)
        }
    )
    assert state is not None
    assert DriftState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_state_of_before_spectra_and_noise_goes_on():
    """As the release before wrote it."""
    old = {
        "identity": identity(profile()),
        "baseline_step": 10,
        "baseline": {"near_unit_mass_min": 0.8, "near_unit_mass_mean": 0.8, "loss": 3},
        "step": 20,
        "trailing": {"near_unit_mass_min": 0.75, "near_unit_mass_mean": 0.75, "loss": 3},
        "variance": {"near_unit_mass_min": 0.0001, "near_unit_mass_mean": 0.0001, "loss": 0},
    }
    state, drift = measure(DriftState.from_dict(old), profile(near_unit_mass=0.7, modulus_quantiles=spectrum(1.0)), 30)
    assert drift.from_baseline("near_unit_mass_min") == pytest.approx(-0.1)
    assert drift.sigmas_from_trailing["near_unit_mass_min"] == pytest.approx(-5.0)
    assert drift.moved("log_growth_max", "trailing") is None, "the release before did not look at it"
    assert state is not None
    _, drift = measure(state, profile(modulus_quantiles=spectrum(1.5)), 40)
    assert drift.distances["wasserstein_mean"] == {"trailing": 0.5}
    assert drift.moved("log_growth_max", "trailing") == 0.0


numbers = st.dictionaries(st.sampled_from(FEATURES), st.floats(allow_nan=False, allow_infinity=False))
drifts = st.builds(
    Drift,
    st.integers(0, 10**6),
    numbers,
    numbers,
    numbers,
    numbers,
    st.dictionaries(st.sampled_from(DISTANCES), st.dictionaries(st.just("trailing"), st.floats(0, 9), min_size=1)),
    numbers,
    numbers,
    numbers,
    numbers,
    st.booleans(),
)


@given(drifts)
def test_a_drift_survives_json_exactly(drift: Drift):
    assert Drift.from_dict(json.loads(json.dumps(drift.to_dict(), allow_nan=False))) == drift


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_figure_that_is_not_finite_poisons_no_average_and_is_counted(bad: float) -> None:
    state, drift = measure(None, profile(kreiss_constant=bad, loss=bad), 0)
    assert "loss" not in drift.values
    assert drift.values["not_finite_figures"] == 1.0
    for step in (10, 20):
        state, drift = measure(state, profile(kreiss_constant=2.0, loss=1.0), step)
    assert drift.from_trailing("log_kreiss_mean") == 0.0
    assert drift.from_trailing("loss") == 0.0
