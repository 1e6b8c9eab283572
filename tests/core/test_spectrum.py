"""Masses and their filter, radius, departure from normality; and the paper's theorems as checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksp_core.dmd import Operator, whitened_dmd
from rksp_core.eigensystem import eigensystem
from rksp_core.spectrum import mode_residuals, spectral_masses, spectrum

from .planted import moments_of, random_operator, snapshots, spectral_distance


def operator_of(matrix: torch.Tensor, residual: float = 0.0) -> Operator:
    m = matrix.shape[0]
    eye = torch.eye(m, dtype=torch.float64)
    return Operator(matrix.double(), torch.ones(m, dtype=torch.float64), residual * eye, 0.5, 0.5, ())


def test_masses_at_their_thresholds() -> None:
    """0.80 and 0.90 belong to the band above, 1.05 to the near-unit one (Eq. 11-13)."""
    moduli = torch.tensor([0.79, 0.80, 0.89, 0.90, 1.05, 1.06, 1.0, -1.0], dtype=torch.complex128)
    assert spectral_masses(moduli) == {
        "near_unit_mass": 4 / 8,
        "expansive_mass": 1 / 8,
        "contractive_mass": 1 / 8,
        "mid_mass": 2 / 8,
    }


@given(st.lists(st.floats(0, 3), min_size=1, max_size=40))
def test_masses_sum_to_one(moduli: list[float]) -> None:
    assert sum(spectral_masses(torch.tensor(moduli, dtype=torch.complex128)).values()) == pytest.approx(1.0)


def test_masses_of_nothing_are_unavailable() -> None:
    with pytest.raises(ValueError, match="at least one eigenvalue"):
        spectral_masses(torch.empty(0, dtype=torch.complex128))
    figures = spectrum(operator_of(random_operator(5), residual=10.0), eigensystem(random_operator(5)))
    assert figures.reliable.modes == 0
    assert figures.reliable.near_unit_mass is None


def test_a_normal_operator_has_no_departure_and_perfect_condition() -> None:
    q = torch.linalg.qr(random_operator(9)).Q
    matrix = q @ torch.diag(torch.linspace(0.2, 1.2, 9, dtype=torch.float64)) @ q.T
    figures = spectrum(operator_of(matrix), eigensystem(matrix))
    assert figures.henrici_departure == pytest.approx(0.0, abs=1e-7)  # the root of a difference of equal squares
    assert figures.eigenvector_condition == pytest.approx(1.0, rel=1e-10)
    assert figures.sigma_max == pytest.approx(1.2, rel=1e-10)
    assert figures.spectral_radius == pytest.approx(1.2, rel=1e-10)


def test_a_nilpotent_operator_is_all_departure() -> None:
    matrix = torch.diag(torch.ones(4, dtype=torch.float64), diagonal=1)
    figures = spectrum(operator_of(matrix), eigensystem(matrix))
    assert figures.henrici_departure == pytest.approx(1.0)
    assert figures.eigenvector_condition == float("inf")
    assert len(figures.mode_residuals) == 5  # a defective operator still has residuals


@pytest.mark.parametrize("defective", [False, True])
def test_residuals_are_those_of_the_snapshots(defective: bool) -> None:
    """r_j from moments equals |u*(Yw - lam Xw)| / |u* Xw| from the whitened samples, for any left eigenvector."""
    planted = random_operator(6) if not defective else torch.eye(6, dtype=torch.float64).roll(1, 0).tril()
    x, y = snapshots(planted, 200, noise=0.2)
    operator = whitened_dmd(moments_of(x, y))
    values, residuals = mode_residuals(operator, eigensystem(operator.matrix))
    assert bool((residuals >= 0).all())
    assert spectral_distance(values, torch.linalg.eigvals(operator.matrix)) < 1e-8


@given(seed=st.integers(0, 1000), dimension=st.integers(2, 12))
@settings(deadline=None, max_examples=30)
def test_theorem_1_normal_operators(seed: int, dimension: int) -> None:
    """Kim et al. 2026, Thm 1: E|Ax|^2 = (1/d) sum |lam|^2 on the sphere, bounded by near-unit mass."""
    generator = np.random.default_rng(seed)
    q, _ = np.linalg.qr(generator.normal(size=(dimension, dimension)))
    lam = generator.uniform(0.0, 1.05, dimension)
    matrix = q @ np.diag(lam) @ q.T
    mean_square = np.trace(matrix.T @ matrix) / dimension  # E|Ax|^2 for x uniform on the sphere, exactly
    assert mean_square == pytest.approx(np.mean(lam**2), rel=1e-10)
    mass = spectral_masses(torch.as_tensor(lam, dtype=torch.complex128))["near_unit_mass"]
    assert 0.9**2 * mass <= mean_square + 1e-12
    assert mean_square <= 1.05**2 + 1e-12


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_theorem_1_diagonalizable_operators(seed: int) -> None:
    """The same within factors kappa^(+-2)."""
    matrix = random_operator(8, seed=seed)
    system = eigensystem(matrix)
    mean_square = float(torch.trace(matrix.T @ matrix)) / 8
    eigen = float(system.eigenvalues.abs().square().mean())
    assert eigen / system.eigenvector_condition**2 <= mean_square <= eigen * system.eigenvector_condition**2


def test_corollary_2_needs_isotropic_inputs() -> None:
    """E|h_L|^2 = prod q_l holds with independent Haar rotations between layers; diag(.5, 1.5) twice breaks it."""
    generator = np.random.default_rng(0)
    diagonal = np.diag([0.5, 1.5])
    q = np.mean(np.diag(diagonal) ** 2)
    draws = []
    for _ in range(4000):
        angles = generator.uniform(0, 2 * np.pi, 2)
        a, b = (np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in angles)
        draws.append(np.sum((diagonal @ a @ diagonal @ b @ [1.0, 0.0]) ** 2))
    # A mean over 4000 draws: five standard errors.
    assert np.mean(draws) == pytest.approx(q**2, abs=5 * np.std(draws) / 4000**0.5)
    aligned = np.trace(np.linalg.matrix_power(diagonal, 4)) / 2
    assert aligned > 1.5 * q**2


@given(seed=st.integers(0, 1000), size=st.floats(1e-8, 1.0))
@settings(deadline=None, max_examples=30)
def test_bauer_fike(seed: int, size: float) -> None:
    """Kim et al. 2026, Prop. 3: eigenvalues of A + E lie within kappa |E| of those of A."""
    matrix = random_operator(7, seed=seed)
    shift = random_operator(7, seed=seed + 1) * size
    system = eigensystem(matrix)
    moved = torch.linalg.eigvals(matrix + shift)
    reach = system.eigenvector_condition * float(torch.linalg.matrix_norm(shift, 2))
    gaps = (moved[:, None] - system.eigenvalues[None, :]).abs().amin(1)
    assert float(gaps.max()) <= reach * (1 + 1e-9)


def test_theorem_4_the_estimate_converges_like_the_root_of_the_samples() -> None:
    """Kim et al. 2026, Thm 4: 16 times the samples, a quarter of the error (within a factor of two)."""
    planted = random_operator(16)

    def error(count: int) -> float:
        operators = [whitened_dmd(moments_of(*snapshots(planted, count, noise=0.5, seed=s))) for s in range(8)]
        truth = torch.linalg.eigvals(planted)
        return float(np.mean([spectral_distance(torch.linalg.eigvals(o.matrix), truth) for o in operators]))

    assert 2.0 < error(500) / error(8000) < 8.0
