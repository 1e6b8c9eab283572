"""What KSS costs a training step: every 10 steps, half of the blocks, 2048 token states (Kim et al. 2026: 8-12 %).

    python benchmarks/kss_overhead.py [--widths 64 128 256 512]

One run a width, in which steps with a term and steps without one alternate, so both meet the same noise of the
machine. The overhead at interval 10 is (median with - median without) / (10 x median without); the measurement of the
gradient ratio, one more backward pass at every tenth term, is a column of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from training.config import parse_config  # noqa: E402
from training.ranks import Ranks  # noqa: E402
from training.run import Run, build_run  # noqa: E402
from training.step import advance  # noqa: E402

INTERVAL, RATIO_EVERY, DEPTH = 10, 10, 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps a width")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Pre-LN GPT, {DEPTH} blocks, batch 32 x 64, one core; KSS on 3 blocks, r = 32, N = 2048")
    print("  width   step without   with a term   overhead at 10   and the ratio   paper")
    for width in arguments.widths:
        plain, with_term, with_ratio = steps(width, arguments.steps)
        overhead = (with_term - plain) / (INTERVAL * plain)
        ratio = (with_ratio - with_term) / (INTERVAL * RATIO_EVERY * plain)
        print(
            f"{width:7d} {plain * 1e3:11.1f} ms {with_term * 1e3:10.1f} ms {overhead:15.2%} {ratio:14.2%}   8-12 %",
            flush=True,
        )


def steps(width: int, pairs: int) -> tuple[float, float, float]:
    """Return median seconds of a step without a term, with one, and with one whose gradient ratio is measured."""
    plain, with_term = run(width, ratio=False), []
    without: list[float] = []
    for _ in range(pairs + 2):
        with_term.append(advance(plain).step_seconds)  # the first one of two is due
        without.append(advance(plain).step_seconds)
    measured = run(width, ratio=True)
    with_ratio = [advance(measured).step_seconds for _ in range(2 * max(3, pairs // 3))][2::2]
    return tuple(statistics.median(each) for each in (without[2:], with_term[2:], with_ratio))  # type: ignore[return-value]


def run(width: int, *, ratio: bool) -> Run:
    """Return a run in which every second step has a term."""
    arguments = {"vocabulary": 256, "length": 64, "width": width, "depth": DEPTH, "heads": 4, "norm": "pre_ln"}
    document = {
        "run_id": "overhead",
        "output": "unused",
        "model": {"factory": "training.models.gpt:GPT", "arguments": arguments},
        "task": {"name": "associative_recall", "batch": 32},
        "kss": {"alpha": 0.15, "interval": 2, "layer_fraction": 0.5},
        "metrics": {"kss_ratio_every": int(ratio)},
    }
    return build_run(parse_config(document, "benchmark"), Ranks(0, 1, torch.device("cpu")))


if __name__ == "__main__":
    main()
