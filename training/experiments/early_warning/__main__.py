"""``python -m training.experiments.early_warning FOLDER``: which alarm comes before a divergence, and how early.

Without ``--rules``: everything that a choice needs, on the part ``tuning`` of a sweep's records, as Markdown: which
runs could be warned of at all, which figures move, which sequential test does most with them, and what sets of rules
catch and alarm on runs that they were not chosen on. ``--choose FILE.json`` writes the rules down.

With ``--rules FILE.json``: what those rules do, unchanged, on another part.

    python -m training.experiments.early_warning runs/sweeps/risk --choose rules.json --plot frontier.png
    python -m training.experiments.early_warning runs/sweeps/risk --on held_out --rules rules.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rksp_core.errors import ConfigError
from training.command import ANEW, carried_out
from training.experiments.early_warning import report
from training.experiments.early_warning.chosen import read_chosen, write_chosen
from training.experiments.record import read_records
from training.experiments.spec import PARTS


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, and return the exit code."""
    arguments = _parser().parse_args(argv)
    return carried_out("early_warning", lambda: _work(arguments), ANEW)


def _work(arguments: argparse.Namespace) -> None:
    if arguments.rules is None and arguments.on != "tuning":
        raise ConfigError(f"nothing is chosen on {arguments.on!r}; give --rules, or leave out --on")
    chosen = None if arguments.rules is None else read_chosen(arguments.rules)
    records = [record for record in read_records(arguments.records) if record["part"] == arguments.on]
    if not records:
        raise ConfigError(f"{arguments.records} holds no runs of the part {arguments.on!r}; give another folder")
    if chosen is not None:
        print(report.applied(records, chosen))
        return
    text, chosen = report.evidence(records, plot=arguments.plot)
    print(text)
    if arguments.choose is not None:
        write_chosen(arguments.choose, chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.experiments.early_warning")
    parser.add_argument("records", type=Path, metavar="FOLDER", help="of a sweep, or its records.jsonl.gz")
    parser.add_argument("--on", choices=PARTS, default="tuning", help="the part that is looked at (tuning)")
    parser.add_argument("--rules", type=Path, metavar="FILE.json", help="apply these rules, and choose none")
    parser.add_argument("--choose", type=Path, metavar="FILE.json", help="write the chosen rules")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the frontier")
    return parser


if __name__ == "__main__":
    sys.exit(main())
