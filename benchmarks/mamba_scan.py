"""Mamba's parallel scan against the sequential loop: error and speed.

    python benchmarks/mamba_scan.py

The loop is the fastest plain one: a fused multiply-add a step, its inputs split into steps at once (indexing them step
by step makes autograd quadratic in T). Both run on the same tensors of one mixer, batch x T x e x N, in one process and
alternately; ratios of the medians count, seconds depend on the machine. On a CPU the loop moves the least memory, so
the scan gains by its own backward pass and by fewer calls, and loses where the tensors leave the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.models.scan import scan

STATE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 256, 1024], help="lengths T")
    parser.add_argument("--width", type=int, default=64, help="d; the recurrence has 2 d x 16 numbers a token")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = f"batch {arguments.batch}, {2 * arguments.width} channels of {STATE} numbers, {arguments.device}"
    print(f"{size}, medians of {arguments.repeats}; x: how many times as fast as the loop the scan is")
    for steps in arguments.steps:
        decay, update = problem(arguments.batch, steps, 2 * arguments.width, arguments.device)
        exact = one_by_one(decay, update)
        print(f"T = {steps}")
        print(f"  largest error, float64   scan {error(scan(decay, update), exact):.1e}")
        decay, update = decay.float(), update.float()
        print(f"                 float32   scan {error(scan(decay, update), exact):.1e}", end="")
        print(f"     loop {error(one_by_one(decay, update), exact):.1e}")
        for name, run in (("forward", forward), ("forward and backward", backward)):
            fast, plain = medians([partial(run, each, decay, update) for each in (scan, one_by_one)], arguments.repeats)
            print(f"  {name:22}   scan {fast * 1e3:6.1f} ms   loop {plain * 1e3:6.1f} ms   x {plain / fast:.2f}")


def problem(batch: int, steps: int, channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Return decays and updates (B, T, e, N) in float64, decays as of a mixer at the start: delta in .001..0.1."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.exp(
        torch.empty(batch, steps, channels, 1, dtype=torch.float64).uniform_(-6.9, -2.3, generator=generator)
    )
    update = delta * torch.randn(batch, steps, channels, STATE, dtype=torch.float64, generator=generator)
    return torch.exp(-delta * torch.arange(1.0, STATE + 1)).to(device), update.to(device)


def one_by_one(decay: Tensor, update: Tensor) -> Tensor:
    state, states = torch.zeros_like(update[:, 0]), []
    for a, b in zip(decay.unbind(1), update.unbind(1), strict=True):
        state = torch.addcmul(b, a, state)
        states.append(state)
    return torch.stack(states, dim=1)


def error(states: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest state."""
    return float((states - exact).abs().max() / exact.abs().max())


def forward(function: Callable[[Tensor, Tensor], Tensor], decay: Tensor, update: Tensor) -> None:
    with torch.no_grad():
        function(decay, update)
    wait(decay)


def backward(function: Callable[[Tensor, Tensor], Tensor], decay: Tensor, update: Tensor) -> None:
    inputs = decay.detach().requires_grad_(), update.detach().requires_grad_()
    states = function(*inputs)
    torch.autograd.grad(states, inputs, update)
    wait(decay)


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def medians(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return medians of alternating runs, after one of each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(repeats + 1):
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


if __name__ == "__main__":
    main()
