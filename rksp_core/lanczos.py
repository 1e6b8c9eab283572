"""Largest singular values of many operators at once, by Lanczos on F* F with full re-orthogonalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rksp_core.resolvent import Family, inner

_LARGEST = 1e150
"""Entries of F* F x above this are given up as infinite, before their squares overflow."""


@dataclass(frozen=True)
class Largest:
    """The largest singular value of each F_i, from below, with its right singular vector.

    ``norms`` (k,) float64, infinite above 1e75, where |F|^4 would overflow; ``vectors`` (k, m) complex, of unit length
    in the family's metric; ``quotients`` (k,) complex, x* F x.
    """

    norms: Tensor
    vectors: Tensor
    quotients: Tensor


def largest_singular(family: Family, vectors: Tensor, *, steps: int, tolerance: float = 0.0) -> Largest:
    """Run at most ``steps`` Lanczos steps from the given starts; stop when every residual is below ``tolerance``.

    The residual |F*F x - s^2 x| / s^2 bounds the relative error of s^2 by itself, and by its square over the relative
    spectral gap. The values come from orthogonal projections, so they never exceed the norms (up to rounding).
    """
    krylov = Krylov(family, vectors, min(steps, vectors.shape[1]))
    while krylov.extend():
        if tolerance > 0 and krylov.count % 2 == 0 and bool((krylov.residuals() <= tolerance).all()):
            break
    x = krylov.ritz_vectors()
    dual, quotients = family.gram(x)
    norms = inner(x, dual).real.clamp_min(0.0).sqrt()
    return Largest(torch.where(krylov.overflowed, torch.inf, norms), x, quotients)


class Krylov:
    """One Krylov space of F* F an operator, all grown together.

    Re-orthogonalization works on the duals, and each new vector is made from its dual afterwards. Correcting both
    instead lets them drift apart by a factor |F*F| / beta a step, which ruined the values after 15 steps.
    """

    def __init__(self, family: Family, vectors: Tensor, capacity: int) -> None:
        k, m = vectors.shape
        self.family, self.capacity, self.count = family, capacity, 0
        self.vectors = torch.empty(k, capacity, m, dtype=torch.complex128)
        self.duals = torch.empty(k, capacity, m, dtype=torch.complex128)
        self.projection = torch.zeros(k, capacity, capacity, dtype=torch.float64)
        self.overflowed = torch.zeros(k, dtype=torch.bool)
        self._next = vectors, family.dual(vectors)
        self._beta = _length(*self._next)

    def extend(self) -> bool:
        """Add one vector to each space; False when the capacity is reached."""
        j = self.count
        scale = _reciprocal(self._beta)
        self.vectors[:, j], self.duals[:, j] = (part * scale for part in self._next)
        dual, _ = self.family.gram(self.vectors[:, j])
        self.overflowed |= ~(dual.abs() < _LARGEST).all(dim=1)
        dual = torch.where(self.overflowed[:, None], 0.0, dual)
        self.projection[:, j, j] = inner(self.vectors[:, j], dual).real
        dual = self._orthogonal(dual, j + 1)
        vector = self.family.vector(dual)
        self._next = vector, dual
        # below rounding the space is invariant: what would follow is noise, and a zero vector keeps it out
        beta = _length(vector, dual)
        self._beta = torch.where(beta > 1e-14 * self.projection[:, 0, 0], beta, 0.0)
        self.count += 1
        if self.count < self.capacity:
            self.projection[:, j, j + 1] = self.projection[:, j + 1, j] = self._beta
        return self.count < self.capacity

    def ritz_values(self) -> Tensor:
        """Return the largest Ritz value of F* F in each space, (k,)."""
        values: Tensor = torch.linalg.eigvalsh(self.projection[:, : self.count, : self.count])
        return torch.where(self.overflowed, torch.inf, values[:, -1])

    def residuals(self) -> Tensor:
        """Return the relative residual of the largest Ritz pair, (k,)."""
        values, coordinates = torch.linalg.eigh(self.projection[:, : self.count, : self.count])
        relative: Tensor = self._beta * coordinates[:, -1, -1].abs() / values[:, -1]
        return torch.where(values[:, -1] > 0, relative, 0.0)

    def ritz_vectors(self) -> Tensor:
        """Return the Ritz vector of the largest value, (k, m), of unit length."""
        _, coordinates = torch.linalg.eigh(self.projection[:, : self.count, : self.count])
        weights = coordinates[:, None, :, -1].to(torch.complex128)
        x = torch.bmm(weights, self.vectors[:, : self.count])[:, 0]
        return x * _reciprocal(_length(x, self.family.dual(x)))

    def _orthogonal(self, dual: Tensor, j: int) -> Tensor:
        """Remove the first j directions, twice: once is not enough (Giraud, Langou & Rozloznik 2005)."""
        for _ in range(2):
            weights = torch.bmm(self.vectors[:, :j], dual.conj()[..., None])
            dual = dual - torch.bmm(weights.mH, self.duals[:, :j])[:, 0]
        return dual


def _length(vector: Tensor, dual: Tensor) -> Tensor:
    return inner(dual, vector).real.clamp_min(0.0).sqrt()


def _reciprocal(lengths: Tensor) -> Tensor:
    """1 / length as a column; 0 for a zero vector, which stays one (F = 0, as high powers are)."""
    return torch.where(lengths > 0, 1 / lengths, 0.0)[:, None]
