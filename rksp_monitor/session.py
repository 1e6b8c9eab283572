"""One process of ``rksp watch``: puts ledger, worker, endpoint and daemon together, and listens to signals."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError, RkspError
from rksp_core.policy import LEVELS
from rksp_monitor.config import WatchSettings
from rksp_monitor.daemon import Daemon
from rksp_monitor.discovery import Scanner
from rksp_monitor.endpoint import serve
from rksp_monitor.ledger import open_ledger
from rksp_monitor.log import make_logger
from rksp_monitor.metrics import Board, registry_of
from rksp_monitor.output_file import require_writable, write_output
from rksp_monitor.replay import ReplayWorker
from rksp_monitor.run import CONFIG, Run, describe_run
from rksp_monitor.subject import SubjectSettings
from rksp_monitor.supervisor import Notifier, signals

Read = Callable[[], WatchSettings]

PASS, RISK, INCONCLUSIVE = 0, 1, 3
SILENCE_LIMIT = 60.0  # seconds without a sign of life from the work loop before /healthz says so

# Settings that the endpoint, the ledger, the worker or the scan were built from.
FIXED = (
    "model",
    "arguments",
    "probe",
    "seed",
    "device",
    "run_id",
    "poll_interval",
    "hints",
    "listen",
    "per_layer_metrics",
    "state_dir",
    "control",
)


class Session:
    """One process of the watcher.

    Parameters
    ----------
    folder
        The run folder; it may appear later.
    settings
        As `rksp_monitor.config.read_settings` returned them.
    serve
        Whether to open the metrics endpoint.
    port_file
        Where to write the endpoint's address.
    read
        Reads the settings again, on SIGHUP.
    """

    def __init__(
        self, folder: Path, settings: WatchSettings, *, serve: bool, port_file: Path | None, read: Read
    ) -> None:
        self.folder, self.settings = folder, settings
        self._serve, self._port_file, self._read = serve, port_file, read
        self._stop, self._wake, self._hangup = threading.Event(), threading.Event(), threading.Event()
        self._daemon: Daemon | None = None
        self._ended_by = ""
        self._heartbeat = time.monotonic()
        self._log, self._notifier = make_logger(), Notifier()
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
            When the run cannot be watched: no folder, another watcher, a model that cannot be built.
        """
        if once and not self.folder.is_dir():
            raise ConfigError(f"there is no run folder {self.folder}")
        if self._port_file is not None:
            require_writable(self._port_file)
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
            if self._serve:
                self._open_endpoint(stack)
            self._notifier.send("READY=1")
            stack.callback(self._notifier.send, "STOPPING=1")
            if not once and not self._await_run():
                return INCONCLUSIVE if self._ended_by == "timeout" else PASS
            return self._watch(stack, once=once, until_step=until_step, new_baseline=new_baseline)

    def _watch(self, stack: contextlib.ExitStack, *, once: bool, until_step: int | None, new_baseline: bool) -> int:
        settings, run = self.settings, describe_run(self.folder, self.settings)
        ledger = stack.enter_context(open_ledger(run.ledger, run.name))
        if new_baseline:
            ledger.forget("drift/checkpoint", "drift/profile", "policy")
        self._board.add_run(run.name, {})
        info = self._describe(run)
        self._log.info("watching", run=run.name, folder=str(run.folder), ledger=str(run.ledger), **info)
        self._daemon = Daemon(
            run.folder,
            run.name,
            settings,
            ledger=ledger,
            board=self._board,
            log=self._log.bind(run=run.name),
            replayer=self._worker(run, stack),
            control=ControlWriter(run.control, mode=int(settings.control.mode, 8)),
            stop=self._stop,
            wake=self._wake,
            tick=self._tick,
            reload=lambda: self._reload(run),
            subject="none" if run.model is None else self._subject(run, run.model).identity,
        )
        outcome = self._daemon.run(once=once, until_step=until_step)
        ended_by = self._ended_by or outcome.ended_by
        self._log.info("stopped", by=ended_by, judged=outcome.judged, worst_risk=LEVELS[outcome.level])
        fail_on = self.settings.fail_on
        if fail_on != "never" and outcome.level >= LEVELS.index(fail_on):
            return RISK
        nothing = ledger.counts()["done"] == 0
        unreached = ended_by == "timeout" and (nothing or until_step is not None)
        return INCONCLUSIVE if unreached or (once and nothing) else PASS

    def _subject(self, run: Run, model: str) -> SubjectSettings:
        settings, replay = self.settings, self.settings.replay
        return SubjectSettings(
            model=model,
            arguments=settings.arguments,
            probe=None if run.probe is None else str(run.probe),
            seed=settings.seed,
            device=settings.device,
            samples=replay.samples,
            sequences=replay.sequences,
            length=replay.length,
        )

    def _worker(self, run: Run, stack: contextlib.ExitStack) -> ReplayWorker | None:
        """Return what replays checkpoints; it starts its process when the first one comes."""
        if run.model is None:
            return None
        subject, replay = self._subject(run, run.model), self.settings.replay
        worker = ReplayWorker(
            subject,
            timeout=replay.timeout,
            niceness=replay.niceness,
            threads=replay.threads,
            stop=self._stop,
            started=lambda described: self._log.info("replay worker is ready", **described),
        )
        stack.callback(worker.close)
        return worker

    def _open_endpoint(self, stack: contextlib.ExitStack) -> None:
        silence = max(SILENCE_LIMIT, 3 * self.settings.poll_interval)

        def healthy() -> bool:
            return time.monotonic() - self._heartbeat < silence

        address = stack.enter_context(
            serve(self.settings.listen, registry_of(self._board), healthy=healthy, ready=lambda: True)
        )
        self._log.info("serving", address=address)
        if self._port_file is not None:
            write_output(self._port_file, address + "\n")

    def _await_run(self) -> bool:
        """Wait until the trainer filled its folder: the run's name and model are read from it.

        A folder without its configuration is one that the trainer has just made.
        """
        if not self.folder.is_dir():
            self._log.info("waiting for the run folder", folder=str(self.folder))
        scanner = Scanner(self.folder)
        while not self._stop.is_set():
            self._tick()
            self._wake.clear()
            told = self.settings.run_id is not None and self.settings.model is not None
            known = told or (self.folder / CONFIG).is_file() or scanner.scan()
            if known and self.folder.is_dir():
                return True
            self._wake.wait(min(1.0, self.settings.poll_interval))
        return False

    def _ask_for_reload(self) -> None:
        self._hangup.set()
        self._wake.set()

    def _describe(self, run: Run) -> dict[str, str]:
        """Export what the info metric says of the run, and return it."""
        info = {
            "model": run.model or "",
            "probe": str(run.probe or "random tokens"),
            "mode": "enforce" if self.settings.enforce else "observe",
        }
        self._board.describe_run(run.name, info)
        return info

    def _reload(self, run: Run) -> WatchSettings | None:
        """Return the settings read again after a SIGHUP, or None; a bad file changes nothing."""
        if not self._hangup.is_set():
            return None
        self._hangup.clear()
        self._notifier.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            fresh = self._read()
        except RkspError as error:
            self._log.error("settings not reloaded", problem=str(error))
            return None
        finally:
            self._notifier.send("READY=1")
        fixed = [name for name in FIXED if getattr(fresh, name) != getattr(self.settings, name)]
        if fixed:
            self._log.warning("these settings take effect at the next start", settings=fixed)
            fresh = fresh.model_copy(update={name: getattr(self.settings, name) for name in fixed})
        self.settings = fresh
        self._log.info("settings reloaded", mode=self._describe(run)["mode"])
        return fresh

    def _tick(self) -> None:
        self._heartbeat = time.monotonic()
        self._notifier.send("WATCHDOG=1")
        self._notifier.status(self._daemon.status if self._daemon else "waiting for the run folder")

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
