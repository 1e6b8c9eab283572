"""``python -m training.experiments.eigenvector_condition SPEC.yaml FOLDER``: kappa before the first step, of each run.

The records leave the eigenvector condition out, as it moves by half its value from one probe to the next. The paper
ranks runs by it all the same (Table 2), so it is made up for: a run's model is a function of its plan, and is profiled
again as it was. What comes out beside it must be what the record says, or the model is another one. The figures go into
``eigenvector_condition.json`` beside the records: {key of the run: mean over the layers, or null}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from rksp_core.features import figures
from training.command import carried_out
from training.experiments.plan import PlannedRun, plan
from training.experiments.record import Record, compact, read_records
from training.experiments.spec import Spec, read_spec
from training.experiments.trace import Trace
from training.ranks import Ranks
from training.run import build_run

FILE = "eigenvector_condition.json"
SAME = 2e-3  # relative: records have four digits, and another processor rounds otherwise


def main(argv: list[str] | None = None) -> int:
    """Write the file, or bring it up to date, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments.eigenvector_condition")
    parser.add_argument("spec", type=Path, metavar="SPEC.yaml")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the sweep's records")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    return carried_out("eigenvector_condition", lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> None:
    spec = read_spec(arguments.spec)
    runs = {run.key: run for run in plan(spec)}
    path = arguments.folder / FILE
    known = read(path)
    left = [record for record in read_records(arguments.folder) if record["key"] not in known]
    for record in track(left, "models", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        if record["key"] not in runs:
            raise ConfigError(f"{record['key']} is no run of {arguments.spec}; give the spec of these records")
        known[record["key"]] = compact(condition(spec, runs[record["key"]], record))
        write_atomic(path, json.dumps(dict(sorted(known.items())), indent=0, allow_nan=False) + "\n")
    print(f"{path}: {len(known)} runs, {len(left)} of them new")


def read(path: Path) -> dict[str, float | None]:
    """Return what the file holds; nothing where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def condition(spec: Spec, planned: PlannedRun, record: Record) -> float | None:
    """Return the mean of kappa over the layers before the first step.

    Raises
    ------
    ConfigError
        When the profile is not the one of the record.
    """
    run = build_run(planned.config(spec, "cpu"), Ranks(0, 1, torch.device("cpu")))
    trace = Trace(run, spec.measure)
    trace.after(run, None)
    if trace.first is None:
        return None
    for name, value in figures(trace.first).numbers.items():
        recorded = record["initial"]["features"].get(name)
        if recorded is not None and not math.isclose(value, recorded, rel_tol=SAME, abs_tol=SAME):
            raise ConfigError(
                f"{planned.key}: {name} is {value:.4g} before the first step, its record says {recorded:.4g}; "
                "give the spec and the data that the records were made with"
            )
    return trace.first.summary["eigenvector_condition"]["mean"]


if __name__ == "__main__":
    sys.exit(main())
