"""Functions of one operator, many at once: F = (I - wA)^-1 for many w, or A^n for many n, and their 2-norms.

Three forms, by the condition number kappa of the eigenvector basis W (see :func:`form_of`):

* ``gram``: in eigen-coordinates x = W y the operator F is (almost) diagonal, and its adjoint is that of the inner
  product of H = W^T W. One step for k points is then two real m x m by m x 2k products, with H and with H^-1.
* ``basis``: W and W^-1 apart, four products a step; loses kappa, not kappa^2, units of rounding.
* ``schur``: A = Q T Q*, shifted triangular solves, for any A (Trefethen & Embree 2005, Sec. 39), in blocks: only the
  diagonal blocks are solved point by point, the rest is matrix products that all points share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rksp_core.eigensystem import Eigensystem

GRAM_LIMIT = 1e5
BASIS_LIMIT = 1e9
_BLOCK = 32


class Family(Protocol):
    """The operators F_1 .. F_k on one m-dimensional space; vectors are rows of (k, m) complex tensors, one an operator.

    A vector y has a dual y' (the metric applied to it), so that <y, x> = sum conj(y') x.
    """

    def dual(self, y: Tensor) -> Tensor:
        """Return y'."""

    def vector(self, dual: Tensor) -> Tensor:
        """Return y from y'."""

    def gram(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dual of F* F y, (k, m), and the numbers <y, F y>, (k,)."""


class Form(Protocol):
    """A factorization of A that gives resolvents anywhere."""

    size: int

    def resolvents(self, w: Tensor) -> Family:
        """Return the family F_i = (I - w_i A)^-1, w of shape (k,) complex."""

    def coordinates(self, x: Tensor) -> Tensor:
        """Return y for ordinary vectors x, (k, m) complex, up to one unitary map of the space."""


def form_of(system: Eigensystem) -> Form:
    """Return the cheapest form that is accurate for this operator."""
    if system.eigenvector_condition <= GRAM_LIMIT:
        return EigenForm(system, gram=True)
    if system.eigenvector_condition <= BASIS_LIMIT:
        return EigenForm(system, gram=False)
    return SchurForm(system.operator)


class EigenForm:
    """A = W Lambda W^-1 on the real eigenbasis."""

    def __init__(self, system: Eigensystem, *, gram: bool) -> None:
        if system.inverse is None:
            raise ValueError("the operator is defective, expected an invertible eigenbasis; use SchurForm")
        self.size = system.size
        self.eigenvalues, self.pairs = system.eigenvalues, system.pairs
        self.basis, self.inverse = system.basis, system.inverse
        self.metric = (self.basis.mT @ self.basis, self.inverse @ self.inverse.mT) if gram else None

    def resolvents(self, w: Tensor) -> Family:
        """Return the family F_i = (I - w_i A)^-1."""
        return self.functions(1.0 / (1.0 - w[:, None] * self.eigenvalues))

    def coordinates(self, x: Tensor) -> Tensor:
        """Return y = W^-1 x in the gram form, x itself otherwise."""
        return x if self.metric is None else _real_product(self.inverse, x)

    def functions(self, values: Tensor) -> Family:
        """Return the family g_i(A), given values[i, j] = g_i(lambda_j), (k, m) complex."""
        blocks = _Blocks.of(values.to(torch.complex128), self.pairs)
        if self.metric is None:
            return _BasisFamily(self.basis, self.inverse, blocks)
        return _GramFamily(*self.metric, blocks)


@dataclass(frozen=True)
class _Blocks:
    """diag(g(lambda)) on the real eigenbasis: [[c, s], [-s, c]] for a pair, one number for a real eigenvalue."""

    diagonal: Tensor
    crossing: Tensor
    pairs: int

    @classmethod
    def of(cls, values: Tensor, pairs: int) -> _Blocks:
        plus, minus, real = values[:, :pairs], values[:, pairs : 2 * pairs], values[:, 2 * pairs :]
        c, s = (plus + minus) / 2, (plus - minus) * -0.5j
        return cls(torch.cat([c, c, real], dim=1), torch.cat([s, -s], dim=1), pairs)

    def times(self, y: Tensor) -> Tensor:
        return self._apply(self.diagonal, self.crossing, y)

    def adjoint_times(self, y: Tensor) -> Tensor:
        return self._apply(self.diagonal.conj(), -self.crossing.conj(), y)

    def _apply(self, diagonal: Tensor, crossing: Tensor, y: Tensor) -> Tensor:
        p = self.pairs
        out = diagonal * y
        out[:, :p] += crossing[:, :p] * y[:, p : 2 * p]
        out[:, p : 2 * p] += crossing[:, p:] * y[:, :p]
        return out


class _Orthonormal:
    """Coordinates whose metric is the identity."""

    def dual(self, y: Tensor) -> Tensor:
        return y

    def vector(self, dual: Tensor) -> Tensor:
        return dual


@dataclass(frozen=True)
class _GramFamily:
    metric: Tensor
    metric_inverse: Tensor
    blocks: _Blocks

    def dual(self, y: Tensor) -> Tensor:
        return _real_product(self.metric, y)

    def vector(self, dual: Tensor) -> Tensor:
        return _real_product(self.metric_inverse, dual)

    def gram(self, y: Tensor) -> tuple[Tensor, Tensor]:
        image = _real_product(self.metric, self.blocks.times(y))
        return self.blocks.adjoint_times(image), inner(y, image)


@dataclass(frozen=True)
class _BasisFamily(_Orthonormal):
    basis: Tensor
    inverse: Tensor
    blocks: _Blocks

    def gram(self, y: Tensor) -> tuple[Tensor, Tensor]:
        image = _real_product(self.basis, self.blocks.times(_real_product(self.inverse, y)))
        back = self.blocks.adjoint_times(_real_product(self.basis.mT, image))
        return _real_product(self.inverse.mT, back), inner(y, image)


class SchurForm:
    """A = Q T Q* with T complex upper triangular; the norms of F do not depend on Q, so Q is dropped."""

    def __init__(self, operator: Tensor) -> None:
        from scipy.linalg import schur

        triangle, _ = schur(operator.numpy(), output="complex")
        self.triangle = torch.from_numpy(triangle)
        self.size = int(triangle.shape[0])

    def resolvents(self, w: Tensor) -> Family:
        """Return the family F_i = (I - w_i A)^-1."""
        return _SchurFamily(self.triangle, w, self._diagonal_blocks(w))

    def coordinates(self, x: Tensor) -> Tensor:
        """Return x: Q* x is as good, and nobody needs to know which vector it was."""
        return x

    def _diagonal_blocks(self, w: Tensor) -> list[Tensor]:
        """(I - w T_bb)^-1 for every diagonal block, each (k, b, b)."""
        inverses = []
        for a in range(0, self.size, _BLOCK):
            t = self.triangle[a : a + _BLOCK, a : a + _BLOCK]
            eye = torch.eye(len(t), dtype=t.dtype)
            inverses.append(
                torch.linalg.solve_triangular(eye - w[:, None, None] * t, eye.expand(len(w), -1, -1), upper=True)
            )
        return inverses


@dataclass(frozen=True)
class _SchurFamily(_Orthonormal):
    triangle: Tensor
    w: Tensor
    inverses: list[Tensor]

    def gram(self, y: Tensor) -> tuple[Tensor, Tensor]:
        image = self._solve(y)
        return self._solve_adjoint(image), inner(y, image)

    def _solve(self, y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        for i in reversed(range(len(self.inverses))):
            a, b = i * _BLOCK, (i + 1) * _BLOCK
            right = y[:, a:b] + self.w[:, None] * (out[:, b:] @ self.triangle[a:b, b:].mT)
            out[:, a:b] = (self.inverses[i] @ right[..., None])[..., 0]
        return out

    def _solve_adjoint(self, y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        for i, inverse in enumerate(self.inverses):
            a, b = i * _BLOCK, (i + 1) * _BLOCK
            right = y[:, a:b] + self.w.conj()[:, None] * (out[:, :a] @ self.triangle[:a, a:b].conj())
            out[:, a:b] = (inverse.mH @ right[..., None])[..., 0]
        return out


def inner(dual: Tensor, x: Tensor) -> Tensor:
    """Row by row sum conj(dual) x: (k, m) and (k, m) -> (k,)."""
    products: Tensor = torch.linalg.vecdot(dual, x)
    return products


def _real_product(matrix: Tensor, y: Tensor) -> Tensor:
    """Row by row ``matrix @ y`` for a real matrix and complex rows y, (k, m), as one real product."""
    k, m = y.shape
    parts = torch.view_as_real(y.resolve_conj()).permute(0, 2, 1).reshape(2 * k, m) @ matrix.mT
    return torch.complex(parts.view(k, 2, m)[:, 0], parts.view(k, 2, m)[:, 1])
