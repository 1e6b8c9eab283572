"""The watcher of one run: discovery -> ledger -> replay -> drift -> policy -> control file and metrics.

One thread does all the work of a run; the metrics endpoint only reads. Whatever a checkpoint does to us is written to
the ledger as its outcome, and the next one is processed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from rksp_core.control import ControlWriter
from rksp_core.drift import Drift
from rksp_core.errors import (
    CheckpointError,
    ControlError,
    ExpiredCheckpoint,
    ProfileError,
    RkspError,
    UnsupportedCheckpoint,
)
from rksp_core.orders import Acknowledgement, seconds
from rksp_core.policy import LEVELS, Decision, Hold
from rksp_core.profile import ModelProfile
from rksp_core.reference import Reference
from rksp_monitor.checkpoints import Kind, profile_file
from rksp_monitor.config import Every, RunSettings
from rksp_monitor.desk import Desk
from rksp_monitor.discovery import FileEvents, Scanner, Sighting, scan_at, watch
from rksp_monitor.filesystem import is_remote
from rksp_monitor.hold import hold_file, read_hold
from rksp_monitor.judge import Judge
from rksp_monitor.ledger import Event, Ledger
from rksp_monitor.metrics import Board
from rksp_monitor.orders import Orders
from rksp_monitor.replay import Abandoned, Replayed
from rksp_monitor.run import Run

EARLIER_WAITS = 2.0  # seconds that a checkpoint gives an earlier one that was found with it, and has yet to settle
RETRY_LIMIT = 300.0  # seconds: the back-off of a checkpoint stops doubling here
WORKER_RETRY = 5.0  # seconds until a worker that could not be started is started again
SUBJECT_RETRY = 60.0  # seconds until a model that could not be built is tried again


class ModelAppeared(Exception):  # noqa: N818 - no error
    """The run folder now says which model its checkpoints are of; the watch begins again with it."""


class Replayer(Protocol):
    """Turns a checkpoint into a profile. `rksp_monitor.replay.ReplayPool.replayer` makes the real one."""

    restarts: int

    def replay(self, path: Path, *, noise: bool, tick: Callable[[], None]) -> Replayed:
        """Return the profile; raise CheckpointError, or `Abandoned`. Calls ``tick`` while it waits."""


@dataclass(frozen=True)
class Surroundings:
    """What the watchers of all runs of a process share, each with a default that does nothing."""

    log: FilteringBoundLogger
    board: Board
    announce: Callable[[str, str, Mapping[str, Any]], None] = lambda *_: None
    file_events: FileEvents | None = None
    poll_interval: float = 2.0
    clock: Callable[[], float] = time.time
    desk: Desk = field(default_factory=Desk)


@dataclass
class Ending:
    """How a watch ends: set both events to stop it. ``tick`` is a sign of life, at least every few seconds."""

    stop: threading.Event = field(default_factory=threading.Event)
    wake: threading.Event = field(default_factory=threading.Event)
    tick: Callable[[], None] = lambda: None

    def end(self) -> None:
        """Ask for the end."""
        self.stop.set()
        self.wake.set()


@dataclass(frozen=True)
class Watched:
    """What one call of `RunWatcher.run` did: events judged, and the highest level that held."""

    judged: int
    level: int
    ended_by: str


class RunWatcher:
    """Watches one run.

    Parameters
    ----------
    run, settings
        The run and what was set for it.
    ledger
        Opened by this process, for this thread.
    replayer
        None when there is no model to load weights into: checkpoints are skipped, profiles are judged.
    control
        Where orders go; they are only written when ``settings.enforce`` is set.
    subject
        Names what checkpoints are replayed with: those that failed are tried again when it changes.
    references
        A healthy run that rules may compare with, by the kind of its events.
    model_now
        Looks again which model the folder names: when a checkpoint came and there was none, or it cannot be built (the
        configuration of a Hugging Face checkpoint goes with that checkpoint).
    """

    def __init__(
        self,
        run: Run,
        settings: RunSettings,
        *,
        ledger: Ledger,
        replayer: Replayer | None,
        control: ControlWriter | None,
        around: Surroundings,
        ending: Ending,
        subject: str = "",
        references: Mapping[str, Reference] = MappingProxyType({}),
        model_now: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.run, self.settings = run, settings
        self._ledger, self._replayer = ledger, replayer
        self._around, self._ending = around, ending
        self._board, self._clock = around.board, around.clock
        self._log = around.log.bind(run=run.name)
        self._orders = Orders(run.name, ledger, control)
        self._judge = Judge(
            ledger,
            self._orders,
            settings,
            references,
            around.clock,
            lambda problem: self._log.warning("not compared with the reference", problem=problem),
        )
        self._scanner = Scanner(run.folder, known=ledger.known())
        # A look at a network file system waits more than it computes: it may do so beside others.
        self._scans_at = None if is_remote(run.folder) else around.desk
        self._subject, self._model_now = subject, model_now
        self._noted: list[Sighting] = []
        self._present: set[Path] = set()
        self._refused: set[Path] = set()
        self._settling: float = math.inf  # the first step that has yet to settle
        self._shown = -1
        self._hold: Hold | None = None
        self._said: dict[str, Any] = {}
        self.judged = 0
        self.worst = self._judge.state.level
        self._furthest = -1 if self._judge.state.step is None else self._judge.state.step
        self._last_scan = time.monotonic()
        self._subject_problem: RkspError | None = None
        self._subject_again = 0.0

    def watch(self, *, once: bool = False, until_step: int | None = None) -> Watched:
        """Work until the end is asked for, ``once`` everything there is done, or ``until_step`` is judged.

        Raises
        ------
        ModelAppeared
            When there was no replayer, and a checkpoint brought its model.
        RkspError, OSError, sqlite3.Error
            When the run cannot be watched for now: its folder or its ledger cannot be used; or, ``once``, its model.
        """
        self._ledger.store({"mode": {"enforce": self.settings.enforce}})  # what `rksp control` says of this watcher
        recovered = self._ledger.recover()
        if recovered:
            self._log.info("recovered", events=recovered)
        reopened = self._ledger.reopen_checkpoints(self._subject)
        if reopened:
            reason = "the model, the probe, their settings or the baseline are others now"
            self._log.info("reopened", events=reopened, reason=reason)
        self._obey()
        self._export_control()
        scans = watch(
            self._scanner,
            stop=self._ending.stop,
            wake=self._ending.wake,
            interval=self._around.poll_interval,
            events=self._around.file_events,
            tick=self._ending.tick,
            desk=self._scans_at,
        )
        for sightings in scans:
            self._ending.tick()
            with self._around.desk:
                self._ledger.check_there(self.run.ledger)
                self._note(sightings)
                self._obey()
            self._work()
            with self._around.desk:
                self._deliver()
                self._export_control()
            if until_step is not None and self._furthest >= until_step:
                return Watched(self.judged, self.worst, "until_step")
            waiting = any(sighting.settling for sighting in sightings) or self._ledger.backlog()
            if once and self._subject_problem is not None and self._next("profile") is None:
                raise self._subject_problem
            if once and not waiting:
                return Watched(self.judged, self.worst, "once")
        return Watched(self.judged, self.worst, "stopped")

    @property
    def status(self) -> str:
        """One line about now, for the service manager."""
        state = self._judge.state
        step = "nothing judged yet" if state.step is None else f"step {state.step}"
        return f"{step}, risk {LEVELS[state.level]}, {self.judged} judged"

    # -- discovery

    def _note(self, sightings: list[Sighting]) -> None:
        """Bring the ledger up to date with a scan, whose list is the last one's when nothing changed."""
        changed = sightings is not self._noted
        if changed:
            self._noted, self._present = sightings, {sighting.path for sighting in sightings}
            settling = [sighting.step for sighting in sightings if sighting.settling and sighting.kind == "checkpoint"]
            self._settling = min(settling, default=math.inf)
            self._refused = {sighting.path for sighting in sightings if sighting.refused}
            for sighting in self._ledger.record_all(sightings):
                if not sighting.settling:
                    self._found(sighting)
        for sentence in self._scanner.unreadable:
            if self._is_news(f"unreadable {sentence}", sentence):
                self._log.warning("not looked into", problem=sentence)
        # What is ready and was there at the last scan still is when nothing changed.
        for event in self._ledger.events(*(("seen", "ready") if changed else ("seen",))):
            if event.path not in self._present and not event.path.exists():
                self._close(event, "expired", "it vanished before it was read")
            elif event.path in self._refused:
                self._close(event, "failed", event.error)
            elif event.status == "seen" and self._clock() - event.first_seen > self.settings.replay.incomplete_after:
                self._close(event, "failed", f"it was never finished: {event.error}")
        self._export_backlog()
        self._set("rksp_run_suspended", float(self._subject_problem is not None))
        self._set("rksp_run_last_scan_timestamp_seconds", self._clock())
        self._last_scan = time.monotonic()

    def _found(self, sighting: Sighting) -> None:
        self._set("rksp_checkpoint_last_seen_timestamp_seconds", self._clock())
        about = {"kind": sighting.kind, "step": sighting.step, "path": str(sighting.path)}
        if sighting.complete:
            self._log.info("found", **about)
        else:
            self._log.info("not finished", **about, problem=sighting.problem)

    # -- work

    def _work(self) -> None:
        """Judge every profile that is ready, then one checkpoint: its replay takes long enough for others to appear."""
        self._judge_profiles()
        event = self._next_checkpoint()
        if event is not None:
            self._process(event)
            self._export_backlog()
        if self._next("profile") is not None or (not self._waits_for_subject and self._next("checkpoint") is not None):
            self._ending.wake.set()

    def _judge_profiles(self) -> None:
        """Judge the profiles that are ready, lowest step first: early warning does not wait for a replay."""
        while (event := self._next("profile")) is not None:
            self._ending.tick()
            with self._around.desk:
                self._process(event)
                self._export_backlog()

    def _next(self, kind: Kind) -> Event | None:
        return None if self._ending.stop.is_set() else self._ledger.next_ready(kind)

    def _next_checkpoint(self) -> Event | None:
        """Return the checkpoint of the lowest step that the backlog policy wants; pass over the others."""
        while not self._waits_for_subject and (event := self._next("checkpoint")) is not None:
            if event.step > self._settling and 0 <= self._clock() - event.first_seen < EARLIER_WAITS:
                return None
            backlog = self.settings.backlog
            if backlog == "latest" and self._ledger.later_ready(event.kind, event.step):
                self._close(event, "skipped", "a later checkpoint was there already (backlog: latest)")
            elif isinstance(backlog, Every) and self._ledger.near_judged(event, backlog.every):
                self._close(event, "skipped", f"one less than {backlog.every} steps away was judged (backlog: every)")
            else:
                return event
        return None

    @property
    def _waits_for_subject(self) -> bool:
        return self._subject_problem is not None and time.monotonic() < self._subject_again

    def _while_replaying(self) -> None:
        """Go on scanning, judging the trainer's own profiles and obeying a person, at the usual interval."""
        self._ending.tick()
        if self._ending.stop.is_set():
            raise Abandoned
        if time.monotonic() - self._last_scan > self._around.poll_interval:
            with contextlib.suppress(OSError):  # a folder that cannot be listed now is no fault of this checkpoint
                sightings = scan_at(self._scans_at, self._scanner, self._ending.tick)
                with self._around.desk:
                    self._note(sightings)
            self._last_scan = time.monotonic()
            with self._around.desk:
                self._obey()
            self._judge_profiles()
            with self._around.desk:
                self._deliver()
                self._export_control()

    def _export_backlog(self) -> None:
        self._set("rksp_checkpoint_backlog", self._ledger.backlog())

    def _process(self, event: Event) -> None:
        """Process one event; whatever it is, it leaves an outcome in the ledger."""
        if event.kind == "checkpoint" and self._replayer is None:
            if self._model_now() is not None:
                raise ModelAppeared
            self._close(event, "skipped", "there is no model to load it into; give --model")
            return
        before, event = event, dataclasses.replace(event, attempts=event.attempts + 1)
        self._ledger.claim(before)
        try:
            profile = self._profile(event)
            with self._around.desk:
                self._require_standing(event)
                self._finish(event, profile)
        except Abandoned:
            self._ledger.release(before)
        except ExpiredCheckpoint as error:
            self._close(event, "expired", str(error))
        except (UnsupportedCheckpoint, ProfileError) as error:
            self._close(event, "skipped", str(error))
        except CheckpointError as error:
            self._fail(event, str(error))
        except RkspError as error:  # no checkpoint can be judged at all: the model cannot be built, say
            self._ledger.release(before)
            self._put_off(error)
        except (sqlite3.Error, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a document made us do, the next one may be good
            self._log.exception("unexpected", step=event.step, path=str(event.path))
            self._fail(event, f"{event.path.name} cannot be judged ({type(error).__name__}: {error})")

    def _require_standing(self, event: Event) -> None:
        """Refuse the profile of weights that are no more; the trainer may have gone back while they were replayed."""
        reached = self._judge.undone_by(event)
        if reached is not None:
            raise UnsupportedCheckpoint(f"the trainer went back to step {reached} after {event.path.name} was written")

    def _put_off(self, error: RkspError) -> None:
        """Let checkpoints wait for a model or device that cannot be had; profiles need neither."""
        if self._model_now() not in (None, self.run.model):
            raise ModelAppeared
        # No worker could be started: that passes sooner than a mistake in a model, which somebody must repair.
        pause = WORKER_RETRY if type(error) is RkspError else SUBJECT_RETRY
        self._subject_again, self._subject_problem = time.monotonic() + pause, error
        if self._is_news("subject", str(error)):
            self._log.error("checkpoints cannot be replayed", problem=str(error), seconds=pause)
            self._announce("run_suspended", {"problem": str(error), "what": "checkpoints"})

    def _profile(self, event: Event) -> ModelProfile:
        """Return the event's profile: the trainer's own, or that of a replay."""
        if event.kind == "profile":
            return ModelProfile.from_dict(profile_file.read(event.path))
        assert self._replayer is not None  # noqa: S101 - `_process` skips checkpoints otherwise
        restarts = self._replayer.restarts
        try:
            noise = self._judge.wants_noise(event)
            replayed = self._replayer.replay(event.path, noise=noise, tick=self._while_replaying)
        finally:
            self._board.count(self.run.name, "rksp_replay_worker_restarts_total", self._replayer.restarts - restarts)
        self._subject_problem = None
        self._board.observe_replay(self.run.name, replayed.seconds)
        for note in replayed.notes:
            self._log.warning("replayed otherwise", step=event.step, note=note)
        return dataclasses.replace(replayed.profile, step=event.step)

    def _finish(self, event: Event, profile: ModelProfile) -> None:
        """Judge the event, and tell everybody."""
        previous = self._judge.state.level
        judgement = self._judge.judge(event, profile, self._hold)
        drift, decision = judgement.drift, judgement.decision
        if judgement.rewound is not None:
            self._log.warning("rewound", kind=event.kind, step=event.step, before=judgement.rewound)
        self.worst = max(self.worst, self._judge.state.level)
        self.judged += 1
        self._furthest = max(self._furthest, event.step)
        self._deliver()
        self._board.count(self.run.name, "rksp_checkpoints_processed_total")
        self._set("rksp_checkpoint_last_processed_timestamp_seconds", self._clock())
        if not decision.late:
            self._show(event.step, profile, drift, anew=judgement.rewound is not None)
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
        self._report(previous, decision)
        self._export_control()

    def _show(self, step: int, profile: ModelProfile, drift: Drift, *, anew: bool) -> None:
        """Export what was found at the newest step; a replay may end after profiles of later steps were judged."""
        if step >= self._shown or anew:
            self._shown = step
            self._set("rksp_checkpoint_last_processed_step", step)
            self._board.show(self.run.name, profile, drift)

    def _report(self, previous: int, decision: Decision) -> None:
        """Log and announce a level that moved and an order, with the numbers that made them."""
        reason = dataclasses.asdict(decision.reason)
        back = {} if decision.rollback_to is None else {"rollback_to": decision.rollback_to}
        if decision.level != previous:
            moved = {"before": LEVELS[previous], "now": LEVELS[decision.level], "why": decision.explanation}
            log = self._log.warning if decision.level > previous else self._log.info
            log("risk level", **moved)
            self._announce("risk_level", moved)
        if decision.order is not None:
            what = "order" if self.settings.enforce else "would order"
            order = decision.order.to_dict() | back
            self._log.warning(what, **order, reason=reason)
            self._announce("order", {**order, "enforced": self.settings.enforce, "reason": reason})

    def _fail(self, event: Event, problem: str) -> None:
        """Count a failed attempt: another one after a back-off, or the end."""
        replay = self.settings.replay
        if event.attempts >= replay.attempts:
            self._close(event, "failed", problem)
            return
        delay = min(replay.retry_delay * 2.0 ** min(event.attempts - 1, 64), RETRY_LIMIT)
        self._log.warning("retry", step=event.step, path=str(event.path), problem=problem, seconds=delay)
        self._ledger.retry(event, problem, delay)

    def _close(self, event: Event, status: Any, problem: str) -> None:
        self._ledger.close_event(event, status, problem)
        self._board.count(self.run.name, f"rksp_checkpoints_{status}_total")
        about = {"kind": event.kind, "step": event.step, "path": str(event.path), "problem": problem}
        if status == "failed":
            self._log.warning(status, **about)
            self._announce("checkpoint_failed", about)
        elif self._is_news(f"{status} {event.kind}", _without(event, problem)):
            # Retention removes old ones, a backlog policy passes over some: said once, not for each.
            self._log.warning(status, **about, further="are logged at level info")
        else:
            self._log.info(status, **about)

    # -- control

    def _obey(self) -> None:
        """Follow a trainer that went back; then a person: hold the policy back, or order something else."""
        self._follow_back()
        held = self._hold
        try:
            self._hold = read_hold(hold_file(self.run.ledger), self._clock())
            self._said.pop("hold", None)
        except ControlError as error:
            if self._is_news("hold", str(error)):
                self._log.error("hold not read", problem=str(error))
            return
        previous = self._judge.state.level
        decision = self._judge.obey(self._hold)
        if self._hold != held:
            self._log.warning(
                "hold", **(self._hold.to_dict() if self._hold is not None else {"ended": self._why_ended(held)})
            )
        if decision is not None:
            self._report(previous, decision)

    def _follow_back(self) -> None:
        """Go back with a trainer that says it did as it was ordered: before anything that it wrote since is judged."""
        told = self._orders.rollback()
        if told is None or not self._is_news("rollback", told) or not self._judge.went_back(*told):
            return
        self._shown = -1
        self._board.count(self.run.name, "rksp_control_rollbacks_total")
        self._log.warning("rolled back", step=told[0], generation=told[1])

    def _why_ended(self, held: Hold | None) -> str:
        over = held is not None and not held.holds(self._clock())
        return "its time was over" if over else "released"

    def _deliver(self) -> None:
        """Give the trainer the last order; a control folder that cannot be written is tried again at the next scan."""
        if not self.settings.enforce:
            return
        try:
            foreign = self._orders.foreign()
            if foreign and self._is_news("foreign", foreign):
                self._log.error("another watcher", problem="it writes orders to the same trainer", generation=foreign)
            self._orders.deliver()
            self._said.pop("deliver", None)
        except ControlError as error:
            if self._is_news("deliver", str(error)):
                self._log.error("order not written", problem=str(error))

    def _hear(self, answer: Acknowledgement) -> None:
        """Log what a trainer says to an order, once; also one of another name, whom our orders do not reach."""
        if not self._is_news("answer", answer):
            return
        log = self._log.info if answer.status == "applied" else self._log.warning
        about = {"trainer": answer.run_id, "generation": answer.generation, "step": answer.step}
        about |= {"status": answer.status, "message": answer.message, "active": answer.active.to_dict()}
        if answer.rollback:
            about["rolled_back_to"] = answer.rolled_back_to
        log("answer", **about)
        self._announce("answer", about)

    def _warn_of_silence(self) -> None:
        """Raise the alarm, once an order, when the trainer does not answer in time."""
        late = self._orders.overdue(self._clock(), self.settings.control.acknowledge_within)
        self._set("rksp_control_acknowledgement_overdue", float(late is not None))
        if late is not None and self._is_news("overdue", late.generation):
            about = {"generation": late.generation, "issued_at": late.issued_at}
            self._log.error("order not acknowledged", **about, seconds=self.settings.control.acknowledge_within)
            self._announce("acknowledgement_overdue", about)

    def _export_control(self) -> None:
        """Export the orders, the acknowledgement, and the level."""
        order, answer = self._orders.last, self._orders.answer()
        state, expires_in = self._judge.state, self.settings.policy.expires_in
        if self.settings.enforce and order is not None:
            end = None if order.expires_at is None else seconds(order.expires_at)
        else:
            end = None if expires_in is None or state.ordered_at is None else state.ordered_at + expires_in
        expired = end is not None and self._clock() > end
        self._set("rksp_risk_level", None if state.step is None else state.level)
        self._set("rksp_kss_desired_weight", 0.0 if expired else state.ordered.alpha)
        self._set("rksp_learning_rate_desired_ratio", 1.0 if expired else state.ordered.learning_rate_scale or 1.0)
        self._set("rksp_surprise_desired_limit", None if expired else state.ordered.surprise)
        self._set("rksp_control_desired_generation", order.generation if order else 0)
        self._set("rksp_control_held", float(self._hold is not None))
        applied = 0
        if answer is not None:
            self._hear(answer)
            if answer.run_id == self.run.name:
                self._set("rksp_kss_applied_weight", answer.active_kss.alpha)
                self._set("rksp_learning_rate_applied_ratio", answer.active_learning_rate_scale or 1.0)
                self._set("rksp_surprise_applied_limit", answer.active_surprise)
                applied = answer.active_generation
        self._set("rksp_control_applied_generation", applied)
        self._warn_of_silence()

    # -- rim

    def _set(self, name: str, value: float | None) -> None:
        self._board.set(self.run.name, name, value)

    def _announce(self, event: str, document: Mapping[str, Any]) -> None:
        self._around.announce(event, self.run.name, document)

    def _is_news(self, what: str, value: Any) -> bool:
        """Whether this is another word about ``what`` than the last one."""
        if self._said.get(what) == value:
            return False
        self._said[what] = value
        return True


def _without(event: Event, problem: str) -> str:
    """Return a sentence without what names the event, to tell it from one about another kind of problem."""
    return problem.replace(event.path.name, "").replace(f"step {event.step} ", "")
