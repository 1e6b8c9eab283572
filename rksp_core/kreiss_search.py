"""The search for the Kreiss constant: circles that crowd towards the edge, then climbing from the best points.

With w = 1/z the function is f(w) = (1 - theta |w|) |F(w)|, F = (I - wA)^-1, on a disc. It is written in the depth
e = |z| / theta - 1 and the angle of z: f = e / (1 + e) |F|, where nothing cancels near the edge. A maximum at depth e
is about e wide, so that in the coordinates log e and angle / e all maxima look alike.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rksp_core.eigensystem import Eigensystem
from rksp_core.lanczos import Largest, largest_singular
from rksp_core.resolvent import Form

Vector = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]

_CIRCLES = (12.0, 3.0, 1.5, 0.8, 0.4, 0.2, 0.1)
_NEAREST, _FARTHEST = 1e-7, 1e3
_COARSE_STEPS = 8
_PERIPHERAL = 32
_CLIMBERS = 12
_ROUNDS = 40
_GAIN = 1e-10


def search(system: Eigensystem, form: Form, theta: float) -> tuple[float, complex]:
    """Return the largest value found of (|z| - theta) |(zI - A)^-1| and where; (1, inf) if none exceeds the limit 1."""
    resolvent = _Resolvent(form, theta)
    depths, angles = _coarse_points(system, theta)
    heights, starts = resolvent.coarse(depths, angles)
    if math.isinf(heights.max()):
        return math.inf, complex(theta * (1 + depths[np.argmax(heights)]) * np.exp(1j * angles[np.argmax(heights)]))
    best = _local_maxima(np.log(depths), angles, heights)[:_CLIMBERS]
    value, depth, angle = _climb(resolvent, depths[best], angles[best], starts[best])
    if depth < 3 * _NEAREST and _grows_without_bound(resolvent, depth, angle, starts[best[:1]]):
        return math.inf, complex(theta * np.exp(1j * angle))
    if value <= 1.0:
        return 1.0, complex(math.inf)
    return value, complex(theta * (1 + depth) * np.exp(1j * angle))


def _grows_without_bound(resolvent: _Resolvent, depth: float, angle: float, start: Tensor) -> bool:
    """Tell a defective eigenvalue on the circle, where f ~ e^(1-k), from a simple one, where f tends to a number."""
    heights = [resolvent.evaluate(np.array([e]), np.array([angle]), start)[0][0] for e in (depth, 10 * depth)]
    return bool(heights[0] - heights[1] > 1.0)


class _Resolvent:
    """log f and its gradient at z = theta (1 + e) exp(i angle), in the coordinates (log e, angle)."""

    def __init__(self, form: Form, theta: float) -> None:
        self.form, self.theta = form, theta

    def coarse(self, depths: Vector, angles: Vector) -> tuple[Vector, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = len(depths), self.form.size
        x = torch.randn(shape, dtype=torch.complex128, generator=generator)
        family = self.form.resolvents(self._w(depths, angles))
        found = largest_singular(family, self.form.coordinates(x), steps=_COARSE_STEPS)
        return self._height(depths, found), found.vectors

    def evaluate(self, depths: Vector, angles: Vector, starts: Tensor) -> tuple[Vector, Vector, Tensor]:
        """Return log f (k,), its gradient (k, 2), and the singular vectors to start from next time.

        With x the right singular vector and q = x* F x, d log|F| = Re((q - 1) dw / w), which in these coordinates is
        d log f = (1 - e / (1 + e) Re q) d log e + Im q d angle.
        """
        family = self.form.resolvents(self._w(depths, angles))
        found = largest_singular(family, starts, steps=30, tolerance=1e-5)
        q = found.quotients.numpy()
        gradient = np.stack([1 - depths / (1 + depths) * q.real, q.imag], axis=1)
        return self._height(depths, found), gradient, found.vectors

    def _w(self, depths: Vector, angles: Vector) -> Tensor:
        return torch.from_numpy(np.exp(-1j * angles) / (self.theta * (1 + depths)))

    @staticmethod
    def _height(depths: Vector, found: Largest) -> Vector:
        norms = np.maximum(found.norms.numpy(), np.finfo(float).tiny)
        height: Vector = np.log(depths / (1 + depths)) + np.log(norms)
        return height


def _coarse_points(system: Eigensystem, theta: float) -> tuple[Vector, Vector]:
    """Circles of depth e with angle step 0.7 e over the upper half plane (A is real), and rays to the eigenvalues."""
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
    # equal eigenvalues give equal rays, and climbing one hill six times would leave the others out
    depths, angles = np.unique(np.round(points, 12), axis=0).T
    return depths, angles


def _local_maxima(logs: Vector, angles: Vector, heights: Vector) -> Index:
    """Indices of the points that no near neighbour exceeds, best first; near is measured in units of the depth."""
    width = np.minimum(np.exp(logs), 1.0)
    across = np.abs(angles[:, None] - angles) / np.minimum(width[:, None], width)
    near = (np.abs(logs[:, None] - logs) < 0.75) & (across < 0.8)
    order = np.argsort(-heights, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    peak = ~np.any(near & (rank < rank[:, None]), axis=1)
    best: Index = order[np.take(peak, order)]
    return best


def _climb(resolvent: _Resolvent, depths: Vector, angles: Vector, starts: Tensor) -> tuple[float, float, float]:
    """Climb from all points together by BFGS in (log e, angle / e); return the best (value, depth, angle)."""
    k = len(depths)
    position = np.stack([np.log(depths), angles], axis=1)
    height, gradient, starts = resolvent.evaluate(depths, angles, starts)
    inverse_hessian = np.tile(np.eye(2), (k, 1, 1))
    step = np.ones(k)
    for _ in range(_ROUNDS):
        scale = np.stack([np.ones(k), np.minimum(np.exp(position[:, 0]), 1.0)], axis=1)
        direction = np.einsum("kij,kj->ki", inverse_hessian, gradient * scale)
        expected = (direction * gradient * scale).sum(1)
        go = np.flatnonzero((expected > _GAIN) & (step > 1e-4) & (height + 10 * expected + 0.1 > height.max()))
        if len(go) == 0:
            break
        shorten = np.minimum(step, 1.0 / np.abs(direction).max(1))
        trial = position[go] + (direction * shorten[:, None] * scale)[go]
        trial[:, 0] = np.clip(trial[:, 0], math.log(_NEAREST), math.log(_FARTHEST))
        new_height, new_gradient, new_starts = resolvent.evaluate(np.exp(trial[:, 0]), trial[:, 1], starts[go])
        up = new_height > height[go]
        step[go] = np.where(up, 1.0, step[go] * 0.4)
        i = go[up]
        change = (gradient[i] - new_gradient[up]) * scale[i]
        _update(inverse_hessian, (trial[up] - position[i]) / scale[i], change, i)
        position[i], height[i], gradient[i] = trial[up], new_height[up], new_gradient[up]
        starts[i] = new_starts[np.flatnonzero(up)]
    top = int(np.argmax(height))
    return float(np.exp(height[top])), float(np.exp(position[top, 0])), float(position[top, 1])


def _update(inverse_hessian: Vector, s: Vector, y: Vector, index: Index) -> None:
    """BFGS update of the Hessians at ``index``, in place, where the curvature condition holds."""
    for i, si, yi in zip(index, s, y, strict=True):
        if si @ yi > 1e-14:
            r = 1.0 / (si @ yi)
            left = np.eye(2) - r * np.outer(si, yi)
            inverse_hessian[i] = left @ inverse_hessian[i] @ left.T + r * np.outer(si, si)
