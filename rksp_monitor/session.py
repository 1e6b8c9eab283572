"""One process of ``rksp watch``: puts workers, endpoint, announcer and the threads of the runs together."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rksp_core.errors import ConfigError, RkspError
from rksp_core.policy import LEVELS
from rksp_monitor.announce import Announcer
from rksp_monitor.config import RunEntry, RunSettings, WatchSettings
from rksp_monitor.discovery import FileEvents
from rksp_monitor.endpoint import serve
from rksp_monitor.log import make_logger
from rksp_monitor.metrics import Board, registry_of
from rksp_monitor.output_file import require_writable, write_output
from rksp_monitor.replay import ReplayPool
from rksp_monitor.roster import Roster, is_pattern
from rksp_monitor.run_thread import RunThread, Task
from rksp_monitor.supervisor import Notifier, signals
from rksp_monitor.watcher import Surroundings

Read = Callable[[], WatchSettings]

PASS, RISK, INCONCLUSIVE = 0, 1, 3
SILENCE_LIMIT = 60.0  # seconds without a sign of life from every run before /healthz says so
RELOAD_SECONDS = 5.0  # that a look for the folders of new settings may take; the runs are not supervised meanwhile
BEAT_SECONDS = 1.0  # between two looks at the runs
SWITCH_SECONDS = 0.001  # that a thread may compute while another waits: a scrape needs its turn a dozen times
PARTING_SECONDS = 10.0  # that a run gets to end; one that hangs in a system call never does

# Settings that the endpoint, the workers, the scans or the announcer were built from.
FIXED = [name for name in WatchSettings.model_fields if name not in {*RunSettings.model_fields, "runs", "fail_on"}]


class Session:
    """One process of the watcher.

    Parameters
    ----------
    settings
        As `rksp_monitor.config.read_settings` returned them.
    serve
        Whether to open the metrics endpoint.
    port_file
        Where to write the endpoint's address.
    read
        Reads the settings again, on SIGHUP.
    """

    def __init__(self, settings: WatchSettings, *, serve: bool, port_file: Path | None, read: Read) -> None:
        if not settings.runs:
            raise ConfigError("there is no run to watch; give a RUN_FOLDER, or `runs:` in the --config file")
        self.settings = settings
        self._serve, self._port_file, self._read = serve, port_file, read
        self._stop, self._wake, self._hangup = threading.Event(), threading.Event(), threading.Event()
        self._runs: dict[str, RunThread] = {}
        self._leaving: list[RunThread] = []
        self._names: dict[str, RunThread] = {}
        self._rebased: set[str] = set()
        self._worst = 0
        self._ended_by, self._ready, self._parted = "", False, False
        self._hanging: set[str] = set()
        self._heartbeat = time.monotonic()
        self._log, self._notifier = make_logger(settings.log_level), Notifier()
        self._board = Board(_build_info(), per_layer=settings.per_layer_metrics)

    def run(
        self,
        *,
        once: bool = False,
        until_step: int | None = None,
        timeout: float | None = None,
        new_baseline: bool = False,
    ) -> int:
        """Watch until a signal, the time limit, ``until_step``, or ``once`` all is done; return the exit code.

        Raises
        ------
        RkspError
            When the only run cannot be watched: no folder, another watcher, a model that cannot be built.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        if self._port_file is not None:
            require_writable(self._port_file)
        entries = self.settings.runs
        fail_fast = len(entries) == 1 and not is_pattern(entries[0].folder)
        task = Task(once=once, until_step=until_step, new_baseline=new_baseline, fail_fast=fail_fast)
        with contextlib.ExitStack() as stack:
            handlers = {
                signal.SIGTERM: self._end("SIGTERM"),
                signal.SIGINT: self._end("SIGINT"),
                signal.SIGHUP: self._ask_for_reload,
            }
            stack.enter_context(signals(handlers))
            if timeout is not None:
                timer = threading.Timer(timeout, self._end("timeout"))
                timer.daemon = True
                timer.start()
                stack.callback(timer.cancel)
            announcer = Announcer(self.settings.webhooks, self.settings.hooks, self._log, count=self._board.count)
            stack.callback(announcer.close)
            if self._serve:
                self._open_endpoint(stack)
            self._roster = Roster(self.settings, self._wake.set, stop=self._stop)
            stack.callback(self._close_roster)
            self._pool = stack.enter_context(contextlib.closing(self._make_pool()))
            self._around = Surroundings(
                log=self._log,
                board=self._board,
                announce=announcer.announce,
                file_events=stack.enter_context(FileEvents(self._say_no_events)) if self.settings.hints else None,
                poll_interval=self.settings.poll_interval,
            )
            stack.callback(self._part)  # also when the work loop raises
            gc.freeze()  # what was imported stays: to look through it again and again would hold up a scrape by 0.1 s
            self._ready = True
            self._notifier.ready()
            stack.callback(self._notifier.stopping)
            self._supervise(task)
            self._part()
            for run in self._runs.values():
                if run.name is not None and run.watched:
                    about = {
                        "by": self._ended_by or "its task is done",
                        "judged": run.judged,
                        "risk": LEVELS[run.level],
                    }
                    self._around.announce("stopped", run.name, about)
            return self._exit_code(task)

    # -- the work loop

    def _supervise(self, task: Task) -> None:
        """Keep a thread for each run until all is done or the end is asked for."""
        while not self._stop.is_set():
            self._wake.clear()
            self._take_new_settings()
            self._adopt(task)
            if (task.once or task.until_step is not None) and not any(run.alive for run in self._runs.values()):
                return
            failed = [run.error for run in self._runs.values() if not run.alive and run.error is not None]
            if task.fail_fast and failed:
                return
            self._beat()
            self._wake.wait(min(BEAT_SECONDS, self._notifier.watchdog_interval or BEAT_SECONDS))

    def _adopt(self, task: Task) -> None:
        """Start the runs that are new, end those that are gone or were given other settings."""
        wanted = self._roster.runs
        for key, run in list(self._runs.items()):
            if key not in wanted or wanted[key][1] != run.settings:
                run.end()
                self._leaving.append(self._runs.pop(key))
                self._worst = max(self._worst, run.level)
                self._rebased |= set() if run.new_baseline else {key}
        for run in [run for run in self._leaving if run.join(0.0)]:
            self._leaving.remove(run)
            if run.name is not None and run.watched and str(run.folder) not in wanted:
                self._log.info("no longer watched", run=run.name, folder=str(run.folder))
                self._around.announce("run_removed", run.name, {"folder": str(run.folder)})
            run.forget()
        leaving = {str(run.folder) for run in self._leaving}
        for key, (folder, entry) in wanted.items():
            if key not in self._runs and key not in leaving:
                self._start(key, folder, entry, task)

    def _start(self, key: str, folder: Path, entry: RunEntry, task: Task) -> None:
        if key in self._rebased:  # a reload must not forget the baseline again
            task = dataclasses.replace(task, new_baseline=False)
        self._runs[key] = RunThread(
            folder,
            entry,
            task,
            state_dir=self.settings.state_dir,
            pool=self._pool,
            around=self._around,
            names=self._names,
            done=self._wake.set,
        )
        self._runs[key].start()

    def _beat(self) -> None:
        """Give a sign of life, as long as a run gives one: when all of them hang, a restart may help."""
        runs = list(self._runs.values())
        self._heartbeat = max((run.heartbeat for run in runs if run.alive), default=time.monotonic())
        if self._lives():
            self._notifier.watchdog()
        self._look_for_hanging(runs)
        worst = max(runs, key=lambda run: run.level, default=None)
        if len(runs) == 1:
            self._notifier.status(runs[0].status)
        elif worst is not None:
            self._notifier.status(f"{len(runs)} runs; {worst.name}: {worst.status}")

    def _look_for_hanging(self, runs: list[RunThread]) -> None:
        """Say which runs give no sign of life, as one does whose file system hangs, and which do again."""
        for run in runs:
            folder, hangs = str(run.folder), run.alive and self._silent(run.heartbeat)
            if hangs == (folder in self._hanging):
                continue
            self._hanging ^= {folder}
            if hangs:
                self._log.error("hangs", folder=folder, problem="no sign of life; does its file system answer?")
            else:
                self._log.warning("goes on", folder=folder)
            with contextlib.suppress(KeyError):  # its series are not there yet, or end, in its own thread
                self._board.set(run.name or "", "rksp_run_suspended", float(hangs))

    def _silent(self, heartbeat: float) -> bool:
        return time.monotonic() - heartbeat > max(SILENCE_LIMIT, 3 * self.settings.poll_interval)

    def _lives(self) -> bool:
        return not self._silent(self._heartbeat)

    def _part(self) -> None:
        """End every run, all at once; those that do not answer are left behind, once."""
        parting, self._leaving = [*self._runs.values(), *self._leaving], []
        if self._parted:
            return
        self._parted = True
        for run in parting:
            run.end()
        end = time.monotonic() + PARTING_SECONDS
        for run in parting:
            if not run.join(max(0.0, end - time.monotonic())):
                self._log.warning(
                    "left behind", folder=str(run.folder), problem="it does not answer; is it on a mount?"
                )

    def _exit_code(self, task: Task) -> int:
        runs = list(self._runs.values())
        ended_by = self._ended_by or next((run.result.ended_by for run in runs if run.result is not None), "")
        level = max([run.level for run in runs] + [self._worst])
        judged = sum(run.judged for run in runs)
        self._log.info("stopped", by=ended_by, judged=judged, worst_risk=LEVELS[level])
        errors = [run.error for run in runs if run.error is not None and run.result is None]
        if errors and (task.once or task.fail_fast) and ended_by not in ("SIGTERM", "SIGINT"):
            raise errors[0]
        fail_on = self.settings.fail_on
        if fail_on != "never" and level >= LEVELS.index(fail_on):
            return RISK
        nothing = not runs or any(not run.judged_ever for run in runs)
        unreached = ended_by == "timeout" and (nothing or task.until_step is not None)
        return INCONCLUSIVE if unreached or (task.once and nothing) else PASS

    # -- what the runs share

    def _make_pool(self) -> ReplayPool:
        def report(what: str, about: Mapping[str, Any]) -> None:
            log = self._log.warning if what == "ended" else self._log.info
            log(
                {"started": "replay worker started", "built": "model is built", "ended": "replay worker ended"}[what],
                **about,
            )

        return ReplayPool(self.settings.workers, stop=self._stop, report=report)

    def _open_endpoint(self, stack: contextlib.ExitStack) -> None:
        address = stack.enter_context(
            serve(
                self.settings.listen,
                registry_of(self._board),
                healthy=self._lives,
                ready=lambda: self._ready,
                web_config=self.settings.web_config,
                warn=lambda text: self._log.warning("endpoint", problem=text),
            )
        )
        self._log.info("serving", address=address)
        if self._port_file is not None:
            write_output(self._port_file, address + "\n")

    def _say_no_events(self, sentence: str) -> None:
        self._log.info("no file events", problem=sentence)

    def _close_roster(self) -> None:
        self._roster.close()  # the one that the last reload made

    # -- reload and end

    def _ask_for_reload(self) -> None:
        self._hangup.set()
        self._wake.set()

    def _take_new_settings(self) -> None:
        """Read the settings again after a SIGHUP; a bad file changes nothing. Runs that changed start again."""
        if not self._hangup.is_set():
            return
        self._hangup.clear()
        self._notifier.reloading()
        try:
            fresh = self._read()
            fixed = [name for name in FIXED if getattr(fresh, name) != getattr(self.settings, name)]
            if fixed:
                self._log.warning("these settings take effect at the next start", settings=fixed)
                fresh = fresh.model_copy(update={name: getattr(self.settings, name) for name in fixed})
            if not fresh.runs:
                raise ConfigError("there is no run left to watch")
            roster = Roster(fresh, self._wake.set, patience=RELOAD_SECONDS)
        except RkspError as error:
            self._log.error("settings not reloaded", problem=str(error))
            return
        finally:
            self._notifier.ready()
        self._roster.close()
        self.settings, self._roster = fresh, roster
        self._log.info("settings reloaded", runs=len(roster.runs))

    def _end(self, why: str) -> Callable[[], None]:
        def end() -> None:
            self._ended_by = self._ended_by or why
            self._stop.set()
            self._wake.set()

        return end


def _build_info() -> dict[str, str]:
    try:
        own = version("rksp")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {"version": own, "python": platform.python_version(), "platform": platform.machine()}
