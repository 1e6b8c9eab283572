"""Algorithm 1 of Kim et al. 2026 in plain NumPy, from the snapshots, in the paper's own words: the second opinion.

It shares nothing with the product but the choices that numerics leaves open: eps and the rank rule are arguments.
"""

from __future__ import annotations

import numpy as np


def algorithm_1(
    X: np.ndarray, Y: np.ndarray, *, eps: float = 1e-5, relative: bool = True, floor: float = 0.0, tau: float = 0.1
) -> dict[str, object]:
    """X, Y: d x N, columns are samples; directions with a variance up to ``floor`` are left out."""
    X, Y = X.astype(np.float64), Y.astype(np.float64)
    d, N = X.shape
    Xc, Yc = X - X.mean(axis=1, keepdims=True), Y - Y.mean(axis=1, keepdims=True)
    # the retained subspace, by an SVD of the data (the product uses an eigen-decomposition of the moments)
    left, sigma, _ = np.linalg.svd(Xc, full_matrices=False)
    Q = left[:, sigma**2 / (N - 1) > floor]
    trace = np.trace(Xc @ Xc.T) / (N - 1)
    Xc, Yc = Q.T @ Xc, Q.T @ Yc
    S = Xc @ Xc.T / (N - 1) + (eps * trace / d if relative else eps) * np.eye(Q.shape[1])
    values, vectors = np.linalg.eigh(S)
    W = vectors @ np.diag(values**-0.5) @ vectors.T  # zero-phase, as in Eq. 9
    Xw, Yw = W @ Xc, W @ Yc
    A = Yw @ np.linalg.pinv(Xw)
    lam, V = np.linalg.eig(A)
    U = np.linalg.inv(V)  # rows are left eigenvectors u*
    r = np.array([np.linalg.norm(u @ (Yw - z * Xw)) / np.linalg.norm(u @ Xw) for z, u in zip(lam, U, strict=True)])
    return {
        "operator": A,
        "eigenvalues": lam,
        "near_unit_mass": np.mean((np.abs(lam) >= 0.9) & (np.abs(lam) <= 1.05)),
        "expansive_mass": np.mean(np.abs(lam) > 1.05),
        "contractive_mass": np.mean(np.abs(lam) < 0.8),
        "spectral_radius": np.abs(lam).max(),
        "eigenvector_condition": np.linalg.norm(V, 2) * np.linalg.norm(U, 2),
        "nonlinearity_ratio": np.linalg.norm(Yw - A @ Xw) / np.linalg.norm(Yw - Xw),
        "update_ratio": np.linalg.norm(Yw - Xw) / np.linalg.norm(Xw),
        "sigma_max": np.linalg.norm(A, 2),
        "henrici_departure": np.sqrt(np.linalg.norm(A) ** 2 - np.sum(np.abs(lam) ** 2)) / np.linalg.norm(A),
        "mode_residuals": r,
        "reliable_modes": int(np.sum(r <= tau)),
    }
