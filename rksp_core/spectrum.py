"""Operator -> what its eigenvalues say: masses, radius, condition, departure from normality, and which modes to trust.

Spectral masses are those of Kim et al. 2026, Def. 1 (Eq. 11-13); the reliability filter is ResDMD (Eq. 10). Filtered
and unfiltered masses stand beside each other: the filter drops 40-98 % of the modes of an expansive layer, sometimes
all, and the masses of nothing are unavailable, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from rksp_core.dmd import Operator
from rksp_core.eigensystem import Eigensystem
from rksp_core.profile import ReliableMasses

UPPER = 1.05  # 1 + eps_u: above it a mode is expansive
LOWER = 0.90  # 1 - eps_n: from here to UPPER it is near-unit
CONTRACTIVE = 0.80  # 1 - delta_c: below it a mode is contractive; between this and LOWER it is mid
RESIDUAL_TOLERANCE = 0.1  # tau of Eq. 10


@dataclass(frozen=True)
class Spectrum:
    """Spectral figures of one operator; masses are shares of its m modes and sum to 1.

    ``mode_residuals`` belong to ``residual_eigenvalues`` (the eigenvalues again, in their own order where the operator
    is defective). ``henrici_departure`` is sqrt(|A|_F^2 - sum |lambda|^2) / |A|_F, in [0, 1]; 0 for a normal operator.
    """

    eigenvalues: Complex[Tensor, " m"]
    masses: dict[str, float]
    reliable: ReliableMasses
    mode_residuals: Float[Tensor, " m"]
    spectral_radius: float
    eigenvector_condition: float
    sigma_max: float
    henrici_departure: float


def spectrum(operator: Operator, system: Eigensystem, *, tolerance: float = RESIDUAL_TOLERANCE) -> Spectrum:
    """Return the spectral figures of an operator with at least one mode, given its eigen-decomposition."""
    values, residuals = mode_residuals(operator, system)
    kept = values[residuals <= tolerance]
    gram = operator.matrix.T @ operator.matrix
    frobenius = float(gram.diagonal().sum())
    eigen = float(system.eigenvalues.abs().square().sum())
    return Spectrum(
        eigenvalues=system.eigenvalues,
        masses=spectral_masses(system.eigenvalues),
        reliable=ReliableMasses(len(kept), **spectral_masses(kept)) if len(kept) else ReliableMasses(0),
        mode_residuals=residuals,
        spectral_radius=system.spectral_radius,
        eigenvector_condition=system.eigenvector_condition,
        # The largest eigenvalue of A^T A keeps full relative accuracy, at a third of the cost of the singular values.
        sigma_max=float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()),
        henrici_departure=(max(frobenius - eigen, 0.0) / frobenius) ** 0.5 if frobenius > 0 else 0.0,
    )


def spectral_masses(eigenvalues: Complex[Tensor, " m"]) -> dict[str, float]:
    """Return the shares of near-unit, expansive, contractive and mid modes (Kim et al. 2026, Eq. 11-13).

    Raises
    ------
    ValueError
        Without any eigenvalue: the masses of nothing are not defined.
    """
    if not len(eigenvalues):
        raise ValueError("spectral masses need at least one eigenvalue, got none")
    moduli = eigenvalues.abs()

    def share(which: Tensor) -> float:
        return float(which.sum()) / len(moduli)

    return {
        "near_unit_mass": share((moduli >= LOWER) & (moduli <= UPPER)),
        "expansive_mass": share(moduli > UPPER),
        "contractive_mass": share(moduli < CONTRACTIVE),
        "mid_mass": share((moduli >= CONTRACTIVE) & (moduli < LOWER)),
    }


def mode_residuals(operator: Operator, system: Eigensystem) -> tuple[Complex[Tensor, " m"], Float[Tensor, " m"]]:
    """Return eigenvalues and their residuals r_j = |u_j*(Yw - lam_j Xw)| / |u_j* Xw| (Kim et al. 2026, Eq. 10).

    From moments r_j^2 = u* E u / (u* G_xx u), because u* A = lam u*; clamped at 0. Accurate to about 1e-7 absolute.
    """
    if system.inverse is None:
        # Defective: no inverse of the eigenbasis. The left eigenvectors themselves still exist.
        values, vectors = torch.linalg.eig(operator.matrix.T)
        real, imaginary, pairs = vectors.real.T, -vectors.imag.T, 0
        over = _quadratic(real, operator.residual) + _quadratic(imaginary, operator.residual)
        under = _quadratic(real, operator.gram_in.diag()) + _quadratic(imaginary, operator.gram_in.diag())
    else:
        values, rows, pairs = system.eigenvalues, system.inverse, system.pairs
        over = _quadratic(rows, operator.residual)
        under = rows.square() @ operator.gram_in
    return values, (_paired(over, pairs).clamp(min=0) / _paired(under, pairs)).sqrt()


def _quadratic(rows: Tensor, form: Tensor) -> Tensor:
    return (rows @ form * rows).sum(1)


def _paired(squares: Tensor, pairs: int) -> Tensor:
    """Add the real and the imaginary part of each conjugate pair (the order of `Eigensystem`)."""
    both = squares[:pairs] + squares[pairs : 2 * pairs]
    return torch.cat([both, both, squares[2 * pairs :]])
