"""How far apart two spectra are: the Wasserstein-1 distance of their eigenvalue moduli, from a few quantiles each.

Masses count modes on either side of a threshold; this distance sees all of them move, and needs no threshold. On a line
W1 is the area between the two quantile functions (Vallender 1974), so what a profile has to keep are quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

QUANTILES = 32

Curves = Mapping[str, Sequence[float]]  # layer -> quantiles of its moduli


def modulus_quantiles(eigenvalues: ArrayLike) -> tuple[float, ...] | None:
    """Return the quantiles of |lambda| at (k + 1/2) / 32, k = 0..31, ascending; None without finite eigenvalues.

    Each is one of the moduli (no interpolation), to six digits: they lie in every profile, and are known to fewer.
    """
    moduli = np.abs(np.asarray(eigenvalues))
    if not moduli.size or not np.isfinite(moduli).all():
        return None
    midpoints = (np.arange(QUANTILES) + 0.5) / QUANTILES
    quantiles = np.quantile(moduli, midpoints, method="inverted_cdf")
    return tuple(float(f"{value:.6g}") for value in quantiles)


def wasserstein(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the Wasserstein-1 distance of two spectra from the quantiles of `modulus_quantiles`, at least 0.

    The mean absolute difference is the midpoint rule for the area between the quantile functions. These are monotone,
    so it is off by at most (r + s) / 64, r and s the ranges max |lambda| - min |lambda| of the two spectra.
    """
    return math.fsum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def distances(curves: Curves, others: Curves) -> dict[str, float]:
    """Return the mean and the maximum of the distance over the layers that both have; nothing where there is none."""
    each = [wasserstein(curve, others[layer]) for layer, curve in curves.items() if layer in others]
    return {"wasserstein_mean": math.fsum(each) / len(each), "wasserstein_max": max(each)} if each else {}


def between(curves: Curves, others: Curves, weight: float) -> dict[str, tuple[float, ...]]:
    """Return, layer by layer, the spectrum that lies at ``weight`` in [0, 1] on the way from one to the other.

    The weighted average of quantile functions is the Wasserstein barycenter on a line (Agueh & Carlier 2011, Sec. 6.1),
    which moves modes where an average of densities would show both spectra at once. A layer that only one of the two
    has is taken as it is.
    """
    averaged = {
        layer: tuple(a + weight * (b - a) for a, b in zip(curve, others[layer], strict=True))
        for layer, curve in curves.items()
        if layer in others
    }
    return {layer: tuple(curve) for layer, curve in (*curves.items(), *others.items())} | averaged
