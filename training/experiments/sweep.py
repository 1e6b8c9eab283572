"""``python -m training.experiments.sweep SPEC.yaml``: hundreds of runs, one record each.

A sweep that was killed goes on where it was: a run that has a record is done, one that was half done is made again.
Runs are spread over processes by joblib, one thread each; ``--backend tcp://HOST:8786`` spreads them over the workers
of a Dask cluster, which need this repository, its data and its packages. Whatever ends the sweep, the records are
packed into ``records.jsonl.gz`` beside ``plan.json``, and these two files are all that it needs to go on elsewhere.

Exit codes: 0 all runs that were asked for have a record, or the time is over; 1 some run failed, and is named; 2 a
mistake in the spec, said in one sentence before the first run; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import joblib
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rksp_core.errors import ConfigError
from training.command import carried_out
from training.experiments.one_run import Attempt, attempt
from training.experiments.plan import PlannedRun, plan, write_plan
from training.experiments.record import Records
from training.experiments.spec import PARTS, Spec, read_spec

FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return carried_out("sweep", lambda: _sweep(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.experiments.sweep", description="Make many runs.")
    parser.add_argument("spec", type=Path, metavar="SPEC.yaml")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="plan and records (runs/sweeps/NAME)")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="runs at a time; -1: one a processor core")
    parser.add_argument(
        "--backend", default="loky", help="loky (default), sequential, or where a Dask scheduler listens"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:n")
    parser.add_argument("--part", choices=PARTS, help="only the runs of this part")
    parser.add_argument("--limit", type=int, metavar="N", help="make at most N runs now")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no run after so many seconds")
    parser.add_argument("--check", action="store_true", help="validate the spec, say what it holds, and run nothing")
    return parser


def _sweep(arguments: argparse.Namespace) -> int:
    began = time.time()
    spec = read_spec(arguments.spec)
    runs = plan(spec)
    if arguments.check:
        print(_summary(spec, runs))
        return 0
    folder = arguments.folder or Path("runs/sweeps") / spec.name
    write_plan(folder / "plan.json", spec, runs)
    records = Records(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            done = records.keys()
            wanted = [run for run in runs if arguments.part in (None, run.part)]
            left = [run for run in wanted if run.key not in done]
            print(f"{spec.name}: {len(wanted) - len(left)} of {len(wanted)} runs have a record in {folder}", flush=True)
            try:
                failed = _make(spec, left[: arguments.limit], records, arguments, began)
            finally:
                records.pack()
    except Timeout as error:
        raise ConfigError(f"another sweep is at work in {folder}; wait for it, or give another --folder") from error
    done = records.keys()
    print(f"{spec.name}: {sum(run.key in done for run in wanted)} of {len(wanted)} runs have a record now")
    for made in failed:
        print(f"sweep: {made.run.key} ({made.run.group}) failed: {made.error}", file=sys.stderr)
    return FAILED if failed else 0


def _make(
    spec: Spec, runs: list[PlannedRun], records: Records, arguments: argparse.Namespace, began: float
) -> list[Attempt]:
    """Make the runs, write a record as soon as each is over, and return those that failed."""
    deadline = None if arguments.time_limit is None else began + arguments.time_limit
    failed = []
    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task(spec.name, total=len(runs))
        diverged = 0
        for count, made in enumerate(_attempts(spec, runs, arguments, deadline), start=1):
            if made.record is not None:
                records.write(made.record)
                diverged += made.record["status"] == "diverged"
            elif made.error:
                failed.append(made)
            progress.update(bar, advance=1, description=f"{spec.name}: {diverged} diverged")
            if not terminal.is_terminal and (made.record is not None or made.error):
                print(f"{count}/{len(runs)} {_ending(made)}", flush=True)
    return failed


def _attempts(
    spec: Spec, runs: list[PlannedRun], arguments: argparse.Namespace, deadline: float | None
) -> Iterator[Attempt]:
    name, options = arguments.backend, {}
    if name == "loky":
        options = {"inner_max_num_threads": 1}
    elif "://" in name:
        name, options = "dask", {"scheduler_host": name}
    try:
        backend = joblib.parallel_config(backend=name, n_jobs=arguments.jobs, **options)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"--backend {arguments.backend}: {error}; loky needs nothing else") from error
    with backend:
        # One run a batch, and few waiting: what is waiting when a sweep is killed costs nothing.
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
        yield from parallel(joblib.delayed(attempt)(spec, run, arguments.device, deadline) for run in runs)


def _ending(made: Attempt) -> str:
    if made.record is None:
        return f"{made.run.key} ({made.run.group}) failed: {made.error}"
    record = made.record
    ending = f"held-out loss {record['final']['loss']}"
    if record["status"] == "diverged":
        ending = f"diverged at step {record['labels']['rksp']}, from {record['onset']} on"
    return f"{record['key']} ({record['group']}): {ending}; {sum(record['seconds'].values()):.1f} s"


def _summary(spec: Spec, runs: list[PlannedRun]) -> str:
    parts = ", ".join(f"{sum(run.part == part for run in runs)} {part}" for part in PARTS)
    return f"{spec.name}: the spec is valid ({len(runs)} runs: {parts})"


if __name__ == "__main__":
    sys.exit(main())
