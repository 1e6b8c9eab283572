"""What a profile costs: one layer against plain NumPy, and a 12-layer model end to end.

    python benchmarks/profile_cost.py

The baseline runs in the same process and on the same threads: Algorithm 1 of Kim et al. 2026 as printed, in NumPy,
without Kreiss constant and growth, which the product computes on top. Ratios count, seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from rksp_core.moments import Moments
from rksp_core.profiling import profile_layer, profile_model

EPS = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model-only", action="store_true", help="only the 12-layer model (a fresh process for RSS)")
    arguments = parser.parse_args()
    if arguments.model_only:
        model(workers=0)
        return
    layer(arguments.width, arguments.samples, arguments.repeats)
    subprocess.run([sys.executable, __file__, "--model-only"], check=True)


def layer(width: int, samples: int, repeats: int) -> None:
    """One layer: snapshots in, every figure out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, width, generator=generator)
    operator = torch.randn(width, width, generator=generator) * (0.7 / width**0.5) + 0.8 * torch.eye(width)
    y = x @ operator.T + 0.3 * torch.randn(samples, width, generator=generator)

    def product() -> object:
        moments = Moments(width)
        moments.update(x, y)
        return profile_layer("layer", moments, depth=12)

    X, Y = x.double().numpy().T.copy(), y.double().numpy().T.copy()
    ours, theirs = interleaved(product, lambda: algorithm_1(X, Y), repeats)
    print(f"one layer, d = {width}, N = {samples}, {torch.get_num_threads()} threads, median of {repeats}")
    print(f"  rksp, with Kreiss constant and growth  {ours:6.2f} s")
    print(f"  NumPy Algorithm 1, without them        {theirs:6.2f} s   ratio {theirs / ours:.2f}")


def model(workers: int) -> None:
    """The GPT-2 124M shape: 12 blocks of width 768, random weights, 2048 token states."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.randint(0, 50257, (32, 64), generator=torch.Generator().manual_seed(0))
    before = peak()
    start = time.perf_counter()
    if workers:
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            profile = profile_model(gpt2, ids, executor=pool)
    else:
        profile = profile_model(gpt2, ids)
    seconds = time.perf_counter() - start
    mean = profile.summary["near_unit_mass"]["mean"]
    print(f"GPT-2 124M shape, 12 layers, d = 768, N = 2048, {workers or 'no'} workers (near-unit mass {mean:.3f})")
    print(f"  end to end {seconds:6.2f} s, peak RSS {peak():.2f} GB ({before:.2f} GB of it model and libraries)")


def algorithm_1(X: np.ndarray, Y: np.ndarray) -> tuple[object, ...]:
    """Kim et al. 2026, Alg. 1, as printed: d x N snapshots -> eigenvalues, kappa, eta, residuals, masses."""
    N = X.shape[1]
    Xc, Yc = X - X.mean(axis=1, keepdims=True), Y - Y.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(Xc @ Xc.T / (N - 1) + EPS * np.eye(len(X)))
    W = vectors @ np.diag(values**-0.5) @ vectors.T
    Xw, Yw = W @ Xc, W @ Yc
    A = Yw @ np.linalg.pinv(Xw)
    lam, V = np.linalg.eig(A)
    kappa = np.linalg.cond(V)
    eta = np.linalg.norm(Yw - A @ Xw) / np.linalg.norm(Yw - Xw)
    U = np.linalg.inv(V)
    UX = U @ Xw
    residuals = np.linalg.norm(U @ Yw - lam[:, None] * UX, axis=1) / np.linalg.norm(UX, axis=1)
    near_unit = np.mean((np.abs(lam) >= 0.9) & (np.abs(lam) <= 1.05))
    return lam, kappa, eta, residuals, near_unit


def interleaved(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of alternating runs, after one of each to warm up."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for round_ in range(repeats + 1):
        for index, run in enumerate((a, b)):
            start = time.perf_counter()
            run()
            if round_:
                times[index].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def peak() -> float:
    """Peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
