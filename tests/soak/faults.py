"""What the world does to a watcher: a full disk, folders that may not be written, a clock that goes back, silence.

Each leaves a sentence in the log, and nothing that a later moment could not mend.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from rksp_core.control import ControlListener
from tests.soak.broken_checkpoints import HELD
from tests.soak.process import Watch, documents, open_rows, rows
from tests.soak.report import Report
from tests.soak.stream import ARGUMENTS, MODEL, POLICY, Templates, write_profile
from tests.waiting import until

CLOCK = Path(__file__).parent / "clock"
LAST_STEP = "rksp_checkpoint_last_processed_step"
GENERATION = "rksp_control_desired_generation"
OVERDUE = "rksp_control_acknowledgement_overdue"


def run(report: Report, folder: Path, *, short: bool) -> None:
    tries: list[Callable[[Report, Path], None]] = [a_port_that_is_taken, control_not_writable, a_trainer_that_is_silent]
    if not short:
        tries += [
            a_state_folder_that_is_read_only,
            a_full_disk,
            a_clock_that_goes_back,
            a_ledger_that_is_deleted,
            a_run_that_is_made_again,
        ]
    for attempt in tries:
        place = folder / attempt.__name__
        (place / "run").mkdir(parents=True)
        try:
            attempt(report, place)
        except AssertionError as error:  # something was waited for in vain
            report.promise(attempt.__name__.replace("_", " "), kept=False, found=error)


def a_port_that_is_taken(report: Report, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = _refused(folder, "--listen", f"127.0.0.1:{port}")
    kept = code == 2 and "cannot listen" in said and len(said.splitlines()) == 1
    report.promise("a port that is taken is one sentence and exit code 2", kept, (code, said))


def a_state_folder_that_is_read_only(report: Report, folder: Path) -> None:
    state = folder / "state"
    state.mkdir(mode=0o555)
    write_profile(folder / "run", 1)
    code, said = _refused(folder, "--once", "--state-dir", str(state), prefix=_held(report))
    last = said.splitlines()[-1] if said else ""
    kept = code == 2 and last.startswith("rksp: ") and "Traceback" not in said
    report.promise("a state folder that is read-only is one sentence and exit code 2", kept, (code, said))


def a_full_disk(report: Report, folder: Path) -> None:
    """Let the disk of the ledger run full, and make room again."""
    with _small_disk(report) as disk:
        if disk is None:
            return
        run = folder / "run"
        with _watch(folder, "--state-dir", str(disk)) as watch:
            write_profile(run, 1)
            until(lambda: watch.metric(LAST_STEP) == 1)
            _fill(disk / "filler")
            for step in range(2, 200):
                write_profile(run, step)
            said = lambda: watch.process.poll() is not None or watch.logged("suspended")  # noqa: E731
            until(said, 60, "a sentence about the full disk")
            report.figure("a full disk is met with", _last_problem(watch))
            (disk / "filler").unlink()
            if watch.process.poll() is None:
                until(lambda: watch.metric(LAST_STEP) == 199, 60, "going on once there is room")
                watch.end()
        if not _all_done(disk):
            with _watch(folder, "--state-dir", str(disk)) as watch:
                until(lambda: watch.metric(LAST_STEP) == 199, 60)
                watch.end()
        report.promise(
            "after a full disk every event is judged, and the ledger is sound", _all_done(disk), _state(disk)
        )


def control_not_writable(report: Report, folder: Path) -> None:
    prefix, run = _held(report), folder / "run"
    if prefix is None:
        return
    control = run / "control"
    control.mkdir(mode=0o555)
    with _watch(folder, "--enforce", prefix=prefix) as watch:
        write_profile(run, 1)
        write_profile(run, 2, alarm=True)
        until(lambda: watch.logged("order not written"), why="a sentence about the control folder")
        until(lambda: watch.metric(GENERATION) == 1)
        control.chmod(0o755)
        listener = ControlListener(control, "run")
        until(lambda: listener.poll(3) is not None, why="the order, once the folder can be written")
        said = watch.logged("order not written")
        report.figure("sentences about a control folder that cannot be written", str(len(said)), said[0]["problem"])
        report.promise("the order comes once its folder can be written, as generation 1", watch.metric(GENERATION) == 1)
        report.promise("the daemon ends when told", watch.end() == 0)


def a_trainer_that_is_silent(report: Report, folder: Path) -> None:
    run = folder / "run"
    with _watch(folder, "--enforce", RKSP_CONTROL__ACKNOWLEDGE_WITHIN="1.0") as watch:
        write_profile(run, 1, alarm=True)
        until(lambda: watch.metric(GENERATION) == 1)
        until(lambda: watch.metric(OVERDUE) == 1, why="an alarm about an order without answer")
        trainer = ControlListener(run / "control", "run")
        order = trainer.poll(2)
        assert order is not None
        trainer.acknowledge(order, 2)
        until(lambda: watch.metric(OVERDUE) == 0, why="the end of the alarm, once the trainer answered")
        said = [line for line in watch.logged("order not acknowledged") if line["generation"] == 1]
        report.promise("a late answer is an alarm, which ends with the answer", watch.metric(GENERATION) == 1)
        report.promise("the alarm is in the log, once", len(said) == 1, said)
        watch.end()


def a_clock_that_goes_back(report: Report, folder: Path) -> None:
    """An hour back, in the middle of a back-off and of an order's life."""
    run, clock = folder / "run", folder / "clock"
    clock.write_text("0")
    variables = {"PYTHONPATH": f"{CLOCK}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "SOAK_CLOCK": str(clock)}
    with _watch(folder, "--enforce", RKSP_REPLAY__RETRY_DELAY="2", **variables) as watch:
        write_profile(run, 1, alarm=True)
        until(lambda: watch.metric(GENERATION) == 1)
        (run / "step-5.safetensors").write_bytes(b"\xff" * 64)
        until(lambda: watch.logged("retry"), why="the back-off of a broken checkpoint")
        _replace(clock, "-3600")
        until(lambda: not open_rows(run), 30, "an end of the back-off, though the clock went back")
        write_profile(run, 10)
        until(lambda: watch.metric(GENERATION) == 2, why="an order after the clock went back")
        trainer = ControlListener(run / "control", "run")
        report.promise("a trainer with the true clock obeys it", (order := trainer.poll(11)) is not None)
        assert order is not None
        trainer.acknowledge(order, 11)
        until(lambda: watch.metric("rksp_control_applied_generation") == 2)
        _replace(clock, "3600")
        write_profile(run, 20)
        until(lambda: watch.metric(LAST_STEP) == 20, why="judging after the clock went forward")
        overdue = watch.metric(OVERDUE)
        report.promise("a clock that jumps raises no alarm about an order that was answered", overdue == 0, overdue)
        statuses = {step: status for _, step, _, status, _, _ in rows(run)}
        wanted = {1: "done", 5: "failed", 10: "done", 20: "done"}
        report.promise("a clock that jumps changes no outcome", statuses == wanted, statuses)
        watch.end()


def a_ledger_that_is_deleted(report: Report, folder: Path) -> None:
    run = folder / "run"
    with _watch(folder, "--enforce") as watch:
        write_profile(run, 1, alarm=True)
        until(lambda: watch.metric(GENERATION) == 1)
        shutil.rmtree(run / ".rksp")
        write_profile(run, 2)
        until(lambda: watch.metric(LAST_STEP) == 2 or watch.process.poll() is not None, 60, "judging without a ledger")
        report.figure("a ledger that was deleted is met with", _last_problem(watch) or "no sentence")
        if watch.process.poll() is None:
            watch.end()
    before = ControlListener(run / "control", "run").poll(1)
    assert before is not None
    with _watch(folder, "--enforce") as watch:
        write_profile(run, 3, alarm=True)
        until(lambda: watch.metric(LAST_STEP) == 3)
        until(lambda: watch.metric(GENERATION) > before.generation, why="a generation above those of the lost ledger")
        steps = sorted(step for _, step, _, status, _, _ in rows(run) if status == "done")
        report.promise("after the loss of a ledger everything is judged again", steps == [1, 2, 3], steps)
        report.promise("generations go on where they were", watch.metric(GENERATION) > before.generation)
        watch.end()


def a_run_that_is_made_again(report: Report, folder: Path) -> None:
    run, templates = folder / "run", Templates(folder / "templates", 2)
    with _watch(folder, "--enforce") as watch:
        templates.write(run, 10)
        write_profile(run, 10)
        until(lambda: not open_rows(run) and len(rows(run)) == 2)
        shutil.rmtree(run)
        until(lambda: len(watch.logged()) > 0)
        run.mkdir()
        templates.write(run, 5)
        write_profile(run, 5)

        def judged_again() -> bool:
            return watch.process.poll() is not None or [row[1] for row in rows(run) if row[3] == "done"] == [5, 5]

        until(judged_again, 60, "judging in a folder that was made again")
        alive = watch.process.poll() is None
        report.figure("a run folder that was made again is met with", _last_problem(watch) or "no sentence")
        report.promise("a run folder that is made again is watched again", alive, _last_problem(watch))
        if alive:
            baseline = documents(run).get("drift/profile", {}).get("baseline_step")
            report.promise("it has a baseline of its own", baseline == 5, baseline)
            watch.end()


# -- what is common


def _watch(folder: Path, *flags: str, prefix: tuple[str, ...] = (), **variables: str) -> Watch:
    settings = folder / "settings.yaml"
    replay = {"attempts": 2, "noise_groups": 0}
    settings.write_text(yaml.safe_dump({"model": MODEL, "arguments": ARGUMENTS, "policy": POLICY, "replay": replay}))
    return Watch(folder / "watch", folder / "run", "--config", settings, *flags, prefix=prefix, **variables)


def _refused(folder: Path, *flags: str, prefix: tuple[str, ...] | None = ()) -> tuple[int, str]:
    """Return the exit code of a watcher that cannot start, and what it said."""
    with _watch(folder, *flags, prefix=prefix or ()) as watch:
        return watch.process.wait(60), watch.log_file.read_text()


def _held(report: Report) -> tuple[str, ...] | None:
    if os.geteuid() != 0:
        return ()
    if shutil.which(HELD[0]):
        return HELD
    report.skipped("folders that may not be written", "root may write everything, and there is no setpriv")
    return None


@contextlib.contextmanager
def _small_disk(report: Report) -> Iterator[Path | None]:
    """Mount a file system of eight MiB."""
    place = Path(tempfile.mkdtemp(prefix="rksp-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        report.skipped("a full disk", "no file system can be mounted here")
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def _fill(file: Path) -> None:
    """Take all the room there is."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def _state(disk: Path) -> tuple[str, dict[str, int]]:
    import sqlite3

    (path,) = disk.glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        sound = database.execute("PRAGMA integrity_check").fetchone()[0]
        return sound, dict(database.execute("SELECT status, COUNT(*) FROM events GROUP BY status"))


def _all_done(disk: Path) -> bool:
    return _state(disk) == ("ok", {"done": 199})


def _last_problem(watch: Watch) -> str:
    """Return the last problem in the log, or the last line when it is no JSON."""
    problems = [line["problem"] for line in watch.logged() if line.get("level") == "error" and "problem" in line]
    lines = watch.log_file.read_text().splitlines()
    return lines[-1] if lines and not lines[-1].startswith("{") else problems[-1] if problems else ""


def _replace(file: Path, text: str) -> None:
    staging = file.with_suffix(".new")
    staging.write_text(text)
    staging.replace(file)
