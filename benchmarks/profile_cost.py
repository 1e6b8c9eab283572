"""What a profile costs: one layer against plain NumPy, and a 12-layer model end to end.

    python benchmarks/profile_cost.py

The baselines run in the same process, alternating with the product: Algorithm 1 of Kim et al. 2026 in NumPy, once as
printed (residuals mode by mode) and once with all modes in one product. Neither has the Kreiss constant and the
transient growth, which the product adds. Ratios count, seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from rksp_core.dmd import whitened_dmd
from rksp_core.eigensystem import eigensystem
from rksp_core.moments import Moments
from rksp_core.profiling import profile_layer, profile_model
from rksp_core.spectrum import spectrum

EPS = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model-only", action="store_true", help="only the 12-layer model (a fresh process for RSS)")
    arguments = parser.parse_args()
    if arguments.model_only:
        model()
        return
    layer(arguments.width, arguments.samples, arguments.repeats)
    subprocess.run([sys.executable, __file__, "--model-only"], check=True)


def layer(width: int, samples: int, repeats: int) -> None:
    """One layer: snapshots in, every figure out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, width, generator=generator)
    operator = torch.randn(width, width, generator=generator) * (0.7 / width**0.5) + 0.8 * torch.eye(width)
    y = x @ operator.T + 0.3 * torch.randn(samples, width, generator=generator)

    def moments() -> Moments:
        result = Moments(width)
        result.update(x, y)
        return result

    def without_kreiss() -> object:
        fitted = whitened_dmd(moments())
        return spectrum(fitted, eigensystem(fitted.matrix))

    X, Y = x.double().numpy().T.copy(), y.double().numpy().T.copy()
    whole, part, loops, products = medians(
        [
            lambda: profile_layer("layer", moments(), depth=12),
            without_kreiss,
            lambda: algorithm_1(X, Y, residuals=mode_by_mode),
            lambda: algorithm_1(X, Y, residuals=all_at_once),
        ],
        repeats,
    )
    print(f"one layer, d = {width}, N = {samples}, {torch.get_num_threads()} threads, medians of {repeats}")
    print(f"  rksp, everything                        {whole:6.2f} s")
    print(f"  rksp, without Kreiss and growth         {part:6.2f} s")
    print(f"  NumPy Algorithm 1 as printed            {loops:6.2f} s   {loops / whole:.2f} x everything")
    print(
        f"  NumPy Algorithm 1, modes in one product {products:6.2f} s   {products / whole:.2f} x everything, ", end=""
    )
    print(f"{products / part:.2f} x without Kreiss and growth")


def model() -> None:
    """The GPT-2 124M shape: 12 blocks of width 768, random weights, 2048 token states, as `rksp preflight` does it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from rksp_monitor.layer_threads import layer_threads

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.randint(0, 50257, (32, 64), generator=torch.Generator().manual_seed(0))
    before = peak()
    start = time.perf_counter()
    with layer_threads() as executor:
        profile = profile_model(gpt2, ids, executor=executor)
    seconds = time.perf_counter() - start
    mean = profile.summary["near_unit_mass"]["mean"]
    print(f"GPT-2 124M shape, 12 layers, d = 768, N = 2048 (near-unit mass {mean:.3f})")
    print(f"  end to end {seconds:6.2f} s, peak RSS {peak():.2f} GB, of which model and libraries {before:.2f} GB")


def algorithm_1(X: np.ndarray, Y: np.ndarray, *, residuals: Callable[..., np.ndarray]) -> tuple[object, ...]:
    """Kim et al. 2026, Alg. 1: d x N snapshots -> eigenvalues, kappa, eta, residuals, near-unit mass."""
    N = X.shape[1]
    Xc, Yc = X - X.mean(axis=1, keepdims=True), Y - Y.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(Xc @ Xc.T / (N - 1) + EPS * np.eye(len(X)))
    W = vectors @ np.diag(values**-0.5) @ vectors.T
    Xw, Yw = W @ Xc, W @ Yc
    A = Yw @ np.linalg.pinv(Xw)
    lam, V = np.linalg.eig(A)
    kappa = np.linalg.cond(V)
    eta = np.linalg.norm(Yw - A @ Xw) / np.linalg.norm(Yw - Xw)
    near_unit = np.mean((np.abs(lam) >= 0.9) & (np.abs(lam) <= 1.05))
    return lam, kappa, eta, residuals(lam, np.linalg.inv(V), Xw, Yw), near_unit


def mode_by_mode(lam: np.ndarray, U: np.ndarray, Xw: np.ndarray, Yw: np.ndarray) -> np.ndarray:
    """Eq. 10 as it stands."""
    norm = np.linalg.norm
    return np.array([norm(u @ (Yw - z * Xw)) / norm(u @ Xw) for z, u in zip(lam, U, strict=True)])


def all_at_once(lam: np.ndarray, U: np.ndarray, Xw: np.ndarray, Yw: np.ndarray) -> np.ndarray:
    """Eq. 10 with two complex products for all modes."""
    UX = U @ Xw
    return np.linalg.norm(U @ Yw - lam[:, None] * UX, axis=1) / np.linalg.norm(UX, axis=1)


def medians(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of alternating runs, after one of each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(repeats + 1):
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def peak() -> float:
    """Peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
