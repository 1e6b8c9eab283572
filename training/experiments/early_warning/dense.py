"""``python -m training.experiments.early_warning.dense FILE.json``: how dense profiles would have to be.

The hard case: byte-level text, no normalization, width 64, depth 4, batch 16, warm-up 100, gpt2 initialization. It
mostly learns at rates up to .008 and blows up within a few steps at .012. Every figure is measured at every step of the
last `WINDOW` before the onset of each diverging run, and at the same steps of healthy runs. A figure separates from a
step on when it stays outside the healthy runs' range (of all steps within `MATCHED` of it) up to the onset. How often a
healthy run leaves the range of the others is told beside it.

The runs are made when FILE.json is not there yet, which takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from rksp_core import profile_model
from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from rksp_core.features import features
from training.command import ANEW, carried_out
from training.config import Config, parse_config
from training.experiments.indicators import Before, indicators
from training.experiments.onset import onset
from training.experiments.record import compact, compact_all
from training.experiments.sharpness import sharpness
from training.loop import drive
from training.ranks import Ranks
from training.run import Run, build_run
from training.step import Record
from training.tasks import PROBE

SCHEMA = "rksp.dense_onset/1"
WINDOW = 40  # steps before an onset
MATCHED = 10  # steps to either side whose healthy values count
SHARPNESS_EVERY = 4
DIVERGING = {9101: 0.012, 9102: 0.012, 9103: 0.012, 9104: 0.012, 9105: 0.016, 9106: 0.016}  # seed: rate
# 9108 and 9109 at .010 diverged at steps 483 and 414, and 9112 at .008 at 592.
HEALTHY = {9107: 0.008, 9110: 0.008, 9111: 0.008, 9113: 0.006, 9114: 0.006}


@dataclass
class Dense:
    """Loss and gradient norm of all steps, and every figure at the ``wanted`` ones."""

    wanted: Container[int] = ()
    losses: list[float | None] = field(default_factory=list)
    gradient_norms: list[float | None] = field(default_factory=list)
    found: dict[int, dict[str, float | None]] = field(default_factory=dict)
    before: Before | None = None

    def after(self, run: Run, record: Record | None) -> None:
        """Measure a step that is wanted; the one in which the run diverges changed no weight."""
        if record is not None:
            self.losses.append(compact(record.loss))
            self.gradient_norms.append(compact(record.gradient_norm))
            if run.step in self.wanted and not run.diverged:
                self.found[run.step] = compact_all(self._measure(run, record))
        self.before = Before(run) if run.step + 1 in self.wanted else None

    def end(self, run: Run) -> None:
        """Do nothing."""

    def _measure(self, run: Run, record: Record) -> dict[str, float]:
        probe = run.task.batch(PROBE, 0, 16)
        spectral = features(profile_model(run.model, run.to_model(probe.inputs), samples=1024))
        found = spectral | indicators(run, probe, self.before)
        found |= {"loss": record.loss, "gradient_norm": record.gradient_norm}
        if run.step % SHARPNESS_EVERY == 0:
            ends = sharpness(run, record.learning_rate, sequences=8, iterations=8)
            found |= {} if ends is None else {"sharpness": ends[0]}
        return found


def configuration(rate: float, seed: int) -> Config:
    """Return the hard case of this rate."""
    arguments = {"vocabulary": 256, "length": 64, "heads": 4, "width": 64, "depth": 4}
    return parse_config(
        {
            "run_id": "dense",
            "output": "nowhere",
            "seed": seed,
            "steps": 600,
            "device": "cpu",
            "model": {
                "factory": "training.models.gpt:GPT",
                "arguments": arguments | {"norm": "no_norm", "initialization": "gpt2"},
            },
            "task": {"name": "text", "path": "data/kjv.txt", "batch": 16},
            "optimizer": {"name": "adamw", "learning_rate": rate},
            "schedule": {"name": "constant", "warmup": 100},
        },
        "the hard case",
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments.early_warning.dense")
    parser.add_argument("runs", type=Path, metavar="FILE.json", help="of the runs; made when it is not there")
    arguments = parser.parse_args(argv)
    return carried_out("dense", lambda: _work(arguments), ANEW)


def _work(arguments: argparse.Namespace) -> None:
    if not arguments.runs.exists():
        document = {"schema": SCHEMA, "window": WINDOW, "runs": make()}
        write_atomic(arguments.runs, json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n")
    print(report(_read(arguments.runs)))


def make() -> list[dict[str, Any]]:
    """Make all runs: the diverging ones twice, as their onset is known only afterwards."""
    torch.set_num_threads(1)
    runs, windows = [], set()
    for seed, rate in DIVERGING.items():
        plain, diverged_at = _driven(rate, seed, ())
        began = None if diverged_at is None else onset(plain.losses, plain.gradient_norms, diverged_at)
        window = range(max(1, began - WINDOW), began + 1) if began else range(0)
        windows |= set(window)
        runs.append(_document(_driven(rate, seed, window)[0] if window else plain, rate, seed, began, diverged_at))
    for seed, rate in HEALTHY.items():
        around = {step + shift for step in windows for shift in (-MATCHED, 0, MATCHED)}
        followed, diverged_at = _driven(rate, seed, around | windows)
        runs.append(_document(followed, rate, seed, None, diverged_at))
    return runs


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown: for each figure and diverging run, the steps before the onset that it separates."""
    diverging = [run for run in runs if run["onset"] is not None]
    healthy = [run for run in runs if run["diverged_at"] is None]
    names = list(dict.fromkeys(name for run in runs for found in run["found"].values() for name in found))
    rows = []
    for name in names:
        leads = [lead(name, run, healthy) for run in diverging]
        rows.append((median(leads), name, leads, _strays(name, healthy)))
    heads = [f"{run['rate']:g}: {run['onset']} ({run['diverged_at']})" for run in diverging]
    said = (
        f"{len(diverging)} diverging runs (rate: onset (divergence)), {len(healthy)} healthy ones. Steps before the "
        f"onset from which on a figure is outside the healthy range, at most {WINDOW}. The healthy runs have lower "
        f"rates: what is outside for all {WINDOW} may tell the rate, and not the time."
    )
    lines = [
        said,
        "",
        f"| figure | {' | '.join(heads)} | median | healthy steps outside |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for middle, name, leads, strays in sorted(rows, reverse=True):
        lines.append(f"| {name} | {' | '.join(map(str, leads))} | {middle:g} | {strays:.0%} |")
    return "\n".join(lines)


def lead(name: str, run: Mapping[str, Any], healthy: Sequence[Mapping[str, Any]]) -> int:
    """Return how many steps before its onset a figure has left the healthy range for good; 0: it has not."""
    steps = sorted((step for step, found in run["found"].items() if found.get(name) is not None), reverse=True)
    first = run["onset"]
    for step in (step for step in steps if step < run["onset"]):
        if not outside(run["found"][step][name], name, step, healthy):
            break
        first = step
    return int(run["onset"] - first)


def outside(value: float, name: str, step: int, healthy: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a value is beyond all those of the healthy runs near this step."""
    near = [
        found[name]
        for run in healthy
        for other, found in run["found"].items()
        if abs(other - step) <= MATCHED and found.get(name) is not None
    ]
    return bool(near) and not min(near) <= value <= max(near)


def _strays(name: str, healthy: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the healthy runs' own values that are outside the range of the other healthy runs."""
    found = [
        outside(values[name], name, step, [other for other in healthy if other is not run])
        for run in healthy
        for step, values in run["found"].items()
        if values.get(name) is not None
    ]
    return float(np.mean(found)) if found else float("nan")


def _driven(rate: float, seed: int, wanted: Container[int]) -> tuple[Dense, int | None]:
    run = build_run(configuration(rate, seed), Ranks(0, 1, torch.device("cpu")))
    dense = Dense(wanted)
    drive(run, [dense])
    return dense, run.labels.rksp


def _document(dense: Dense, rate: float, seed: int, began: int | None, diverged_at: int | None) -> dict[str, Any]:
    return {"seed": seed, "rate": rate, "onset": began, "diverged_at": diverged_at, "found": dense.found}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"it is a {document['schema']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {path} as {SCHEMA} ({error}); give another path, and it is made") from error
    return [run | {"found": {int(step): found for step, found in run["found"].items()}} for run in document["runs"]]


if __name__ == "__main__":
    sys.exit(main())
