r"""The Kreiss constant of an operator with a reference radius, and its transient growth.

    K_theta(A) = sup_{|z| > theta} (|z| - theta) |(zI - A)^-1|_2 = K(A / theta)

The classical constant (theta = 1; Kim et al. 2026, Eq. 29-31; Trefethen & Embree 2005, Sec. 18) is infinite as soon as
rho > 1, the usual case of a residual layer. A reference radius above rho, as in the Kreiss bound of population ecology
(Townley et al. 2007; Stott et al. 2011), keeps it finite and keeps Kreiss's theorem:

    K_theta <= sup_{n >= 0} |A^n| / theta^n <= e m K_theta.

At theta = rho the value would be one noisy eigenvalue's condition number; 5 % above it is reproducible between probes.
The upper bound K <= kappa is not used as an estimate: on a trained layer it was 1598 where K is 4.95.

The search finds a lower bound that is in practice the value (Mitchell 2020 has methods that are globally convergent, at
the cost of large eigenvalue problems); ``certify`` encloses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rksp_core.eigensystem import Eigensystem, as_operator
from rksp_core.eigensystem import eigensystem as decompose
from rksp_core.kreiss_certificate import upper_bound
from rksp_core.kreiss_search import search
from rksp_core.lanczos import largest_singular
from rksp_core.resolvent import GRAM_LIMIT, EigenForm, Form, form_of

MARGIN = 1.05
"""The reference radius theta = max(1, MARGIN rho)."""
UNIT_SLACK = 1e-10
"""rho up to 1 + UNIT_SLACK counts as 1, or an identity layer would read infinite."""
_MODAL_LIMIT = 1e7
"""Up to this eigenvector condition the norms of powers are right to 1e-8 when they are made from the modes."""


@dataclass(frozen=True)
class KreissResult:
    """K_theta of one operator.

    Attributes
    ----------
    value : float
        K_theta, at least 1; the largest value found, so a lower bound of the true one up to rounding. Right to 1e-6
        below 1e9 or so; rounding (K / 2^52) stops the climb early above 1e12, and ``inf`` stands for more than 1e75.
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
    """Find K_theta(A), the supremum over |z| > theta of (|z| - theta) |(zI - A)^-1|_2.

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
        If A is not real, square and finite, if the eigensystem is of another order, or if theta is below rho.
    """
    system = _system(A, eigensystem)
    radius = system.spectral_radius
    chosen = reference_radius(radius) if theta is None else _checked(theta, radius)
    if system.size == 0:
        bracket = 1.0 if certify else None
        return KreissResult(1.0, chosen, complex(math.inf), bracket, bracket, 1.0)
    form = form_of(system)
    value, point = search(system, form, chosen)
    classical = _classical(system, form, chosen, value)
    if not certify:
        return KreissResult(value, chosen, point, None, None, classical)
    return KreissResult(value, chosen, point, value, upper_bound(system, form, chosen, value), classical)


def transient_growth(
    A: Any, horizon: int, theta: float | None = None, *, eigensystem: Eigensystem | None = None
) -> float:
    """Return the maximum over 0 <= n <= horizon of |A^n|_2 / theta^n: the largest amplification along the depth.

    n = 0 counts, so the result is at least 1, and K_theta is at most its supremum over the horizon.

    Parameters
    ----------
    A : array or Tensor
        (m, m), real, any float dtype; computed in float64.
    horizon : int
        L >= 0, usually the number of blocks.
    theta : float, optional
        Reference radius > 0; max(1, 1.05 rho) by default, as in :func:`kreiss_constant`.
    eigensystem : Eigensystem, optional
        ``rksp_core.eigensystem.eigensystem(A)`` if the caller has it; all powers then become one small search.

    Raises
    ------
    ValueError
        If A is not real, square and finite, the horizon negative or theta not positive.
    """
    if horizon < 0:
        raise ValueError(f"the horizon is {horizon}, expected a number of steps >= 0")
    if theta is not None and not (theta > 0 and math.isfinite(theta)):
        raise ValueError(f"theta is {theta}, expected a positive radius")
    system = _system(A, eigensystem) if theta is None or eigensystem is not None else None
    operator = as_operator(A) if system is None else system.operator
    if horizon == 0 or len(operator) == 0:
        return 1.0
    if theta is None:
        theta = reference_radius(system.spectral_radius if system else 0.0)
    if system is not None and system.eigenvector_condition <= _MODAL_LIMIT:
        return _growth_of_modes(system, horizon, theta)
    return _growth_of_powers(operator / theta, horizon)


def reference_radius(spectral_radius: float) -> float:
    """Return theta = max(1, 1.05 rho)."""
    return max(1.0, MARGIN * spectral_radius)


def _classical(system: Eigensystem, form: Form, theta: float, value: float) -> float:
    if system.spectral_radius > 1 + UNIT_SLACK:
        return math.inf
    return value if theta == 1.0 else search(system, form, 1.0)[0]


def _system(A: Any, given: Eigensystem | None) -> Eigensystem:
    if given is None:
        return decompose(A)
    shape = tuple(np.shape(A))
    if shape != tuple(given.operator.shape):
        raise ValueError(
            f"the eigensystem is of order {given.size}, the operator has shape {shape}; pass eigensystem(A)"
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


def _growth_of_modes(system: Eigensystem, horizon: int, theta: float) -> float:
    """A^n = W Lambda^n W^-1 for all n at once: a rough norm of each, then the exact ones of those near the largest."""
    form = EigenForm(system, gram=system.eigenvector_condition <= GRAM_LIMIT)
    steps = torch.arange(1, horizon + 1, dtype=torch.float64)[:, None]
    values = (system.eigenvalues / theta) ** steps
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(horizon, system.size, dtype=torch.complex128, generator=generator)
    rough = largest_singular(form.functions(values), form.coordinates(x), steps=12)
    near = rough.norms >= 0.8 * rough.norms.max()
    exact = largest_singular(form.functions(values[near]), rough.vectors[near], steps=300, tolerance=1e-7)
    return max(1.0, float(exact.norms.max()))


def _growth_of_powers(step: Tensor, horizon: int) -> float:
    largest, power = 1.0, torch.eye(len(step), dtype=torch.float64)
    for _ in range(horizon):
        power = power @ step
        # |P| is at most the Frobenius norm: where even that is no record, the dear norm is not needed
        if float(torch.linalg.matrix_norm(power)) > largest:
            largest = max(largest, float(torch.linalg.matrix_norm(power, 2)))
    return largest
