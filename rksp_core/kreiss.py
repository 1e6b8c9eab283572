"""The Kreiss constant of an operator with a reference radius, and its transient growth.

    K_theta(A) = sup_{|z| > theta} (|z| - theta) |(zI - A)^-1|_2 = K(A / theta)

The classical constant (theta = 1; Kim et al. 2026, Eq. 29-31; Trefethen & Embree 2005, Sec. 18) is infinite as soon as
rho > 1, the usual case of a residual layer. A reference radius above rho, as the Kreiss bound of population ecology has it
(Townley et al. 2007; Stott et al. 2011), keeps it finite and keeps Kreiss's theorem:

    K_theta <= sup_{n >= 0} |A^n| / theta^n <= e m K_theta.

At theta = rho the value would be one noisy eigenvalue's condition number; 5 % above it is reproducible between probes.

Method. With w = 1/z the function is f(w) = (1 - theta |w|) |F(w)|, F = (I - wA)^-1, on a disc. It is sampled on circles that
crowd towards the edge, and the best local maxima are climbed together by BFGS with the analytic gradient. This finds a
lower bound that is in practice the value (Mitchell 2020 has a method with a guarantee, at far greater cost);
``certify`` encloses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rksp_core.eigensystem import Eigensystem, eigensystem
from rksp_core.lanczos import Largest, largest_singular
from rksp_core.resolvent import Form, form_of

MARGIN = 1.05
"""The reference radius theta = max(1, MARGIN rho)."""
UNIT_SLACK = 1e-10
"""rho up to 1 + UNIT_SLACK counts as 1, or an identity layer would read infinite."""

_CIRCLES = (12.0, 3.0, 1.5, 0.8, 0.4, 0.2, 0.1)
_NEAREST, _FARTHEST = 1e-7, 1e3
_PERIPHERAL = 32
_CLIMBERS = 6
_ROUNDS = 40
_GAIN = 1e-10


@dataclass(frozen=True)
class KreissResult:
    """K_theta of one operator.

    Attributes
    ----------
    value : float
        K_theta, at least 1; the largest value found, so a lower bound of the true one up to rounding.
    theta : float
        The reference radius.
    point : complex
        z where it is attained; ``complex(inf, 0)`` where the supremum 1 is the limit at infinity.
    lower, upper : float or None
        A bracket of the true constant where it was asked for.
    classical : float
        K at theta = 1; ``inf`` where rho > 1.
    """

    value: float
    theta: float
    point: complex
    lower: float | None
    upper: float | None
    classical: float


def kreiss_constant(
    A: Any, theta: float | None = None, *, certify: bool = False, eigensystem: Eigensystem | None = None
) -> KreissResult:
    """Find K_theta(A) = sup over \\|z\\| > theta of (\\|z\\| - theta) \\|(zI - A)^-1\\|.

    Parameters
    ----------
    A : array or Tensor
        (m, m), real, any float dtype; computed in float64.
    theta : float, optional
        Reference radius, at least rho(A). By default max(1, 1.05 rho).
    certify : bool
        Also enclose the value: see :func:`rksp_core.kreiss_certificate.upper_bound`.
    eigensystem : Eigensystem, optional
        ``rksp_core.eigensystem.eigensystem(A)`` if the caller has it: it is most of the cost.

    Returns
    -------
    KreissResult
        ``value`` >= 1. It is 1 exactly when the numerical radius of A is at most theta, so for every normal A.

    Raises
    ------
    ValueError
        If A is not real, square and finite, if the eigensystem is another operator's, or if theta is below rho.
    """
    system = _system(A, eigensystem)
    radius = system.spectral_radius
    chosen = reference_radius(radius) if theta is None else _checked(theta, radius)
    if system.size == 0:
        return KreissResult(1.0, chosen, complex(math.inf), *((1.0, 1.0) if certify else (None, None)), 1.0)
    form = form_of(system)
    value, point = search(system, form, chosen)
    classical = _classical(system, form, chosen, value)
    if not certify:
        return KreissResult(value, chosen, point, None, None, classical)
    from rksp_core.kreiss_certificate import upper_bound

    return KreissResult(value, chosen, point, value, upper_bound(system, form, chosen, value), classical)


def transient_growth(
    A: Any, horizon: int, theta: float | None = None, *, eigensystem: Eigensystem | None = None
) -> float:
    """Return max over 0 <= n <= horizon of \\|A^n\\| / theta^n, the largest amplification along the depth.

    n = 0 counts, so that the result is at least 1 and K_theta never exceeds its supremum over the horizon.

    Parameters
    ----------
    A : array or Tensor
        (m, m), real, any float dtype; computed in float64.
    horizon : int
        L >= 0, usually the number of blocks.
    theta : float, optional
        Reference radius > 0; max(1, 1.05 rho) by default, as in :func:`kreiss_constant`.
    eigensystem : Eigensystem, optional
        Used for rho only, and only if theta is not given.

    Raises
    ------
    ValueError
        If A is not real, square and finite, the horizon negative or theta not positive.
    """
    if horizon < 0:
        raise ValueError(f"the horizon is {horizon}, expected a number of steps >= 0")
    if theta is not None and not (theta > 0 and math.isfinite(theta)):
        raise ValueError(f"theta is {theta}, expected a positive radius")
    system = _system(A, eigensystem)
    step = system.operator / (reference_radius(system.spectral_radius) if theta is None else theta)
    largest, power = 1.0, torch.eye(system.size, dtype=torch.float64)
    for _ in range(horizon if system.size else 0):
        power = power @ step
        # |P|_2^2 <= |P|_1 |P|_inf: where even that is no record, the exact norm is not needed
        if float(power.abs().sum(0).max() * power.abs().sum(1).max()) > largest**2:
            largest = max(largest, float(torch.linalg.matrix_norm(power, 2)))
    return largest


def reference_radius(spectral_radius: float) -> float:
    """Return theta = max(1, 1.05 rho)."""
    return max(1.0, MARGIN * spectral_radius)


def search(system: Eigensystem, form: Form, theta: float) -> tuple[float, complex]:
    """Return the largest value found of (|z| - theta) |(zI - A)^-1| and where; (1, inf) if none exceeds the limit 1."""
    resolvent = _Resolvent(form, theta)
    depths, angles = _coarse_points(system, theta)
    heights, starts = resolvent.coarse(depths, angles)
    best = _local_maxima(np.log(depths), angles, heights)[:_CLIMBERS]
    value, depth, angle = _climb(resolvent, depths[best], angles[best], starts[best])
    if value <= 1.0:
        return 1.0, complex(math.inf)
    return value, complex(theta * (1 + depth) * np.exp(1j * angle))


def _classical(system: Eigensystem, form: Form, theta: float, value: float) -> float:
    if system.spectral_radius > 1 + UNIT_SLACK:
        return math.inf
    return value if theta == 1.0 else search(system, form, 1.0)[0]


def _system(A: Any, given: Eigensystem | None) -> Eigensystem:
    if given is None:
        return eigensystem(A)
    if tuple(A.shape) != tuple(given.operator.shape):
        raise ValueError(
            f"the eigensystem is of order {given.size}, the operator has shape {tuple(A.shape)}; pass eigensystem(A)"
        )
    return given


def _checked(theta: float, radius: float) -> float:
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"theta is {theta}, expected a positive radius")
    if radius > theta * (1 + UNIT_SLACK):
        raise ValueError(
            f"theta is {theta:.6g}, below the spectral radius {radius:.6g}, where the Kreiss constant is infinite; "
            f"pass theta >= {radius:.6g} or leave it out"
        )
    return float(theta)


class _Resolvent:
    """log f and its gradient at z = theta (1 + e) exp(i angle), in the coordinates (log e, angle)."""

    def __init__(self, form: Form, theta: float) -> None:
        self.form, self.theta = form, theta

    def coarse(self, depths: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = len(depths), self.form.size
        x = torch.randn(shape, dtype=torch.complex128, generator=generator)
        family = self.form.resolvents(self._w(depths, angles))
        found = largest_singular(family, self.form.coordinates(x), steps=8)
        return self._height(depths, found), found.vectors

    def evaluate(self, depths: np.ndarray, angles: np.ndarray, starts: Tensor) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Return log f (k,), its gradient (k, 2), and the singular vectors to start from next time.

        With x the right singular vector and q = x* F x, d log|F| = Re((q - 1) dw / w), which in these coordinates is
        d log f = (1 - e / (1 + e) Re q) d log e + Im q d angle.
        """
        family = self.form.resolvents(self._w(depths, angles))
        found = largest_singular(family, starts, steps=30, tolerance=1e-5)
        q = found.quotients.numpy()
        gradient = np.stack([1 - depths / (1 + depths) * q.real, q.imag], axis=1)
        return self._height(depths, found), gradient, found.vectors

    def _w(self, depths: np.ndarray, angles: np.ndarray) -> Tensor:
        return torch.from_numpy(np.exp(-1j * angles) / (self.theta * (1 + depths)))

    @staticmethod
    def _height(depths: np.ndarray, found: Largest) -> np.ndarray:
        return np.log(depths / (1 + depths)) + np.log(found.norms.numpy())


def _coarse_points(system: Eigensystem, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Circles |z| = theta (1 + e), angle step 0.7 e on the upper half plane (A is real), and rays to the eigenvalues."""
    points = [(e, a) for e in _CIRCLES for a in np.linspace(0, math.pi, 2 + int(math.pi / min(0.7 * e, 1.6)))]
    values = system.eigenvalues.numpy()
    gaps = np.maximum(1 - np.abs(values) / theta, 0.0)
    near = np.flatnonzero((values.imag >= 0) & (gaps < _CIRCLES[-1]))
    near = near[np.argsort(gaps[near])][:_PERIPHERAL]
    for j in near:
        # closer to the edge than the last circle a maximum can only sit before an eigenvalue that is as close
        e = _CIRCLES[-1]
        while (e := e / 3) > max(gaps[j] / 4, _NEAREST):
            points.append((e, float(np.angle(values[j]))))
    depths, angles = np.array(points).T
    return depths, angles


def _local_maxima(logs: np.ndarray, angles: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Indices of the points that no near neighbour exceeds, best first; near is measured in units of the depth."""
    width = np.minimum(np.exp(logs), 1.0)
    across = np.abs(angles[:, None] - angles) / np.minimum(width[:, None], width)
    near = (np.abs(logs[:, None] - logs) < 1.3) & (across < 1.0)
    peak = ~(near & (heights > heights[:, None])).any(axis=1)
    order = np.argsort(-heights)
    return order[peak[order]]


def _climb(resolvent: _Resolvent, depths: np.ndarray, angles: np.ndarray, starts: Tensor) -> tuple[float, float, float]:
    """Climb from all points together by BFGS in (log e, angle / scale); return the best (value, depth, angle)."""
    k = len(depths)
    scale = np.stack([np.ones(k), np.minimum(depths, 1.0)], axis=1)
    position = np.stack([np.log(depths), angles], axis=1)
    height, gradient, starts = resolvent.evaluate(depths, angles, starts)
    gradient *= scale
    inverse_hessian = np.tile(np.eye(2), (k, 1, 1))
    step = np.ones(k)
    for _ in range(_ROUNDS):
        direction = np.einsum("kij,kj->ki", inverse_hessian, gradient)
        expected = (direction * gradient).sum(1)
        go = np.flatnonzero((expected > _GAIN) & (step > 1e-4) & (height + 10 * expected + 0.1 > height.max()))
        if len(go) == 0:
            break
        shorten = np.minimum(step, 1.0 / np.abs(direction).max(1))
        trial = position[go] + (direction * shorten[:, None] * scale)[go]
        trial[:, 0] = np.clip(trial[:, 0], math.log(_NEAREST), math.log(_FARTHEST))
        new_height, new_gradient, new_starts = resolvent.evaluate(np.exp(trial[:, 0]), trial[:, 1], starts[go])
        new_gradient *= scale[go]
        up = new_height > height[go]
        step[go] = np.where(up, 1.0, step[go] * 0.4)
        i = go[up]
        _update(inverse_hessian, (trial[up] - position[i]) / scale[i], gradient[i] - new_gradient[up], i)
        position[i], height[i], gradient[i] = trial[up], new_height[up], new_gradient[up]
        starts[i] = new_starts[np.flatnonzero(up)]
    top = int(np.argmax(height))
    return float(np.exp(height[top])), float(np.exp(position[top, 0])), float(position[top, 1])


def _update(inverse_hessian: np.ndarray, s: np.ndarray, y: np.ndarray, index: np.ndarray) -> None:
    """BFGS update of the Hessians at ``index``, in place, where the curvature condition holds."""
    for i, si, yi in zip(index, s, y, strict=True):
        if si @ yi > 1e-14:
            r = 1.0 / (si @ yi)
            left = np.eye(2) - r * np.outer(si, yi)
            inverse_hessian[i] = left @ inverse_hessian[i] @ left.T + r * np.outer(si, si)
