"""``python -m training.experiments.outcomes FOLDER``: a sweep's records as outcomes, for `rksp calibrate`.

python -m training.experiments.outcomes runs/sweeps/risk --part tuning > tuning.jsonl
rksp calibrate tuning.jsonl --output risk.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Literal, get_args

from rksp_core.errors import ConfigError
from rksp_core.launch import Launch
from rksp_core.outcomes import Outcome
from training.command import ANEW, carried_out
from training.experiments.record import Record, read_records
from training.experiments.spec import PARTS

STEPS = 20  # of the look-ahead
Label = Literal["diverged", "failed"]
LABELS: tuple[Label, ...] = get_args(Label)


def main(argv: list[str] | None = None) -> int:
    """Print one outcome a line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments.outcomes", description=__doc__)
    parser.add_argument("records", type=Path, metavar="FOLDER", help="of a sweep, or its records.jsonl.gz")
    parser.add_argument("--part", choices=PARTS, help="only the runs of this part")
    parser.add_argument("--look-ahead", type=int, default=STEPS, metavar="STEPS", help=f"which one ({STEPS})")
    parser.add_argument("--label", choices=LABELS, default="diverged", help="what counts as diverged")
    arguments = parser.parse_args(argv)
    return carried_out("outcomes", lambda: _work(arguments), ANEW)


def _work(arguments: argparse.Namespace) -> None:
    for record in read_records(arguments.records):
        if arguments.part in (None, record["part"]):
            print(json.dumps(outcome_of(record, arguments.look_ahead, arguments.label).to_dict()))


def outcome_of(record: Record, steps: int = STEPS, label: Label = "diverged") -> Outcome:
    """Return the outcome of a run, launched with its look-ahead of ``steps`` steps.

    Raises
    ------
    ConfigError
        When the run had no such look-ahead.
    """
    ahead = next((each for each in record["look_ahead"] if each["steps"] == steps), None)
    if ahead is None:
        counts = ", ".join(str(each["steps"]) for each in record["look_ahead"]) or "none"
        raise ConfigError(f"{record['key']} has no look-ahead of {steps} steps; it has {counts}")
    given = record["configuration"]
    launch = Launch(
        learning_rate=given["optimizer.learning_rate"],
        optimizer=given["optimizer.name"],
        depth=given["model.arguments.depth"],
        width=given["model.arguments.width"],
        losses=ahead["losses"],
        gradient_norms=ahead["gradient_norms"],
        hidden_rms=(ahead["hidden_rms_before"], ahead["hidden_rms_after"]),
        finite=ahead["finite"],
        steps=steps,
        normalized=given["model.arguments.norm"] != "no_norm",
        clipped=given["stabilizers.clip"] is not None,
    )
    bad = record["labels"]["rksp"] is not None if label == "diverged" else not record["learned"]
    return Outcome(record["key"], launch, bad, record["horizon"])


if __name__ == "__main__":
    sys.exit(main())
