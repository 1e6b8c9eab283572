import math

import numpy as np
import pytest
import torch

from rksp_core.eigensystem import eigensystem


def random_matrix(m, seed=0):
    return np.random.default_rng(seed).standard_normal((m, m)) / math.sqrt(m)


@pytest.mark.parametrize("m", [1, 2, 3, 10, 33])
def test_every_part_solves_the_eigenvalue_equation(m):
    A = random_matrix(m, seed=m)
    es = eigensystem(A)
    a = torch.as_tensor(A, dtype=torch.complex128)
    v, u = es.right_vectors, es.left_vectors
    torch.testing.assert_close(a @ v, v * es.eigenvalues, rtol=0, atol=1e-12)
    torch.testing.assert_close(u @ a, es.eigenvalues[:, None] * u, rtol=0, atol=1e-10)
    torch.testing.assert_close(u @ v, torch.eye(m, dtype=torch.complex128), rtol=0, atol=1e-11)
    torch.testing.assert_close(v.abs().square().sum(0), torch.ones(m, dtype=torch.float64))
    torch.testing.assert_close(es.eigenvalue_conditions, torch.linalg.vector_norm(u, dim=1), rtol=1e-10, atol=1e-12)


def test_the_condition_is_that_of_the_complex_eigenvector_matrix():
    A = random_matrix(40, seed=7)
    es = eigensystem(A)
    assert es.eigenvector_condition == pytest.approx(np.linalg.cond(np.linalg.eig(A)[1]), rel=1e-9)
    assert es.spectral_radius == pytest.approx(np.abs(np.linalg.eigvals(A)).max(), rel=1e-12)


def test_a_normal_matrix_has_condition_one():
    q, _ = np.linalg.qr(random_matrix(12))
    es = eigensystem(q @ np.diag(np.linspace(-1, 1, 12)) @ q.T)
    assert es.eigenvector_condition == pytest.approx(1.0, abs=1e-10)
    torch.testing.assert_close(es.eigenvalue_conditions, torch.ones(12, dtype=torch.float64))


def test_a_jordan_block_is_reported_as_defective():
    es = eigensystem(0.5 * np.eye(6) + np.eye(6, k=1))
    assert es.eigenvector_condition == math.inf
    assert es.inverse is None
    assert es.left_vectors is None
    assert bool(torch.isinf(es.eigenvalue_conditions).all())


def test_an_empty_operator_is_allowed():
    es = eigensystem(np.zeros((0, 0)))
    assert (es.size, es.pairs, es.spectral_radius, es.eigenvector_condition) == (0, 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(np.zeros((2, 3)), "square"), (np.full((2, 2), np.nan), "NaN"), (np.eye(2) * 1j, "complex")],
)
def test_bad_input_is_named(bad, words):
    with pytest.raises(ValueError, match=words):
        eigensystem(bad)


def test_float32_and_torch_input_are_computed_in_float64():
    A = random_matrix(5).astype(np.float32)
    assert eigensystem(A).eigenvalues.dtype == torch.complex128
    assert eigensystem(torch.from_numpy(A).requires_grad_()).basis.requires_grad is False
