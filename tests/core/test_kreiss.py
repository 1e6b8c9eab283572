"""The Kreiss constant against closed forms, theorems and a dense grid of SVDs."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksp_core.eigensystem import eigensystem
from rksp_core.kreiss import kreiss_constant, reference_radius, transient_growth
from rksp_core.kreiss_certificate import upper_bound
from rksp_core.lanczos import largest_singular
from rksp_core.resolvent import BASIS_LIMIT, GRAM_LIMIT, EigenForm, SchurForm, form_of
from tests.core.kreiss_oracle import growth_by_powers, kreiss_by_grid, product

GRID = 1e-6
"""The tolerance that is promised against a dense grid with refinement."""


def gaussian(m, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal((m, m)) / math.sqrt(m)


def orthogonal(m, seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((m, m)))
    return q * np.sign(np.diag(r))


def grcar(m):
    return np.diag(np.ones(m)) - np.diag(np.ones(m - 1), -1) + sum(np.diag(np.ones(m - j), j) for j in (1, 2, 3))


def jordan(m, value, off=1.0):
    return value * np.eye(m) + off * np.eye(m, k=1)


def residual_layer(m, seed):
    """I + a low-rank update of a few strong directions + noise, whitened unevenly: what a trained block looks like."""
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((2, m, 3))
    layer = 0.8 * np.eye(m) + gaussian(m, seed + 1, 0.4) + 3 * u @ v.T / m
    scale = np.geomspace(1, 6, m)
    return layer * scale / scale[:, None]


def nearly_defective(m, seed, gap):
    """Pairs of eigenvalues ``gap`` apart that share a Jordan block's coupling."""
    values = np.repeat(np.linspace(-0.9, 0.9, (m + 1) // 2), 2)[:m] + gap * np.arange(m)
    q = orthogonal(m, seed)
    return q @ (np.diag(values) + np.triu(gaussian(m, seed), 1)) @ q.T


MATRICES = {
    "gaussian": gaussian(24, 0),
    "gaussian, large rho": gaussian(24, 1, 4.0),
    "gaussian, small rho": gaussian(24, 2, 0.6),
    "residual layer": residual_layer(40, 3),
    "another residual layer": residual_layer(40, 4),
    "nearly defective": nearly_defective(16, 5, 1e-3),
    "more nearly defective": nearly_defective(16, 6, 1e-7),
    "upper triangular": np.triu(gaussian(20, 7, 2.0)),
    "Jordan": jordan(10, 0.5, 0.6),
    "Jordan, negative": jordan(8, -0.7, 0.3),
    "companion": np.eye(12, k=-1) + np.outer(np.eye(12)[0], np.linspace(0.3, -0.2, 12)),
    "rotation": np.array([[0.0, 2.0], [-0.5, 0.0]]),
    "Grcar": grcar(20),
    "nilpotent": np.eye(6, k=1) * 1.7,
}


@functools.cache
def truth(name):
    A = MATRICES[name]
    return kreiss_by_grid(A, reference_radius(np.abs(np.linalg.eigvals(A)).max()))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_the_value_is_that_of_a_dense_grid_with_refinement(name):
    A = MATRICES[name]
    found = kreiss_constant(A)
    assert found.theta == pytest.approx(reference_radius(np.abs(np.linalg.eigvals(A)).max()), rel=1e-12)
    assert found.value == pytest.approx(truth(name), rel=GRID)
    if math.isfinite(abs(found.point)):
        assert product(A, found.point, found.theta) == pytest.approx(found.value, rel=1e-8)


def test_grcar_has_its_known_value():
    A = grcar(48)
    found = kreiss_constant(A, 1.1 * np.abs(np.linalg.eigvals(A)).max())
    assert found.value == pytest.approx(509.15488, rel=1e-7)
    assert found.classical == math.inf


@pytest.mark.parametrize("eigenvalues", [np.linspace(-1, 1, 9), np.full(5, 0.3), np.linspace(-3, 2, 7)])
def test_a_symmetric_matrix_has_constant_one(eigenvalues):
    q = orthogonal(len(eigenvalues), 1)
    found = kreiss_constant(q @ np.diag(eigenvalues) @ q.T)
    assert found.value == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("theta", [None, 1.0])
def test_identity_and_rotations_are_not_infinite(theta):
    # at depth 1e-7 from a unit eigenvalue rounding is worth 1e-9, and a perturbation of 1e-12 is worth 1e-5
    for A, tolerance in ((np.eye(6), 1e-8), (orthogonal(7, 2), 1e-8), (np.eye(4) + 1e-12 * gaussian(4, 0), 1e-5)):
        found = kreiss_constant(A, theta)
        assert found.value == pytest.approx(1.0, abs=tolerance)
        assert found.classical == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize(("a", "b", "c"), [(0.5, -0.3, 10.0), (0.9, 0.9, 1.0), (1.2, 0.1, 40.0), (0.2, 0.25, 1e4)])
def test_two_by_two_against_its_exact_resolvent(a, b, c):
    """|R| of [[a, c], [0, b]]: the larger singular value of [[1/(z-a), c/((z-a)(z-b))], [0, 1/(z-b)]]."""
    found = kreiss_constant([[a, c], [0.0, b]])

    def exact(z):
        p, q, r = 1 / (z - a), c / ((z - a) * (z - b)), 1 / (z - b)
        square, determinant = abs(p) ** 2 + abs(q) ** 2 + abs(r) ** 2, abs(p * r)
        return math.sqrt((square + math.sqrt(max(square**2 - 4 * determinant**2, 0.0))) / 2)

    depth = np.geomspace(1e-4, 1e4, 20_001)
    z = found.theta * (1 + depth)[:, None] * np.array([1.0, -1.0, 1j])
    best = max((abs(p) - found.theta) * exact(p) for p in z.ravel())
    assert found.value == pytest.approx(best, rel=GRID)
    assert found.value >= best * (1 - 1e-12)


def test_the_smallest_sizes():
    assert kreiss_constant(np.zeros((0, 0)), certify=True).value == 1.0
    for number in (0.0, 0.4, -1.0, 3.0):
        found = kreiss_constant([[number]], certify=True)
        assert found.value == pytest.approx(1.0, abs=1e-8)
        assert found.lower <= found.upper <= 1.05


def test_an_eigenvalue_on_the_circle_contributes_its_condition():
    """At theta = rho a simple eigenvalue is approached, and (|z| - rho) |R| tends to |u| |v| / |u* v|."""
    A = np.array([[1.0, 3.0], [0.0, 0.0]])
    assert kreiss_constant(A, 1.0).value == pytest.approx(math.sqrt(10), rel=1e-6)


# -- the classical constant and theta --------------------------------------------------------------------------------


def test_the_classical_constant_is_infinite_above_one_and_finite_below():
    A = gaussian(12, 3)
    A /= np.abs(np.linalg.eigvals(A)).max()
    assert kreiss_constant(1.001 * A).classical == math.inf
    below = kreiss_constant(0.98 * A)
    assert below.theta > 1.0
    assert below.classical == pytest.approx(kreiss_by_grid(0.98 * A, 1.0), rel=GRID)
    assert below.classical >= below.value
    inside = kreiss_constant(0.5 * A)
    assert (inside.theta, inside.classical) == (1.0, inside.value)


def test_a_defective_eigenvalue_on_the_unit_circle_makes_the_classical_constant_infinite():
    """For [[1, 1], [0, 1]] |A^n| grows like n, and (|z| - 1) |R| like 1 / (|z| - 1)."""
    found = kreiss_constant(jordan(2, 1.0), certify=True)
    assert found.classical == math.inf
    assert kreiss_constant(jordan(2, 1.0), 1.0, certify=True).upper == math.inf
    # at theta = 1.05 the resolvent is exact: sup over e > 0 of (|z| - theta) |R(z)| with z = theta + e real
    e = np.linspace(0.01, 0.2, 20_001)
    p, q = 1 / (0.05 + e), 1 / (0.05 + e) ** 2
    exact = np.max(e * (q + np.sqrt(q**2 + 4 * p**2)) / 2)
    assert found.value == pytest.approx(exact, rel=GRID)


def test_values_beyond_float64_are_infinite_rather_than_wrong():
    assert kreiss_constant(jordan(60, 1.0, 0.8), 1.00001, certify=True).upper == math.inf


def test_a_given_theta_is_used():
    A = gaussian(12, 4)
    found = kreiss_constant(A, 2.5)
    assert found.theta == 2.5
    assert found.value == pytest.approx(kreiss_by_grid(A, 2.5), rel=GRID)


@pytest.mark.parametrize(
    ("A", "theta", "words"),
    [
        (np.zeros((2, 3)), None, "square"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), None, "finite"),
        (2 * np.eye(3), 1.9, "below the spectral radius"),
        (np.eye(3), -1.0, "positive"),
        (np.eye(3), math.nan, "positive"),
    ],
)
def test_bad_input_is_one_sentence(A, theta, words):
    with pytest.raises(ValueError, match=words) as caught:
        kreiss_constant(A, theta)
    assert "\n" not in str(caught.value)


def test_an_eigensystem_is_used_and_must_fit():
    A = gaussian(10, 5)
    assert kreiss_constant(A, eigensystem=eigensystem(A)) == kreiss_constant(A)
    with pytest.raises(ValueError, match="order 10"):
        kreiss_constant(np.eye(3), eigensystem=eigensystem(A))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_float_tensor_is_computed_in_float64(dtype):
    A = torch.tensor(gaussian(8, 6, 2.0), dtype=dtype)
    assert kreiss_constant(A) == kreiss_constant(A.to(torch.float64).numpy())


# -- properties ------------------------------------------------------------------------------------------------------

matrices = st.builds(
    lambda m, seed, scale, skew: gaussian(m, seed, scale) + skew * np.triu(gaussian(m, seed + 1), 1),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.floats(0.1, 4.0),
    st.floats(0.0, 8.0),
)


@given(matrices)
@settings(max_examples=40, deadline=None)
def test_kreiss_matrix_theorem(A):
    """K_theta <= sup |A^n| / theta^n <= e m K_theta (Trefethen & Embree 2005, Theorem 18.1)."""
    found = kreiss_constant(A)
    # |A^n| / theta^n has decayed long before n = 400: rho / theta <= 1 / 1.05
    growth = transient_growth(A, 400)
    assert found.value <= growth * (1 + 1e-8)
    assert growth <= math.e * len(A) * found.value * (1 + 1e-8)


@given(matrices, st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_orthogonal_similarity_changes_nothing(A, seed):
    q = orthogonal(len(A), seed)
    assert kreiss_constant(q @ A @ q.T).value == pytest.approx(kreiss_constant(A).value, rel=1e-7)


@given(matrices, st.floats(1.0, 20.0))
@settings(max_examples=25, deadline=None)
def test_theta_is_a_scale(A, factor):
    theta = factor * max(1.05 * np.abs(np.linalg.eigvals(A)).max(), 1e-3)
    scaled = kreiss_constant(A / theta, 1.0)
    assert kreiss_constant(A, theta).value == pytest.approx(scaled.value, rel=1e-7)
    assert scaled.classical == scaled.value


@given(matrices)
@settings(max_examples=30, deadline=None)
def test_the_certificate_encloses_the_value(A):
    found = kreiss_constant(A, certify=True)
    assert found.lower == found.value <= found.upper <= 1.05 * found.value


# -- the certificate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_the_bracket_holds_the_dense_grid_value_within_five_percent(name):
    A = MATRICES[name]
    found = kreiss_constant(A, certify=True)
    assert truth(name) <= found.upper * (1 + 1e-9)
    assert found.upper <= 1.05 * found.lower


def test_the_upper_bound_does_not_lean_on_the_value():
    """Told a value that is far too small, the certificate must still exceed the truth."""
    for name in ("Jordan", "nearly defective"):
        system = eigensystem(MATRICES[name])
        theta = reference_radius(system.spectral_radius)
        for share in (0.0, 0.9, 2.0):
            assert upper_bound(system, form_of(system), theta, share * truth(name)) >= truth(name) * (1 - 1e-12)


def test_on_the_spectral_radius_only_the_condition_number_is_left():
    A = gaussian(10, 8)
    radius = np.abs(np.linalg.eigvals(A)).max()
    found = kreiss_constant(A, radius, certify=True)
    assert found.value <= found.upper <= eigensystem(A).eigenvector_condition * (1 + 1e-7)


# -- the three forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "kind"),
    [(1, "gram"), (4, "gram"), (6, "basis"), (8, "basis"), (11, "schur")],
)
def test_each_conditioning_gets_a_form_that_is_accurate_there(exponent, kind):
    """A block [[0.7, 1], [0, 0.7 - gap]] has eigenvectors 10^-exponent apart."""
    rng = np.random.default_rng(exponent)
    gap = 10.0**-exponent
    # any rounding moves a double eigenvalue by 1e-8: the worst case survives only where LAPACK sees the triangle
    A, q = gaussian(20, exponent, 0.3), orthogonal(20, exponent)
    A[:2, :2], A[2:, :2] = np.array([[0.7, 1.0], [0.0, 0.7 - gap]]), 0.0
    A = q @ A @ q.T if exponent < 9 else np.triu(A)
    system = eigensystem(A)
    form = form_of(system)
    expected = "schur" if isinstance(form, SchurForm) else ("basis" if form.metric is None else "gram")
    assert expected == kind, (system.eigenvector_condition, GRAM_LIMIT, BASIS_LIMIT)
    assert kreiss_constant(A).value == pytest.approx(kreiss_by_grid(A, 1.0), rel=GRID)
    w = torch.from_numpy(0.9 * rng.random(5) * np.exp(2j * np.pi * rng.random(5)))
    resolvents = torch.linalg.inv(torch.eye(20) - w[:, None, None] * system.operator)
    x = form.coordinates(torch.randn(5, 20, dtype=torch.complex128))
    found = largest_singular(form.resolvents(w), x, steps=20)
    torch.testing.assert_close(found.norms, torch.linalg.matrix_norm(resolvents, 2), rtol=1e-7, atol=0)


def test_forms_agree_with_one_another():
    system = eigensystem(gaussian(70, 9))
    w = torch.polar(torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.3, 1.9, 3.0])).to(torch.complex128)
    norms = []
    for form in (EigenForm(system, gram=True), EigenForm(system, gram=False), SchurForm(system.operator)):
        x = form.coordinates(torch.randn(3, 70, dtype=torch.complex128))
        norms.append(largest_singular(form.resolvents(w), x, steps=70).norms)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-10, atol=0)


# -- transient growth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_system", [True, False])
@pytest.mark.parametrize("name", MATRICES)
def test_growth_is_the_largest_norm_of_the_powers(name, given_system):
    A = MATRICES[name]
    theta = reference_radius(np.abs(np.linalg.eigvals(A)).max())
    system = eigensystem(A) if given_system else None
    for horizon in (0, 1, 12):
        found = transient_growth(A, horizon, None if given_system else theta, eigensystem=system)
        assert found == pytest.approx(growth_by_powers(A, horizon, theta), rel=1e-8)


def test_growth_counts_the_start_and_refuses_nonsense():
    assert transient_growth(0.1 * np.eye(3), 10) == 1.0
    assert transient_growth(np.zeros((0, 0)), 3) == 1.0
    with pytest.raises(ValueError, match="horizon"):
        transient_growth(np.eye(2), -1)
    with pytest.raises(ValueError, match="positive"):
        transient_growth(np.eye(2), 3, 0.0)


def test_a_list_of_rows_is_an_operator_with_its_eigensystem_too():
    rows = [[0.5, 1.0], [0.0, 0.2]]
    assert kreiss_constant(rows, eigensystem=eigensystem(rows)) == kreiss_constant(rows)
