"""The distance of spectra against SciPy's exact one, with the error that the docstring states, and its own algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.wasserstein import QUANTILES, between, distances, modulus_quantiles, wasserstein

# Six digits are stored: two quantiles are off by half a unit of the sixth each.
STORED = 1e-5

moduli = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=200)


def spectrum(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(size=size) + 1j * rng.normal(size=size)


@given(one=moduli, other=moduli)
def test_it_is_the_exact_distance_but_for_a_64th_of_the_ranges(one: list[float], other: list[float]):
    found = wasserstein(modulus_quantiles(one), modulus_quantiles(other))
    exact = scipy.stats.wasserstein_distance(one, other)
    bound = (np.ptp(one) + np.ptp(other)) / (2 * QUANTILES)
    assert abs(found - exact) <= bound + STORED * (max(one) + max(other))


def test_the_bound_is_not_idle():
    """One of 64 modes is far out: the midpoints do not see it, and the exact distance is a 64th of its reach."""
    far = [0.0] * 63 + [64.0]
    assert scipy.stats.wasserstein_distance(far, [0.0]) == 1.0
    assert wasserstein(modulus_quantiles(far), modulus_quantiles([0.0])) == 0.0


@pytest.mark.parametrize("size", [32, 64, 256])
def test_whole_spectra_that_move_by_one_number_are_that_number_apart(size: int):
    values = np.abs(spectrum(np.random.default_rng(size), size))
    assert wasserstein(modulus_quantiles(values), modulus_quantiles(values + 0.25)) == pytest.approx(0.25, rel=STORED)
    assert wasserstein(modulus_quantiles(values), modulus_quantiles(3 * values)) == pytest.approx(
        2 * np.mean(modulus_quantiles(values)), rel=STORED
    )


def test_a_spectrum_of_as_many_modes_as_quantiles_is_kept_whole():
    values = spectrum(np.random.default_rng(0), QUANTILES)
    assert modulus_quantiles(values) == pytest.approx(np.sort(np.abs(values)), rel=STORED)


def test_the_order_and_the_angles_of_the_eigenvalues_do_not_matter():
    rng = np.random.default_rng(1)
    values = spectrum(rng, 50)
    turned = rng.permutation(values) * np.exp(2j * np.pi * rng.random(50))
    assert modulus_quantiles(turned) == pytest.approx(modulus_quantiles(values), rel=STORED)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [1.0, math.inf]])
def test_what_has_no_finite_spectrum_has_no_quantiles(bad: list[float]):
    assert modulus_quantiles(bad) is None


@given(one=moduli, other=moduli, third=moduli)
def test_it_is_a_metric_of_quantile_functions(one: list[float], other: list[float], third: list[float]):
    a, b, c = (modulus_quantiles(values) for values in (one, other, third))
    assert wasserstein(a, a) == 0.0
    assert wasserstein(a, b) == wasserstein(b, a)
    assert wasserstein(a, c) <= (wasserstein(a, b) + wasserstein(b, c)) * (1 + 1e-12)


@given(one=moduli, other=moduli, weight=st.floats(0.0, 1.0))
def test_the_spectrum_between_two_divides_their_distance(one: list[float], other: list[float], weight: float):
    a, b = modulus_quantiles(one), modulus_quantiles(other)
    middle = between({"h": a}, {"h": b}, weight)["h"]
    scale = max(one) + max(other)
    assert wasserstein(a, middle) == pytest.approx(weight * wasserstein(a, b), rel=1e-10, abs=1e-12 * scale)
    assert list(middle) == pytest.approx(sorted(middle), abs=1e-12 * scale)


def test_layers_that_only_one_of_two_profiles_has_are_not_compared():
    flat = {"a": (1.0,) * QUANTILES, "b": (2.0,) * QUANTILES}
    assert distances(flat, {"a": (1.5,) * QUANTILES, "b": (4.0,) * QUANTILES, "c": (9.0,) * QUANTILES}) == {
        "wasserstein_mean": 1.25,
        "wasserstein_max": 2.0,
    }
    assert distances(flat, {"c": (9.0,) * QUANTILES}) == {}
    assert between({"a": flat["a"]}, {"b": flat["b"]}, 0.5) == flat
