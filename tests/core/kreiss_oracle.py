"""The Kreiss constant and the transient growth in plain NumPy and SciPy: a dense grid of full SVDs, then refinement."""

import numpy as np
import scipy.optimize


def product(A, z, theta):
    """(|z| - theta) / sigma_min(zI - A)."""
    smallest = np.linalg.svd(z * np.eye(len(A)) - A, compute_uv=False)[-1]
    return (abs(z) - theta) / smallest


def kreiss_by_grid(A, theta, *, circles=50, angles=120, nearest=1e-3, refined=8):
    depths = np.geomspace(nearest, 50, circles)
    turns = np.linspace(0, np.pi, angles)
    z = theta * (1 + depths[:, None]) * np.exp(1j * turns)
    shifted = z[..., None, None] * np.eye(len(A)) - A
    smallest = np.stack([np.linalg.svd(row, compute_uv=False)[:, -1] for row in shifted])
    values = theta * depths[:, None] / smallest
    best = 1.0
    for flat in _local_maxima(values)[:refined]:
        i, j = np.unravel_index(flat, values.shape)

        def negative(x):
            return -product(A, theta * (1 + np.exp(x[0])) * np.exp(1j * x[1]), theta)

        start = np.array([np.log(depths[i]), turns[j]])
        simplex = start + np.array([[0, 0], [0.05, 0], [0, 0.3 * min(depths[i], 1.0)]])
        options = {"xatol": 1e-10, "fatol": 1e-13, "initial_simplex": simplex, "maxiter": 400}
        best = max(best, -scipy.optimize.minimize(negative, start, method="Nelder-Mead", options=options).fun)
    return best


def growth_by_powers(A, horizon, theta):
    norms, power = [1.0], np.eye(len(A))
    for _ in range(horizon):
        power = power @ A / theta
        norms.append(np.linalg.norm(power, 2))
    return max(norms)


def _local_maxima(values):
    """Flat indices of the grid's local maxima, best first (angles 0 and pi are mirrors: A is real)."""
    padded = np.pad(values, ((1, 1), (0, 0)), constant_values=-np.inf)
    padded = np.pad(padded, ((0, 0), (1, 1)), mode="edge")
    rows, columns = values.shape
    shifts = [(a, b) for a in range(3) for b in range(3)]
    around = np.max([padded[a : a + rows, b : b + columns] for a, b in shifts], axis=0)
    flat = np.flatnonzero(values >= around)
    return flat[np.argsort(-values.flat[flat])]
