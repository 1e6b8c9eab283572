"""A proven upper bound of the Kreiss constant, to stand beside the value that the search found.

With w = 1/z, F(w) = (I - wA)^-1 and g(r) = max over |w| = r of |F(w)|, the constant is sup over r of (1 - theta r) g(r).

1. Towards infinity, with s = |A|: g(r) <= 1 / (1 - r s).
2. On a circle, from N equispaced samples. Cut the power series after degree n; the rest is (wA)^(n+1) F(w), at most
   t g(r) with t = r^(n+1) |A^(n+1)|. A polynomial of degree n is at most 1 / cos(pi n / 2N) times its largest sample, by
   M. Riesz' comparison with a cosine (Ehlich & Zeller 1964). Together
       g(r) <= (1 + t) / (1 - t) / cos(pi n / 2N) * max over the samples of |F|.
3. Between circles log g is convex in log r (Hadamard's three circles; g is the maximum of moduli of analytic functions).
4. |F| at a sample by k Lanczos steps from a random vector b. Let s1 be the true and s the Ritz value of F* F, and
   s1 > (1 + x) s. Comparing with the polynomial sin((2k-1) phi) / sin(phi) in cos(phi)^2 shows that the component of b along
   the top eigenvector has |b_1|^2 < sinh((2k-1) asinh sqrt x)^-2. For b uniform on the complex sphere the probability is at
   most (m-1) times that: so ``_FAILURE`` gives x (a sharper form of Kuczynski & Wozniakowski 1992).

So the bound holds but for rounding errors and that probability. Points, steps and circles are spent only where a cheaper
estimate does not stay below the ceiling that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from rksp_core.eigensystem import Eigensystem
from rksp_core.lanczos import Krylov
from rksp_core.resolvent import Form

_WIDTH = 0.045
"""The bracket that is aimed at, relative."""
_FAILURE = 1e-12
"""Probability that the Lanczos bound of one sample fails."""
_ROUNDING = 1e-8
_STEPS = (8, 16, 32, 64, 128)
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
        Reference radius, at least rho. Where it is closer than about 1 % to rho the series converges too slowly, and only
        the bound K <= kappa remains (infinite for a defective operator).
    value : float
        The largest value found: it says where effort is worth spending and is not used otherwise.
    """
    certificate = _Certificate(system, form, theta, (1 + _WIDTH) * value)
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
        # 1.5 % are left for the interpolation between this circle and the next
        level = 0.985 * self.ceiling / (1 - r) if r < 1 else math.inf
        best, slack = math.inf, 2.0
        for _ in range(4):
            samples, factor = self._plan(r, slack)
            if samples > _MOST_SAMPLES:
                break
            upper, seen = self._sample(r, samples, level / factor)
            best = min(best, factor * upper)
            if best <= level or slack <= 1.01:
                break
            slack = max(1.01, min(math.sqrt(level / seen), math.sqrt(slack)))
        return math.log(best)

    def _plan(self, r: float, slack: float) -> tuple[float, float]:
        """Return the smallest number of samples N whose factor (1+t)/(1-t)/cos(pi n / 2N) is at most ``slack``."""
        best = math.inf, math.inf
        for power, norm in self.powers:
            tail = norm * r**power
            room = (1 + tail) / (1 - tail) / slack if tail < 1 else math.inf
            if room < 1:
                n = power - 1
                samples = max(n + 1, math.ceil(math.pi * n / (2 * math.acos(room))))
                best = min(best, (samples, (1 + tail) / (1 - tail) / math.cos(math.pi * n / (2 * samples))))
                if n + 1 > best[0] or tail < 1e-3 * (slack - 1):
                    break
        return best

    def _sample(self, r: float, samples: float, level: float) -> tuple[float, float]:
        """Return an upper bound of |F| at equispaced points of the circle, and the largest value seen."""
        angles = torch.arange(int(samples) // 2 + 1, dtype=torch.float64) * (2 * math.pi / samples)
        w = torch.polar(torch.full_like(angles, r / self.theta), angles)
        settled, seen = 0.0, 0.0
        uppers = torch.empty(0)
        for steps in _STEPS:
            values = torch.cat([self._ritz_values(part, steps) for part in w.split(_CHUNK)])
            uppers = (values * (1 + _excess(self.form.size, steps))).sqrt()
            seen = max(seen, math.sqrt(float(values.max())))
            unsettled = uppers > level
            if not bool(unsettled.any()) or seen > level or steps >= self.form.size:
                break
            settled = max(settled, float(torch.where(unsettled, 0.0, uppers).max()))
            w = w[unsettled]
        return max(settled, float(uppers.max())), seen

    def _ritz_values(self, w: Tensor, steps: int) -> Tensor:
        shape = len(w), self.form.size
        b = self.form.coordinates(torch.randn(shape, dtype=torch.complex128, generator=self.generator))
        krylov = Krylov(self.form.resolvents(w), b, min(steps, self.form.size))
        while krylov.extend():
            pass
        return krylov.ritz_values()


class _PowerNorms:
    """Pairs (j, bound of |B^j|_2) for j = 1, 2, 3, 4, 6, 8, 12, ...: two matrix products an octave, made when asked for."""

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
