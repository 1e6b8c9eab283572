"""What a norm costs: training steps a second of each residual scheme against Pre-LN.

    python benchmarks/norm_speed.py

All models take turns, one step each a round, on the same tokens and one thread. The figure is the median over the
rounds of the ratio within a round, so a machine that slows down for a while slows all of them; the quartiles beside it
show how far the ratios scatter. A step is forward, backward and AdamW, as the trainer makes it, without its records.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.models.gpt import GPT
from training.models.norms import NORMS

BASELINE = "pre_ln"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = {"width": arguments.width, "depth": arguments.depth, "length": arguments.length}
    starts = {norm: {"norm": norm} for norm in NORMS}
    starts |= {name: {"norm": "no_norm", "initialization": name} for name in ("fixup", "rezero")}
    steps = {name: step(arguments.batch, **size, **start) for name, start in starts.items()}
    seconds = rounds(steps, arguments.rounds)
    print(f"d = {arguments.width}, L = {arguments.depth}, {arguments.batch} x {arguments.length} tokens, ", end="")
    print(f"{arguments.rounds} rounds; Pre-LN {1 / statistics.median(seconds[BASELINE]):.1f} steps/s")
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(
            [base / own for base, own in zip(seconds[BASELINE], taken, strict=True)], n=4
        )
        print(f"  {name:16} {middle:5.2f} x Pre-LN   (quartiles {low:.2f} .. {high:.2f})")


def step(batch: int, length: int, width: int, depth: int, **start: str) -> Callable[[], None]:
    """Return a function that makes one step of a model of its own."""
    torch.manual_seed(0)
    model = GPT(vocabulary=256, length=length, width=width, depth=depth, heads=4, **start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(256, (batch, length + 1), generator=torch.Generator().manual_seed(0))

    def advance() -> None:
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return advance


def rounds(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, after three rounds to warm up; every round begins elsewhere."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_ in range(-3, count):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            began = time.perf_counter()
            steps[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
