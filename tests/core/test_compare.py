"""Two profiles side by side: what moved, where most, and whether it is more than noise."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rksp_core.compare import compare
from rksp_core.profile import ModelProfile, WeightNorms
from tests.core.profiles import profile, spectrum


def with_layer(base: ModelProfile, index: int, **figures: object) -> ModelProfile:
    layers = list(base.layers)
    layers[index] = dataclasses.replace(layers[index], **figures)  # type: ignore[arg-type]
    return dataclasses.replace(base, layers=tuple(layers))


def test_a_profile_beside_itself_has_not_moved():
    same = profile(modulus_quantiles=spectrum(1.0), noise={"near_unit_mass_min": 0.01, "wasserstein_mean": 0.01})
    comparison = compare(same, same)
    assert all(row["change"] == 0.0 for row in comparison.drift.values())
    assert comparison.explanation == [
        "no layer moved by more than the spread of probe batches",
        "nothing over the layers moved by more than 3 sigmas of its measured noise",
    ]


def test_the_layer_that_moved_most_is_named_with_what_it_did():
    before = profile(modulus_quantiles=spectrum(1.0))
    after = with_layer(before, 1, near_unit_mass=0.5, modulus_quantiles=spectrum(1.3))
    comparison = compare(before, after)
    assert comparison.changes(1)["near_unit_mass"] == pytest.approx(-0.3)
    assert [comparison.distance(index) for index in range(3)] == pytest.approx([0.0, 0.3, 0.0])
    assert comparison.drift["wasserstein_mean"]["change"] == pytest.approx(0.1)
    assert comparison.drift["wasserstein_max"]["change"] == pytest.approx(0.3)
    assert comparison.explanation == [
        "near-unit mass moved in 1 of 3 layers (0 up, 1 down), most in h.1: 0.8 -> 0.5",
        "the moduli of the eigenvalues moved in 1 of 3 layers, most in h.1: by 0.3 on average (Wasserstein distance)",
    ]


def test_a_change_is_in_sigmas_of_both_noises_when_both_are_known():
    noise = {"near_unit_mass_min": 0.03, "log_sigma_max": 1.0, "wasserstein_mean": 0.03}
    before = profile(modulus_quantiles=spectrum(1.0), noise=noise)
    after = profile(
        near_unit_mass=0.5,
        sigma_max=2.0 * math.e,
        modulus_quantiles=spectrum(1.3),
        noise=noise | {"near_unit_mass_min": 0.04},
    )
    comparison = compare(before, after)
    assert comparison.drift["near_unit_mass_min"]["sigmas"] == pytest.approx(-0.3 / 0.05)
    assert comparison.drift["log_sigma_max"]["sigmas"] == pytest.approx(1 / math.sqrt(2))
    assert comparison.drift["log_kreiss_mean"]["sigmas"] is None
    assert comparison.explanation[-1] == (
        "beyond the measured noise, in sigmas: wasserstein_mean +7.1, near_unit_mass_min -6.0"
    )
    without = compare(dataclasses.replace(before, noise={}), after)
    assert {row["sigmas"] for row in without.drift.values()} == {None}
    assert "sigmas" not in " ".join(without.explanation)


def test_profiles_of_before_have_no_distance():
    comparison = compare(profile(), profile(modulus_quantiles=spectrum(1.0)))
    assert comparison.distance(0) is None
    assert "wasserstein_mean" not in comparison.drift


def test_weights_that_grew_are_said_where_both_profiles_know_them():
    before = dataclasses.replace(profile(), weights=WeightNorms(2.0, 3.0))
    after = dataclasses.replace(profile(), weights=WeightNorms(4.0, 3.1))
    assert compare(before, after).explanation == [
        "no layer moved by more than the spread of probe batches",
        "the largest spectral norm of a weight matrix in the blocks went from 2 to 4",
    ]
    assert compare(profile(), after).explanation == ["no layer moved by more than the spread of probe batches"]


def test_a_status_that_changed_is_said():
    after = with_layer(profile(), 2, status=("not_finite",), near_unit_mass=None)
    assert compare(profile(), after).explanation == ["h.2 was ok and is not_finite"]
