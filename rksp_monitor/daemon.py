"""The watcher of one run: discovery -> ledger -> replay -> drift -> policy -> control file and metrics.

One thread does all the work; the metrics endpoint only reads. Whatever a checkpoint does to us is written to the
ledger as its outcome, and the next one is processed.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from rksp_core.control import ControlWriter
from rksp_core.drift import DriftState, measure, rewind
from rksp_core.errors import CheckpointError, ControlError, ExpiredCheckpoint, ProfileError, RkspError
from rksp_core.orders import Acknowledgement
from rksp_core.policy import LEVELS, Decision, Evidence, PolicyState, decide
from rksp_core.profile import ModelProfile
from rksp_monitor.checkpoints import Kind, profile_file
from rksp_monitor.config import WatchSettings
from rksp_monitor.discovery import Scanner, Sighting, watch
from rksp_monitor.ledger import Event, Ledger
from rksp_monitor.metrics import Board
from rksp_monitor.orders import Orders

RETRY_LIMIT = 300.0  # seconds: the back-off stops doubling here


class Abandoned(Exception):  # noqa: N818 - an outcome of a replay, no error
    """The replay was given up because the daemon stops."""


class Replayer(Protocol):
    """Turns a checkpoint into a profile. `rksp_monitor.replay.ReplayWorker` is the real one."""

    restarts: int

    def replay(self, path: Path, *, tick: Callable[[], None]) -> ModelProfile:
        """Return the profile; raise CheckpointError, or `Abandoned`. Calls ``tick`` while it waits."""


@dataclass(frozen=True)
class Outcome:
    """What one call of `Daemon.run` did: events judged, and the highest level that held."""

    judged: int
    level: int
    ended_by: str


class Daemon:
    """Watches one run.

    Parameters
    ----------
    folder, run
        The run folder and the name of the run in orders and metrics.
    replayer
        None when there is no model to load weights into: checkpoints are skipped, profiles are judged.
    control
        Where orders go; they are only written when ``settings.enforce`` is set.
    stop, wake
        Set both to end `run`.
    subject
        Names what checkpoints are replayed with: those that failed are tried again when it changes.
    tick
        Called from the work loop, at each scan and every moment of a replay: the supervisor's watchdog.
    reload
        Called before each scan; returns new settings when there are some.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        settings: WatchSettings,
        *,
        ledger: Ledger,
        board: Board,
        log: FilteringBoundLogger,
        replayer: Replayer | None,
        control: ControlWriter,
        stop: threading.Event,
        wake: threading.Event,
        tick: Callable[[], None] = lambda: None,
        reload: Callable[[], WatchSettings | None] = lambda: None,
        subject: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._folder, self._run = folder, run
        self._ledger, self._board, self._log = ledger, board, log
        self._replayer, self._orders = replayer, Orders(run, ledger, control)
        self._scanner = Scanner(folder)
        self._stop, self._wake, self._tick, self._reload, self._clock = stop, wake, tick, reload, clock
        self._subject = subject
        self._answer: Acknowledgement | None = None
        self._judged = 0
        self._state = self._policy_state()
        self._worst = self._state.level
        self._furthest = -1 if self._state.step is None else self._state.step
        self._last_scan = time.monotonic()

    def run(self, *, once: bool = False, until_step: int | None = None) -> Outcome:
        """Work until ``stop`` is set, ``once`` everything there is done, or ``until_step`` is judged."""
        recovered = self._ledger.recover()
        if recovered:
            self._log.info("recovered", events=recovered)
        reopened = self._ledger.reopen_checkpoints(self._subject)
        if reopened:
            self._log.info("reopened", events=reopened, reason="the model, the probe or their settings are others now")
        self._export_control()
        settings = self.settings
        scans = watch(
            self._scanner,
            stop=self._stop,
            wake=self._wake,
            interval=settings.poll_interval,
            hints=settings.hints,
            tick=self._tick,
        )
        for sightings in scans:
            self._tick()
            self._take_new_settings()
            self._note(sightings)
            self._work()
            self._deliver()
            self._export_control()
            if until_step is not None and self._furthest >= until_step:
                return Outcome(self._judged, self._worst, "until_step")
            waiting = any(sighting.settling for sighting in sightings) or self._ledger.counts()["ready"]
            if once and not waiting:
                return Outcome(self._judged, self._worst, "once")
        return Outcome(self._judged, self._worst, "stopped")

    @property
    def status(self) -> str:
        """One line about now, for the service manager."""
        step = "nothing judged yet" if self._state.step is None else f"step {self._state.step}"
        return f"{step}, risk {LEVELS[self._state.level]}, {self._judged} judged"

    def _take_new_settings(self) -> None:
        """Go on with new settings: the policy's state is kept, and what was ordered is looked up again."""
        settings = self._reload()
        if settings is not None:
            self.settings = settings
            self._state = self._policy_state()

    # -- discovery

    def _note(self, sightings: list[Sighting]) -> None:
        """Bring the ledger up to date with a scan."""
        for sighting in sightings:
            if not self._ledger.record(sighting) or sighting.settling:
                continue
            self._board.set(self._run, "rksp_checkpoint_last_seen_timestamp_seconds", self._clock())
            about = {"kind": sighting.kind, "step": sighting.step, "path": str(sighting.path)}
            if sighting.complete:
                self._log.info("found", **about)
            else:
                self._log.info("not finished", **about, problem=sighting.problem)
        present = {sighting.path for sighting in sightings}
        for event in self._ledger.events("seen", "ready"):
            if event.path not in present and not event.path.exists():
                self._close(event, "expired", "it vanished before it was read")
            elif event.status == "seen" and self._clock() - event.first_seen > self.settings.replay.incomplete_after:
                self._close(event, "failed", f"it was never finished: {event.error}")
        self._export_backlog()
        self._last_scan = time.monotonic()

    # -- work

    def _work(self) -> None:
        """Judge every profile that is ready, then one checkpoint: its replay takes long enough for others to appear."""
        self._judge_profiles()
        event = self._next("checkpoint")
        if event is not None:
            self._process(event)
            self._export_backlog()
        if self._next() is not None:
            self._wake.set()

    def _judge_profiles(self) -> None:
        """Judge the profiles that are ready, lowest step first: early warning does not wait for a replay."""
        while (event := self._next("profile")) is not None:
            self._tick()
            self._process(event)
            self._export_backlog()

    def _next(self, kind: Kind | None = None) -> Event | None:
        return None if self._stop.is_set() else self._ledger.next_ready(kind)

    def _while_replaying(self) -> None:
        """Go on scanning, and judging the trainer's own profiles, at the usual interval."""
        self._tick()
        if time.monotonic() - self._last_scan > self.settings.poll_interval:
            self._note(self._scanner.scan())
            self._judge_profiles()

    def _export_backlog(self) -> None:
        self._board.set(self._run, "rksp_checkpoint_backlog", self._ledger.counts()["ready"])

    def _process(self, event: Event) -> None:
        """Process one event; whatever it is, it leaves an outcome in the ledger."""
        if event.kind == "checkpoint" and self._replayer is None:
            self._close(event, "skipped", "there is no model to load it into; give --model")
            return
        before, event = event, dataclasses.replace(event, attempts=event.attempts + 1)
        self._ledger.claim(before)
        try:
            self._judge(event, self._profile(event))
        except Abandoned:
            self._ledger.release(before)
        except ExpiredCheckpoint as error:
            self._close(event, "expired", str(error))
        except CheckpointError as error:
            self._fail(event, str(error))
        except ProfileError as error:
            self._close(event, "skipped", str(error))
        except RkspError:  # no checkpoint can be judged at all: the model cannot be built, say
            self._ledger.release(before)
            raise
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a document made us do, the next one may be good
            self._log.exception("unexpected", step=event.step, path=str(event.path))
            self._fail(event, f"{event.path.name} cannot be judged ({type(error).__name__}: {error})")

    def _profile(self, event: Event) -> ModelProfile:
        """Return the event's profile: the trainer's own, or that of a replay."""
        if event.kind == "profile":
            return ModelProfile.from_dict(profile_file.read(event.path))
        assert self._replayer is not None  # noqa: S101 - `_process` skips checkpoints otherwise
        restarts, start = self._replayer.restarts, time.monotonic()
        try:
            profile = self._replayer.replay(event.path, tick=self._while_replaying)
        finally:
            self._board.count(self._run, "rksp_replay_worker_restarts_total", self._replayer.restarts - restarts)
        self._board.observe_replay(self._run, time.monotonic() - start)
        return dataclasses.replace(profile, step=event.step)

    def _judge(self, event: Event, profile: ModelProfile) -> None:
        """Measure the drift, decide, and write outcome, state and order in one transaction."""
        name = f"drift/{event.kind}"
        stored = self._ledger.load(name)
        before, policy_state = DriftState.from_dict(stored) if stored else None, self._state
        if before is not None and event.step <= before.step and self._ledger.judged_before(event):
            # A step that was judged is written again: the trainer went back to an earlier checkpoint.
            self._log.warning("rewound", kind=event.kind, step=event.step, before=before.step)
            before, policy_state = rewind(before, event.step), dataclasses.replace(policy_state, step=None)
        after, drift = measure(before, profile, event.step)
        state, decision = decide(policy_state, Evidence(drift, self._clock()), self.settings.policy)
        documents: dict[str, Any] = {"policy": state.to_dict()}
        if after is not None:
            documents[name] = after.to_dict()
        if self.settings.enforce:
            documents |= self._orders.prepare(decision, self.settings.policy.expires_in)
        self._ledger.finish(event, profile.to_dict(eigenvalues=False), documents)
        self._state = state
        self._worst = max(self._worst, state.level)
        self._judged += 1
        self._furthest = max(self._furthest, event.step)
        self._deliver()
        self._report(event, profile, decision)
        if not decision.late:
            self._board.show(self._run, profile, drift)
        self._export_control()

    def _report(self, event: Event, profile: ModelProfile, decision: Decision) -> None:
        board, now = self._board, self._clock()
        board.count(self._run, "rksp_checkpoints_processed_total")
        board.set(self._run, "rksp_checkpoint_last_processed_timestamp_seconds", now)
        if not decision.late:
            board.set(self._run, "rksp_checkpoint_last_processed_step", event.step)
        summary = profile.summary
        self._log.info(
            "judged",
            kind=event.kind,
            step=event.step,
            late=decision.late,
            near_unit_mass=summary["near_unit_mass"]["mean"],
            kreiss_constant=summary["kreiss_constant"]["max"],
            risk=LEVELS[decision.level],
            fired=list(decision.fired),
        )
        if decision.level != decision.previous_level:
            self._log.warning("risk level", before=LEVELS[decision.previous_level], now=LEVELS[decision.level])
        if decision.order is not None:
            self._log.warning(
                "order" if self.settings.enforce else "would order",
                **decision.order.to_dict(),
                reason=dataclasses.asdict(decision.reason),
            )

    def _fail(self, event: Event, problem: str) -> None:
        """Count a failed attempt: another one after a back-off, or the end."""
        replay = self.settings.replay
        if event.attempts >= replay.attempts:
            self._close(event, "failed", problem)
            return
        delay = min(replay.retry_delay * 2 ** (event.attempts - 1), RETRY_LIMIT)
        self._log.warning("retry", step=event.step, path=str(event.path), problem=problem, seconds=delay)
        self._ledger.retry(event, problem, delay)

    def _close(self, event: Event, status: Any, problem: str) -> None:
        self._ledger.close_event(event, status, problem)
        self._board.count(self._run, f"rksp_checkpoints_{status}_total")
        self._log.warning(status, kind=event.kind, step=event.step, path=str(event.path), problem=problem)

    # -- control

    def _policy_state(self) -> PolicyState:
        stored = self._ledger.load("policy")
        state = PolicyState.from_dict(stored) if stored else PolicyState()
        return self._orders.reconcile(state) if self.settings.enforce else state

    def _deliver(self) -> None:
        """Give the trainer the last order; a control folder that cannot be written is tried again at the next scan."""
        if not self.settings.enforce:
            return
        try:
            self._orders.deliver()
        except ControlError as error:
            self._log.error("order not written", problem=str(error))

    def _log_answer(self, answer: Acknowledgement) -> None:
        """Log what a trainer says to an order, once; also one of another name, whom our orders do not reach."""
        if answer == self._answer:
            return
        self._answer = answer
        log = self._log.info if answer.status == "applied" else self._log.warning
        about = {"trainer": answer.run_id, "generation": answer.generation, "step": answer.step}
        log("answer", **about, status=answer.status, message=answer.message, active=answer.active.to_dict())

    def _export_control(self) -> None:
        """Export the orders, the acknowledgement, and the level."""
        order, answer = self._orders.last, self._orders.answer()
        expires_in = self.settings.policy.expires_in
        ordered_at = self._state.ordered_at
        expired = expires_in is not None and ordered_at is not None and self._clock() > ordered_at + expires_in
        values: dict[str, float | None] = {
            "rksp_risk_level": self._state.level,
            "rksp_kss_desired_weight": 0.0 if expired else self._state.ordered.alpha,
            "rksp_control_desired_generation": order.generation if order else 0,
            "rksp_control_applied_generation": 0,
        }
        if answer is not None:
            self._log_answer(answer)
            if answer.run_id == self._run:
                values["rksp_kss_applied_weight"] = answer.active_kss.alpha
                values["rksp_control_applied_generation"] = answer.active_generation
        for name, value in values.items():
            self._board.set(self._run, name, value)
