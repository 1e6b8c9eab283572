"""``python -m training.experiments.paper.overhead``: what each arm of Tables 3 and 4 costs a step.

Ten steps of a run with the arm and ten of one without alternate on one core, so both meet the same noise of the
machine; the ratio is of the processor time of each pair. Kept as ``benchmarks/data/paper/overhead.json``; timing them
anew gives other digits. KSS has a term in one of ten steps.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from rich.progress import track

from rksp_core.atomic import write_atomic
from training.command import ANEW, carried_out
from training.experiments.intervals import mean
from training.experiments.paper.contents import DATA, spec_of
from training.experiments.plan import PlannedRun, plan
from training.experiments.spec import Spec, read_spec
from training.ranks import Ranks
from training.run import Run, build_run
from training.step import advance

SPEC = "no_norm_recall"
FILE = DATA / "overhead.json"
RATE = 0.001  # low, so that no arm diverges while it is timed
STEPS, PAIRS = 10, 12
ARMS = (
    "clip 1.0",
    "KSS 0.15",
    "spectral norm",
    "weight norm",
    "gradient penalty 0.1",
    "SAM 0.05",
    "Lion",
    "KSS 0.15 + SAM 0.05",
)


def main() -> int:
    """Time all arms and keep what was found."""
    return carried_out("overhead", _work, ANEW)


def _work() -> None:
    spec = read_spec(spec_of(SPEC))
    first = {run.group: run for run in plan(spec)}
    torch.set_num_threads(1)
    costs = {name: _cost(spec, first["none"], first[name]) for name in track(ARMS, "timing")}
    write_atomic(FILE, json.dumps(costs, indent=1) + "\n")
    print(json.dumps(costs, indent=1))


def read() -> dict[str, str]:
    """Return the overhead of each arm that was timed, in percent, such as ``12.3 [11.0, 13.6], n = 12 pairs``."""
    return dict(json.loads(FILE.read_text(encoding="utf-8"))) if FILE.exists() else {}


def _cost(spec: Spec, nothing: PlannedRun, arm: PlannedRun) -> str:
    """Return the mean over pairs of time with / time without - 1, the first pair left out."""
    without, with_arm = (_build(spec, each) for each in (nothing, arm))
    ratios = [_seconds(with_arm) / _seconds(without) for _ in range(PAIRS + 1)][1:]
    return f"{mean([100 * (ratio - 1) for ratio in ratios], 1)} pairs"


def _build(spec: Spec, planned: PlannedRun) -> Run:
    config = planned.config(spec)
    slow = config.optimizer.model_copy(update={"learning_rate": RATE * (0.1 if config.optimizer.name == "lion" else 1)})
    return build_run(config.model_copy(update={"optimizer": slow}), Ranks(0, 1, torch.device("cpu")))


def _seconds(run: Run) -> float:
    began = time.process_time()
    for _ in range(STEPS):
        advance(run)
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
