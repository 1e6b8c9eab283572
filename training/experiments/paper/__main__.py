"""``python -m training.experiments.paper [NAME ...]``: compute tables and figures of the paper, and print them.

python -m training.experiments.paper                          # all that are cheap and whose runs are made
python -m training.experiments.paper table_03 --run           # first make its runs, or those that are left of them
python -m training.experiments.paper --render docs/paper.md   # compute nothing; write the page from what is kept

A result is kept as ``benchmarks/data/paper/NAME.json``, the records of its runs below ``benchmarks/data/paper/SPEC``.

Exit codes: 0; 1 some run failed; 2 a mistake, said in one sentence; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rksp_core.atomic import write_atomic
from training.command import carried_out
from training.experiments.paper.contents import chapter, command, missing, names, result_of
from training.experiments.paper.page import markdown, page
from training.experiments.paper.runs import make_runs
from training.experiments.paper.section import write_section


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return carried_out("paper", lambda: _work(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.experiments.paper", description="The paper, run again.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="table_01 .. figure_7; none: all that are cheap")
    parser.add_argument("--run", action="store_true", help="make the runs that they read first")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="runs at a time; -1: one a processor core")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no run after so many seconds")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write the page from the results that are kept")
    return parser


def _work(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        chapter(name)  # a name that does not exist is said before the first hour of runs
    if arguments.run:
        specs = dict.fromkeys(spec for name in arguments.names or names() for spec in chapter(name).SPECS)
        for spec in specs:
            if code := make_runs(spec, arguments.jobs, arguments.time_limit):
                return code
    if arguments.names or not arguments.render:
        for name in arguments.names or (each for each in names() if chapter(each).CHEAP):
            _compute(name)
    if arguments.render:
        write_atomic(arguments.render, page(arguments.render.parent))
    return 0


def _compute(name: str) -> None:
    if missing(name):
        print(f"{name}: not run yet: {command(name)}\n")
        return
    terminal = Console(stderr=True)
    with terminal.status(f"{name}: {chapter(name).TITLE}"):
        section = chapter(name).section()
    write_section(result_of(name), section)
    print(f"{name}: {section.title}\n\n{markdown(section, Path.cwd())}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
