"""One run in a thread of its own: waits for its folder, watches it, and starts again after trouble.

What happens to one run happens to that run: it is suspended, said so, and tried again with a back-off, while the
others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError, RkspError
from rksp_core.reference import Reference
from rksp_monitor.config import RunEntry, RunSettings
from rksp_monitor.discovery import Scanner
from rksp_monitor.filesystem import describe
from rksp_monitor.ledger import open_ledger
from rksp_monitor.orders import sole_orderer
from rksp_monitor.reference import read_references
from rksp_monitor.remote import driver_errors
from rksp_monitor.replay import ReplayPool
from rksp_monitor.run import CONFIG, Run, describe_run, identity_of
from rksp_monitor.subject import SubjectSettings
from rksp_monitor.watcher import Ending, ModelAppeared, RunWatcher, Surroundings, Watched

SHORTEST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds before a suspended run is tried again


@dataclasses.dataclass(frozen=True)
class Task:
    """What is wanted of a run: to be judged once, until a step, or as long as nobody stops it."""

    once: bool = False
    until_step: int | None = None
    new_baseline: bool = False
    fail_fast: bool = False


class RunThread:
    """Watches one run until its end is asked for, or its task is done.

    Parameters
    ----------
    folder, settings
        The run folder, which may appear later, and what was set for it.
    state_dir
        As in the settings of the process.
    pool
        Replays checkpoints.
    names
        Runs of this process by name; each may be there once, since it labels their metrics.
    """

    def __init__(
        self,
        folder: Path,
        settings: RunEntry,
        task: Task,
        *,
        state_dir: Path | None,
        pool: ReplayPool,
        around: Surroundings,
        names: dict[str, RunThread],
        done: Callable[[], None],
    ) -> None:
        self.folder, self.settings, self._task = folder, settings, task
        self._state_dir, self._pool, self._around, self._names, self._done = state_dir, pool, around, names, done
        self._ending = Ending(tick=self._tick)
        self._watcher: RunWatcher | None = None
        self._log = around.log.bind(folder=str(folder))
        self._so_far = 0, 0
        self._problem = ""
        self.new_baseline = task.new_baseline  # whether it is yet to be forgotten
        self.name: str | None = None
        self.watched = False
        self.heartbeat = time.monotonic()
        self.result: Watched | None = None
        self.judged_ever = False
        self.error: RkspError | None = None
        self._thread = threading.Thread(target=self._live, name=f"run {folder.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Ask for the end; `join` waits for it."""
        self._ending.end()

    def wake(self) -> None:
        """Look at the folder now."""
        self._ending.wake.set()

    def join(self, timeout: float) -> bool:
        """Return whether the thread has ended within so many seconds: one that hangs in a system call does not."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread still works."""
        return self._thread.is_alive()

    @property
    def status(self) -> str:
        """One line about now."""
        return self._watcher.status if self._watcher is not None else "waiting for the run folder"

    @property
    def level(self) -> int:
        """The highest risk level that held since this process watches the run."""
        return self._so_far[1] if self._watcher is None else max(self._so_far[1], self._watcher.worst)

    @property
    def judged(self) -> int:
        """The number of events that were judged since this process watches the run."""
        return self._so_far[0] + (0 if self._watcher is None else self._watcher.judged)

    def _tick(self) -> None:
        self.heartbeat = time.monotonic()

    def _live(self) -> None:
        try:
            self._persist()
        finally:
            self._done()

    def _persist(self) -> None:
        """Watch, and after trouble watch again."""
        pause = SHORTEST_PAUSE
        while not self._ending.stop.is_set():
            begun = time.monotonic()
            try:
                self.result, self.error = self._watch(), None
                return
            except ModelAppeared:
                continue
            except RkspError as error:
                self.error, problem = error, str(error)
            except (OSError, sqlite3.Error, MemoryError) as error:
                problem = f"{type(error).__name__}: {error}"
                self.error = ConfigError(f"{self.folder} cannot be watched ({problem})")
            except Exception as error:  # noqa: BLE001 - a mistake of ours in one run must not end the others
                self._log.exception("unexpected")
                problem = f"{type(error).__name__}: {error}"
                self.error = ConfigError(f"{self.folder} cannot be watched ({problem}); please report the traceback")
            if self._task.once or (self._task.fail_fast and self._watcher is None):
                return
            if time.monotonic() - begun > LONGEST_PAUSE:
                pause, self._problem = SHORTEST_PAUSE, ""
            self._suspend(problem, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _suspend(self, problem: str, pause: float) -> None:
        self._log.error("suspended", run=self.name, problem=problem, seconds=pause)
        if self.name is None:  # it got no name, or not its own: an alert must see it all the same
            self.name = str(self.folder)
            self._names[self.name] = self
            self._around.board.add_run(self.name, {})
        self._around.board.set(self.name, "rksp_run_suspended", 1)
        if problem != self._problem:  # the same again, every few minutes for days, is no news
            self._around.announce("run_suspended", self.name, {"problem": problem, "what": "the run"})
        self._problem = problem
        end = time.monotonic() + pause
        while not self._ending.stop.wait(min(1.0, max(0.0, end - time.monotonic()))) and time.monotonic() < end:
            self._tick()

    def _watch(self) -> Watched:
        with driver_errors(self.folder):
            if self._task.once and not self.folder.is_dir():
                raise ConfigError(f"there is no run folder {self.folder}")
            if not self._task.once and not self._await_folder():
                return Watched(0, 0, "stopped")
        with self._around.desk:
            run = describe_run(self.folder, self.settings, self._state_dir)
            self._begin_series(run)
        with open_ledger(run.ledger, run.name, clock=self._around.clock) as ledger, self._control(run) as control:
            if self.new_baseline:
                # The subject too: what was skipped for being unlike the old baseline is judged against the new one.
                ledger.forget("drift/checkpoint", "drift/profile", "policy", "subject")
                self.new_baseline = False
            subject, timeout = subject_of(run, self.settings), self.settings.replay.timeout
            replayer = None if subject is None else self._pool.replayer(run.name, subject, timeout=timeout)
            so_far = self.judged, self.level  # before it was suspended
            self._watcher = RunWatcher(
                run,
                self.settings,
                ledger=ledger,
                replayer=replayer,
                control=control,
                around=self._around,
                ending=self._ending,
                subject=identity_of(subject),
                model_now=lambda: describe_run(self.folder, self.settings, self._state_dir).model,
                references=self._references(),
            )
            self._so_far = so_far
            self._tell(run)
            watched = self._watcher.watch(once=self._task.once, until_step=self._task.until_step)
            self.judged_ever = ledger.counts()["done"] > 0
            return watched

    def _begin_series(self, run: Run) -> None:
        """Begin the metrics of the run, or go on with them after trouble."""
        if self.name not in (None, run.name):
            self.forget()
        info = {
            "model": run.model or "",
            "probe": str(run.probe or "random tokens"),
            "mode": _mode(self.settings),
        }
        if self.name is None:
            if self._names.setdefault(run.name, self) is not self:  # at once: another thread may be asking too
                raise ConfigError(f"two runs are called {run.name!r}; give {self.folder} another run_id")
            self.name = run.name
            self._around.board.add_run(run.name, info)
            self._around.board.set(run.name, "rksp_run_suspended", 0)
        self._around.board.describe_run(run.name, info)

    def _tell(self, run: Run) -> None:
        """Say once that the run is watched, when it is: another watcher may have been refused before."""
        if not self.watched:
            about = {"folder": str(run.folder), "ledger": str(run.ledger), "model": run.model or ""}
            about |= {"probe": str(run.probe or "random tokens"), "mode": _mode(self.settings)}
            self._around.log.info("watching", run=run.name, file_system=describe(self.folder), **about)
            self._around.announce("run_added", run.name, about)
            self.watched = True

    def forget(self) -> None:
        """End the metrics of the run."""
        if self.name is not None:
            self._around.board.remove_run(self.name)
            self._names.pop(self.name, None)
            self.name = None

    def _await_folder(self) -> bool:
        """Wait until the trainer filled its folder: the run's name and model are read from it.

        A folder without its configuration is one that the trainer has just made.
        """
        scanner, said = Scanner(self.folder), False
        while not self._ending.stop.is_set():
            self._tick()
            self._ending.wake.clear()
            told = self.settings.run_id is not None and self.settings.model is not None
            with self._around.desk:
                known = told or (self.folder / CONFIG).is_file() or scanner.finds_any()
                if known and self.folder.is_dir():
                    return True
            if not said:
                what = "there is nothing in it yet" if self.folder.is_dir() else "it is not there yet"
                self._around.log.info("waiting for the run folder", folder=str(self.folder), problem=what)
                said = True
            self._ending.wake.wait(min(1.0, self._around.poll_interval))
        return False

    def _references(self) -> Mapping[str, Reference]:
        healthy = self.settings.reference
        return {} if healthy is None else read_references(healthy, self._state_dir)

    @contextlib.contextmanager
    def _control(self, run: Run) -> Iterator[ControlWriter | None]:
        enforce, control = self.settings.enforce, None
        if run.control is not None:
            control = ControlWriter(run.control, mode=int(self.settings.control.mode, 8), clock=self._around.clock)
        elif enforce:
            raise ConfigError(f"orders for {run.folder} have nowhere to go; name a local control.folder")
        with sole_orderer(control) if enforce and control is not None else contextlib.nullcontext():
            yield control


def subject_of(run: Run, settings: RunSettings) -> SubjectSettings | None:
    """Return what the run's checkpoints are replayed with; None when nothing says how to build its model."""
    if run.model is None:
        return None
    return SubjectSettings(
        model=run.model,
        arguments=settings.arguments,
        probe=None if run.probe is None else str(run.probe),
        seed=settings.seed,
        device=settings.device,
        samples=settings.replay.samples,
        sequences=settings.replay.sequences,
        length=settings.replay.length,
        blocks=settings.blocks,
        micro_batch=settings.replay.micro_batch,
        cpu_fallback=settings.replay.cpu_fallback,
        trust_pickle=settings.trust_pickle,
        noise_groups=settings.replay.noise_groups,
    )


def _mode(settings: RunEntry) -> str:
    return "enforce" if settings.enforce else "observe"
