"""A proven upper bound of the Kreiss constant, to stand beside the value that the search found.

With w = 1/z, F(w) = (I - wA)^-1 and g(r) = max over |w| = r of |F(w)|, K_theta is the supremum of (1 - theta r) g(r).

1. Towards infinity, with s = |A|: g(r) <= 1 / (1 - r s).
2. On a circle, from samples. Cut the power series after degree n into P + (wA)^(n+1) F; the rest is at most t g(r),
   t = r^(n+1) |A^(n+1)|. Where |P| is largest, at the angle p, samples near by are at least cos(n (q - p) / 2) max|P|
   (M. Riesz' comparison with a cosine; Ehlich & Zeller 1964). So p lies on no arc, of midpoint q and half angle h, with
   |P(q)| < cos(n h / 2) max|P|, and max|P| <= max of |P(q)| / cos(n h / 2) over arcs that cover the circle. So
       g(r) <= (1 + t) / (1 - t) * max over the arcs of |F(q)| / cos(n h / 2).
   Arcs are wide where |F| is small. A is real, so half the circle is enough.
3. Between circles log g is convex in log r (Hadamard's three circles: |F| is a supremum of |u* F v|).
4. At a sample, by k Lanczos steps from a random vector b. Let s be the Ritz value of F* F, and suppose that the
   largest eigenvalue exceeds (1 + x) s. Comparing with the polynomial sin((2k-1) a) / sin(a) in cos(a)^2 shows that
   the component b1 of b along its eigenvector obeys |b1| < 1 / sinh((2k-1) asinh(sqrt x)). For b uniform on the complex
   sphere that has probability at most (m-1) / sinh(..)^2, so ``_FAILURE`` gives x (cf. Kuczynski & Wozniakowski 1992).

So the bound holds but for rounding errors and that probability. Points, steps and circles are spent only where a
cheaper estimate does not stay below the ceiling that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from rksp_core.eigensystem import Eigensystem
from rksp_core.lanczos import Krylov
from rksp_core.resolvent import Form

_WIDTH = 0.049
"""The bracket that is aimed at, relative."""
_FAILURE = 1e-10
"""Probability that the Lanczos bound of one sample fails."""
_ROUNDING = 1e-8
_INTERPOLATION = 0.015
_TAIL = 6e-3
_FIRST_STEPS, _LAST_STEPS = 6, 96
_AMBITION = 1.7
_CHUNK = 96
_MOST_CIRCLES = 80
_MOST_SAMPLES = 8192


def upper_bound(system: Eigensystem, form: Form, theta: float, value: float) -> float:
    """Return a number that K_theta(A) does not exceed, within 5 % of ``value`` where the effort stays bounded.

    Parameters
    ----------
    system, form
        The operator's eigensystem and the form of its resolvents.
    theta : float
        Reference radius, at least rho. Where it is closer than about 1 % to rho the series converges too slowly, and
        only the bound K <= kappa remains (infinite for a defective operator).
    value : float
        The largest value found: it says where effort is worth spending and is not used otherwise.
    """
    if math.isinf(value):
        return math.inf
    certificate = _Certificate(system, form, theta, (1 + _WIDTH) * max(1.0, value))
    return max(value, min(certificate.bound(), system.eigenvector_condition) * (1 + _ROUNDING))


class _Certificate:
    def __init__(self, system: Eigensystem, form: Form, theta: float, ceiling: float) -> None:
        self.form, self.theta, self.ceiling = form, theta, ceiling
        self.norm = float(torch.linalg.matrix_norm(system.operator, 2)) / theta
        self.powers = _PowerNorms(system.operator / theta)
        self.generator = torch.Generator().manual_seed(0)
        self.circles = 0

    def bound(self) -> float:
        """Return the bound over all radii; r is measured in units of 1 / theta, so that the domain is 0 < r < 1."""
        if self.norm <= 1:
            return 1.0
        first = (self.ceiling - 1) / (self.ceiling * self.norm - 1)
        start = first, -math.log1p(-first * self.norm)
        return max((1 - first) * math.exp(start[1]), self._cover(start, (1.0, self._circle(1.0))))

    def _cover(self, left: tuple[float, float], right: tuple[float, float]) -> float:
        """Bound (1 - r) g(r) between two circles (r, log g), adding circles while that helps."""
        bound = _between(*left, *right)
        if bound <= self.ceiling or self.circles >= _MOST_CIRCLES or math.log(right[0] / left[0]) < 1e-3:
            return bound
        # in the middle of log e where r = 1 / (1 + e), as the search has its circles
        e = 1 / left[0] - 1
        e = math.sqrt(e * (1 / right[0] - 1)) if right[0] < 1 else e / 3
        middle = 1 / (1 + e), self._circle(1 / (1 + e))
        return max(self._cover(left, middle), self._cover(middle, right))

    def _circle(self, r: float) -> float:
        """Return an upper bound of log g(r), as tight as the ceiling asks."""
        self.circles += 1
        degree, tail = self._degree(r, _TAIL if r < 1 else 0.5)
        if not math.isfinite(tail):
            return math.inf
        # a part of the bracket is left for the interpolation between this circle and the next
        level = (1 - _INTERPOLATION) * self.ceiling / (1 - r) if r < 1 else math.inf
        factor = (1 + tail) / (1 - tail)
        return math.log(factor * self._polynomial_bound(r, degree, level / factor))

    def _degree(self, r: float, most: float) -> tuple[int, float]:
        """Return the lowest degree n whose t = r^(n+1) |A^(n+1)| is at most ``most``, and t; infinite if none is."""
        for power, norm in self.powers:
            if norm * r**power <= most:
                return power - 1, norm * r**power
        return 0, math.inf

    def _polynomial_bound(self, r: float, n: int, level: float) -> float:
        """Bound a polynomial of degree n on |w| = r by samples of F, splitting arcs until all are below ``level``."""
        number = max(1, math.ceil(0.75 * n))
        half = math.pi / (2 * number)
        arcs = _Arcs.of((2 * torch.arange(number, dtype=torch.float64) + 1) * half, half, _FIRST_STEPS)
        bound, seen, samples = 0.0, 0.0, 0
        while arcs:
            now, arcs, steps = arcs.fewest_steps()
            sharp = (now.halves * (n / 2)).cos()
            values = self._samples(torch.polar(torch.full_like(now.angles, r / self.theta), now.angles), steps)
            uppers = values * math.sqrt(1 + _excess(self.form.size, steps)) / sharp
            samples += len(values)
            seen = max(seen, float(values.max()))
            if seen > level or samples > _MOST_SAMPLES:
                return float(torch.cat([torch.tensor([bound]), uppers, arcs.bounds]).max())
            # far below the level a tighter bound costs little, and spares circles beside this one
            goal = min(level, _AMBITION * seen)
            above = uppers > goal
            bound = max(bound, float(torch.where(above, 0.0, uppers).max()))
            # log(goal / value) is shared out: 80 % to the width of the arc, the dearer one to shrink
            narrow = (sharp >= (values / goal) ** 0.8) & (steps < _LAST_STEPS)
            now.bounds = uppers
            arcs = arcs.join(now.sharpened(narrow & above), now.split(~narrow & above))
        return bound

    def _samples(self, w: Tensor, steps: int) -> Tensor:
        """Return the largest singular value of F(w) from below, by Lanczos from random vectors, (k,)."""
        if len(w) > _CHUNK:
            return torch.cat([self._samples(part, steps) for part in torch.split(w, _CHUNK)])
        shape = len(w), self.form.size
        b = self.form.coordinates(torch.randn(shape, dtype=torch.complex128, generator=self.generator))
        krylov = Krylov(self.form.resolvents(w), b, min(steps, self.form.size))
        while krylov.extend():
            pass
        return krylov.ritz_values().sqrt()


@dataclass
class _Arcs:
    """Arcs of one circle: midpoints, half angles, Lanczos steps to take next, and the bounds known so far."""

    angles: Tensor
    halves: Tensor
    steps: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, angles: Tensor, half: float, steps: int) -> _Arcs:
        return cls(angles, torch.full_like(angles, half), torch.full_like(angles, steps), torch.zeros_like(angles))

    def __len__(self) -> int:
        return len(self.angles)

    def fewest_steps(self) -> tuple[_Arcs, _Arcs, int]:
        fewest = self.steps.min()
        now = self.steps == fewest
        return self.take(now), self.take(~now), int(fewest)

    def take(self, mask: Tensor) -> _Arcs:
        return _Arcs(self.angles[mask], self.halves[mask], self.steps[mask], self.bounds[mask])

    def sharpened(self, mask: Tensor) -> _Arcs:
        part = self.take(mask)
        return _Arcs(part.angles, part.halves, 2 * part.steps, part.bounds)

    def split(self, mask: Tensor) -> _Arcs:
        part = self.take(mask)
        h = part.halves / 2
        angles = torch.cat([part.angles - h, part.angles + h])
        return _Arcs(angles, h.repeat(2), part.steps.repeat(2), part.bounds.repeat(2))

    def join(self, *others: _Arcs) -> _Arcs:
        parts = (self, *others)
        return _Arcs(
            torch.cat([p.angles for p in parts]),
            torch.cat([p.halves for p in parts]),
            torch.cat([p.steps for p in parts]),
            torch.cat([p.bounds for p in parts]),
        )


class _PowerNorms:
    """Pairs (j, bound of |B^j|_2), j = 1, 2, 3, 4, 6, 8, 12, ...: two matrix products an octave, when asked for."""

    def __init__(self, operator: Tensor) -> None:
        self._found = [(1, _frobenius(operator))]
        self._made = self._make(operator)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for i in count():
            if i == len(self._found):
                item = next(self._made, None)
                if item is None:
                    return
                self._found.append(item)
            yield self._found[i]

    @staticmethod
    def _make(power: Tensor) -> Iterator[tuple[int, float]]:
        j, half = 1, power
        while j <= _MOST_SAMPLES // 8:
            if j > 1:
                yield j + j // 2, _frobenius(power @ half)
            half, power, j = power, power @ power, 2 * j
            yield j, _frobenius(power)


def _frobenius(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def _excess(size: int, steps: int) -> float:
    """Return x such that (1 + x) times the Ritz value bounds the largest eigenvalue, but for probability _FAILURE."""
    if steps >= size:
        return 0.0
    return math.sinh(math.asinh(math.sqrt((size - 1) / _FAILURE)) / (2 * steps - 1)) ** 2


def _between(r1: float, log_g1: float, r2: float, log_g2: float) -> float:
    """Return the maximum of (1 - r) times the log-log interpolation of g: concave in log r, so in closed form."""
    if not math.isfinite(log_g2):
        return math.inf
    slope = (log_g2 - log_g1) / math.log(r2 / r1)
    r = min(max(slope / (1 + slope), r1), r2) if slope > 0 else r1
    return (1 - r) * math.exp(log_g1 + slope * math.log(r / r1))
