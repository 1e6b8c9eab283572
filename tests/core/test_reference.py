"""The healthy run at a step: its own profiles where it has one, the straight line between where it has not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.errors import ProfileError
from rksp_core.reference import Reference
from tests.core.profiles import profile, spectrum


def line(*steps: int, gap: int | None = None) -> Reference:
    """Return a reference whose numbers are linear in the step, so that they are known at every step."""
    profiles = {
        step: profile(near_unit_mass=step / 1000, loss=float(step), modulus_quantiles=spectrum(1 + step / 100))
        for step in steps
    }
    return Reference.of("good", profiles.items(), gap=gap)


@given(steps=st.lists(st.integers(0, 1000), min_size=1, max_size=8, unique=True), step=st.integers(0, 1000))
def test_what_is_linear_is_found_exactly_within_the_range_and_nothing_beyond(steps: list[int], step: int):
    point = line(*steps).at(step)
    if not min(steps) <= step <= max(steps):
        assert point is None
        return
    assert point is not None
    assert point.numbers["near_unit_mass_min"] == pytest.approx(step / 1000)
    assert point.numbers["loss"] == pytest.approx(step)
    assert point.curves["h.0"] == pytest.approx(spectrum(1 + step / 100), rel=1e-10)


def test_between_profiles_too_far_apart_it_says_nothing():
    reference = line(0, 10, 30, gap=10)
    assert reference.at(5) is not None
    assert reference.at(20) is None
    assert reference.at(30) is not None


def test_what_one_neighbour_does_not_know_is_left_out():
    blank = {"near_unit_mass": None, "status": ("not_finite",)}
    whole = profile(modulus_quantiles=spectrum(1.0))
    point = Reference.of("good", {0: whole, 10: profile(**blank)}.items()).at(5)
    assert point is not None
    assert "near_unit_mass_min" not in point.numbers
    assert point.numbers["log_sigma_max"] == pytest.approx(0.6931471805599453)
    assert point.curves == {}


def test_noise_holds_until_it_is_measured_again():
    profiles = {0: profile(noise={"loss": 0.1}), 10: profile(), 20: profile(noise={"loss": 0.2}), 30: profile()}
    reference = Reference.of("good", profiles.items())
    assert [reference.at(step).noise["loss"] for step in (0, 15, 20, 25, 30)] == [0.1, 0.1, 0.2, 0.2, 0.2]


def test_of_two_profiles_at_one_step_the_later_counts():
    again = Reference.of("good", [(5, profile(loss=1.0)), (0, profile()), (5, profile(loss=2.0))])
    assert again.steps == (0, 5)
    assert again.at(5).numbers["loss"] == 2.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            profile(probe="bb"),
            r"this run has another probe or other settings \(\w+\) than the reference run good \(\w+\)",
        ),
        (profile(settings={"eps": 1e-4}), "profile both with the same ones"),
        (profile(layers=2), r"has 2 layers \(h.0 \.\.\.\), the reference run good 3 \(h.0 \.\.\.\)"),
    ],
)
def test_what_must_not_be_compared_is_refused_in_one_sentence(other, message: str):
    with pytest.raises(ProfileError, match=message):
        line(0).check(other)
    with pytest.raises(ProfileError, match="step 10 of the reference run"):
        Reference.of("good", [(0, profile()), (10, other)])


def test_a_run_without_profiles_is_no_reference():
    with pytest.raises(ProfileError, match="the reference run good has no profile"):
        Reference.of("good", [])
