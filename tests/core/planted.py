"""Snapshots of a known operator, and how to match two spectra."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rksp_core.moments import Moments


def snapshots(operator: Tensor, count: int, *, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows x ~ N(1, C) with an anisotropic C, and y = A x + 2 + noise."""
    generator = torch.Generator().manual_seed(seed)
    d = operator.shape[0]
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5 + torch.eye(d, dtype=torch.float64)
    x = torch.randn(count, d, generator=generator, dtype=torch.float64) @ mixing + 1.0
    y = x @ operator.T + 2.0 + noise * torch.randn(count, d, generator=generator, dtype=torch.float64)
    return x, y


def moments_of(x: Tensor, y: Tensor) -> Moments:
    moments = Moments(x.shape[1])
    moments.update(x, y)
    return moments


def random_operator(d: int, *, radius: float = 1.1, seed: int = 0) -> Tensor:
    """A dense non-normal operator with that spectral radius."""
    matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


def spectral_distance(a: object, b: object) -> float:
    """Largest distance in the best one-to-one match; sorting would pair the wrong ones."""
    left, right = np.asarray(a), np.asarray(b)
    cost = np.abs(left[:, None] - right[None, :])
    return float(cost[linear_sum_assignment(cost)].max())
