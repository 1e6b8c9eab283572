"""``python -m training.experiments.rescue SPEC.yaml``: whether the closed loop saves runs, and more than the obvious.

Real trainers, one real ``rksp watch`` process with a policy for each arm, and their control folders between them. By
default they go in lockstep (`training.experiments.rescue_run`), so that the experiment can be repeated;
``--free-running`` lets each go at its own pace, as outside. Runs that have a record are not made again; records are
packed into ``records.jsonl.gz`` at the end. ``--report`` prints the table of what there is, and runs nothing.

Exit codes: 0 all runs that were asked for have a record, or the time is over; 1 some run failed, and is named; 2 a
mistake, said in one sentence; 130 Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import joblib
import yaml
from filelock import FileLock, Timeout

from rksp_core.errors import ConfigError, RkspError
from training.command import carried_out
from training.experiments.record import Record, Records
from training.experiments.rescue_report import table
from training.experiments.rescue_run import SCHEMA, carry_out
from training.experiments.rescue_spec import RescueRun, RescueSpec, plan, read_spec

FAILED = 1
START = 120.0  # seconds until a watcher that does not serve has not started
FREE = "free-"  # before the keys of runs that were made without lockstep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return carried_out("rescue", lambda: _rescue(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.experiments.rescue", description="Try to save runs.")
    parser.add_argument("spec", type=Path, metavar="SPEC.yaml")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="records (runs/rescue/NAME)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--limit", type=int, metavar="N", help="make at most N runs now")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no run after so many seconds")
    parser.add_argument("--free-running", action="store_true", help="without lockstep: no run can be repeated")
    parser.add_argument("--report", action="store_true", help="print the table of what there is, and run nothing")
    return parser


def _rescue(arguments: argparse.Namespace) -> int:
    began = time.time()
    spec = read_spec(arguments.spec)
    names = [arm.name for arm in spec.arms]
    for name in arguments.arms or ():
        if name not in names:
            raise ConfigError(f"--arms: {name!r} is no arm; the arms are {', '.join(names)}")
    runs = [run for run in plan(spec) if run.arm.name in (arguments.arms or names)]
    folder = arguments.folder or Path("runs/rescue") / spec.name
    records = Records(folder, SCHEMA)
    if arguments.report:
        free = arguments.free_running
        print(table(spec, runs, [_unmarked(record) for record in records if record["lockstep"] is not free]))
        return 0
    try:
        with FileLock(_made(folder) / ".lock", timeout=0):
            deadline = None if arguments.time_limit is None else began + arguments.time_limit
            try:
                return _make(spec, runs, folder, records, arguments, deadline)
            finally:
                records.pack()
    except Timeout as error:
        raise ConfigError(f"another rescue is at work in {folder}; wait for it, or give another --folder") from error


def _make(
    spec: RescueSpec,
    runs: list[RescueRun],
    folder: Path,
    records: Records,
    arguments: argparse.Namespace,
    deadline: float | None,
) -> int:
    """Make the runs that are left, write a record as soon as each is over, and name those that failed."""
    lockstep, done = not arguments.free_running, records.keys()
    left = [run for run in runs if _key(run, lockstep=lockstep) not in done][: arguments.limit]
    print(f"{spec.name}: {len(left)} runs are left in {folder}", flush=True)
    if not left:
        return 0
    failed = []
    with watching(spec, folder / "runs") as port_file, joblib.parallel_config("loky", n_jobs=arguments.jobs):
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        attempts = (joblib.delayed(_attempt)(spec, run, folder / "runs", port_file, lockstep, deadline) for run in left)
        for run, record, error in parallel(attempts):
            if record is not None:
                records.write(record | {"key": _key(run, lockstep=lockstep)})
                print(_ending(record), flush=True)
            elif error:
                failed.append(f"rescue: {run.key} failed: {error}")
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return FAILED if failed else 0


def _attempt(
    spec: RescueSpec, run: RescueRun, folder: Path, port_file: Path, lockstep: bool, deadline: float | None
) -> tuple[RescueRun, Record | None, str]:
    """Make a run in a worker; its trouble does not end the others."""
    if deadline is not None and time.time() > deadline:
        return run, None, ""
    try:
        return run, carry_out(spec, run, folder, port_file, lockstep=lockstep), ""
    except Exception as error:  # noqa: BLE001 - it is said at the end
        return run, None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def watching(spec: RescueSpec, folder: Path) -> Iterator[Path]:
    """Watch all run folders that are made below ``folder``, with each arm's policy; yield the file with the address.

    Raises
    ------
    RkspError
        When the watcher does not start; its log lies beside ``folder``.
    """
    shutil.rmtree(folder, ignore_errors=True)  # halves of runs
    folder.mkdir(parents=True)
    watched = [arm for arm in spec.arms if arm.policy is not None]
    settings = {
        "poll_interval": 0.1,
        "listen": "127.0.0.1:0",
        "replay": {"noise_groups": 0},
        "backlog": {"every": 10**9},  # the first checkpoint; from then on the trainer's own profiles say more
        "runs": [{"folder": str(folder / arm.slug / "*"), "enforce": True, "policy": arm.policy} for arm in watched],
    }
    with tempfile.TemporaryDirectory() as place, (folder.parent / "watch.log").open("ab") as log:
        config, port_file = Path(place) / "watch.yaml", Path(place) / "port"
        if not watched:
            yield port_file
            return
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "rksp_monitor",
            "watch",
            "--config",
            str(config),
            "--port-file",
            str(port_file),
        ]
        # As Ctrl-C does: unwinding ends the watcher, which would go on alone.
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        process = subprocess.Popen(command, stderr=log)  # noqa: S603 - our own
        try:
            end = time.monotonic() + START
            while not port_file.exists() or not port_file.read_text(encoding="utf-8").strip():
                if process.poll() is not None or time.monotonic() > end:
                    raise RkspError(f"`rksp watch` did not start; its log is {log.name}")
                time.sleep(0.05)
            yield port_file
        finally:
            process.terminate()
            process.wait()
            signal.signal(signal.SIGTERM, previous)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder} ({error.strerror}); give another --folder") from error
    return folder


def _key(run: RescueRun, *, lockstep: bool) -> str:
    return run.key if lockstep else FREE + run.key


def _unmarked(record: Record) -> Record:
    return record | {"key": record["key"].removeprefix(FREE)}


def _ending(record: Record) -> str:
    orders = ", ".join(f"{order['generation']} at step {order['step']}" for order in record["orders"]) or "none"
    ending = f"{record['status']} at step {record['step']}, held-out loss {record['final']['loss']}"
    back = ", ".join(f"{each['left']} -> {each['reached']}" for each in record["rollbacks"]) or "none"
    seconds = ", ".join(f"{name} {value}" for name, value in record["seconds"].items())
    return f"{record['key']}: {ending}; orders {orders}; rollbacks {back}; seconds: {seconds}"


if __name__ == "__main__":
    sys.exit(main())
