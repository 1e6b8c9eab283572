"""The eigen-decomposition of one operator, computed once and shared by everything that needs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INVERTIBLE = 0.1 / torch.finfo(torch.float64).eps
"""A basis with a larger condition number than this has no digit left in its inverse."""


@dataclass(frozen=True, eq=False)
class Eigensystem:
    """Eigenvalues of a real m x m operator A and a real basis of its eigenspaces.

    The order is: p eigenvalues with a positive imaginary part, their p conjugates, then the real ones. The columns of
    ``basis`` are W = [sqrt2 Re v, sqrt2 Im v, v_real], each complex eigenvector v of unit length. W is the complex
    eigenvector matrix V times a unitary matrix, so both have the same singular values; a real inverse and a real SVD
    cost a third of the complex ones.

    Attributes
    ----------
    operator : Tensor
        A, (m, m), float64 on the CPU.
    eigenvalues : Tensor
        (m,), complex128, in the order above.
    basis : Tensor
        W, (m, m), float64.
    pairs : int
        p, the number of conjugate pairs.
    eigenvector_condition : float
        |V| |V^-1|, at least 1; infinite where A is defective to working precision.
    inverse : Tensor or None
        W^-1, (m, m), float64; None where ``eigenvector_condition`` is infinite.
    """

    operator: Tensor
    eigenvalues: Tensor
    basis: Tensor
    pairs: int
    eigenvector_condition: float
    inverse: Tensor | None

    @property
    def size(self) -> int:
        """m, the order of the operator."""
        return int(self.operator.shape[0])

    @cached_property
    def spectral_radius(self) -> float:
        """Largest |lambda|; 0 for an empty operator."""
        return float(self.eigenvalues.abs().max()) if self.size else 0.0

    @cached_property
    def right_vectors(self) -> Tensor:
        """V, (m, m), complex128: column j is the unit eigenvector of ``eigenvalues[j]``."""
        return _complex_pairs(self.basis, self.pairs, +1.0)

    @cached_property
    def left_vectors(self) -> Tensor | None:
        """V^-1, (m, m), complex128: row j is u_j*, with u_j* A = lambda_j u_j* and u_j* v_j = 1; None if defective."""
        if self.inverse is None:
            return None
        return _complex_pairs(self.inverse.mT, self.pairs, -1.0).mT

    @cached_property
    def eigenvalue_conditions(self) -> Tensor:
        """|u_j| |v_j| for each eigenvalue, (m,), float64, at least 1; infinite if A is defective."""
        if self.inverse is None:
            return torch.full((self.size,), math.inf, dtype=torch.float64)
        squares = self.inverse.square().sum(dim=1)
        p = self.pairs
        paired = (squares[:p] + squares[p : 2 * p]) / 2
        return torch.cat([paired, paired, squares[2 * p :]]).sqrt().clamp_min(1.0)


def eigensystem(A: Any) -> Eigensystem:
    """Decompose a real square matrix: eigenvalues, real eigenbasis, its inverse and its condition.

    Parameters
    ----------
    A : array or Tensor
        (m, m), real; any float dtype and device. The work is done in float64 on the CPU, where LAPACK's geev is.

    Returns
    -------
    Eigensystem
        For a defective A (a Jordan block) the inverse is None and the condition infinite: that is a finding, no error.

    Raises
    ------
    ValueError
        If A is not a real square matrix of finite numbers.
    """
    operator = as_operator(A)
    values, vectors = torch.linalg.eig(operator)
    upper, real = values.imag > 0, values.imag == 0
    v = vectors[:, upper]
    basis = torch.cat([math.sqrt(2) * v.real, math.sqrt(2) * v.imag, vectors.real[:, real]], dim=1)
    eigenvalues = torch.cat([values[upper], values[upper].conj(), values[real]])
    condition = _condition(basis)
    inverse = torch.linalg.inv(basis) if math.isfinite(condition) else None
    return Eigensystem(operator, eigenvalues, basis, int(upper.sum()), condition, inverse)


def as_operator(A: Any) -> Tensor:
    """Return A as a (m, m) float64 CPU tensor without gradient.

    Raises
    ------
    ValueError
        If A is not a real square matrix of finite numbers.
    """
    operator = A.detach() if isinstance(A, Tensor) else torch.from_numpy(np.array(A))
    if operator.ndim != 2 or operator.shape[0] != operator.shape[1]:
        raise ValueError(f"the operator has shape {tuple(operator.shape)}, expected a square matrix (m, m)")
    if operator.is_complex():
        raise ValueError("the operator is complex, expected a real matrix; pass its real part if that is what you mean")
    operator = operator.to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(operator).all()):
        raise ValueError("the operator holds NaN or infinite entries, expected finite numbers; check the activations")
    return operator


def _condition(basis: Tensor) -> float:
    """sigma_max / sigma_min of the eigenbasis; infinite beyond what float64 can tell from singular."""
    if basis.shape[0] == 0:
        return 1.0
    singular = torch.linalg.svdvals(basis)
    largest, smallest = float(singular[0]), float(singular[-1])
    return max(1.0, largest / smallest) if smallest * _INVERTIBLE > largest else math.inf


def _complex_pairs(columns: Tensor, pairs: int, sign: float) -> Tensor:
    """Turn real column pairs (a, b) into (a + s i b) / sqrt2 and its conjugate; the real columns follow unchanged."""
    a, b = columns[:, :pairs], columns[:, pairs : 2 * pairs]
    v = torch.complex(a, sign * b) / math.sqrt(2)
    return torch.cat([v, v.conj(), columns[:, 2 * pairs :].to(v.dtype)], dim=1)
