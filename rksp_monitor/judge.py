"""From the profile of an event to a stored decision: drift, policy, the order it leads to.

Everything that must survive together is one transaction of the ledger: the outcome of the event, the drift and policy
states after it, and the order, before the trainer can see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rksp_core import policy as policies
from rksp_core.drift import Drift, DriftState, measure, rewind
from rksp_core.errors import ProfileError
from rksp_core.orders import Reason
from rksp_core.policy import Decision, Evidence, Hold, PolicyState, decide, decree
from rksp_core.profile import ModelProfile
from rksp_core.reference import Reference
from rksp_monitor.config import RunSettings
from rksp_monitor.ledger import Event, Ledger, Outcome
from rksp_monitor.orders import Orders

KINDS = ("checkpoint", "profile")
OLD_SECONDS = 60.0  # after which evidence that a later event overtakes gives no order
_WENT_BACK = "went_back"  # the ledger's name for what a trainer said about that
CATCHING_UP = Hold(by="rksp", reason="what is judged is old, and later events wait")


@dataclass(frozen=True)
class Judgement:
    """What one event led to. ``rewound`` is the step that was judged last, when the trainer went back before it."""

    drift: Drift
    decision: Decision
    rewound: int | None = None


class Judge:
    """Judges the events of one run, in the order they are given."""

    def __init__(
        self,
        ledger: Ledger,
        orders: Orders,
        settings: RunSettings,
        references: Mapping[str, Reference],
        clock: Callable[[], float],
        warn: Callable[[str], object],
    ) -> None:
        self._ledger, self._orders, self._settings = ledger, orders, settings
        self._references, self._clock, self._warn = dict(references), clock, warn
        stored = ledger.load("policy")
        state = PolicyState.from_dict(stored) if stored else PolicyState()
        self._overtaken = ledger.load("overtaken") or {}
        heard = ledger.load("hold")
        self._heard = Hold.from_dict(heard) if heard else None
        self.state = orders.reconcile(state) if settings.enforce else state

    def wants_noise(self, event: Event) -> bool:
        """Whether the noise of this event's profile should be measured: of the baseline, and now and then again."""
        replay = self._settings.replay
        if replay.noise_groups == 0:
            return False
        state = self._drift_state(event.kind)
        return state is None or self._ledger.judged_count(event.kind) % replay.noise_every == 0

    def judge(self, event: Event, profile: ModelProfile, hold: Hold | None) -> Judgement:
        """Measure the drift, decide, and store it all.

        Raises
        ------
        ProfileError
            When the profile is of another probe or other settings than the run's baseline.
        """
        before, state = self._drift_state(event.kind), self.state
        policy, documents, rewound, said = self._settings.policy, dict[str, Any](), None, self._untold()
        document = profile.to_dict(eigenvalues=False)
        if before is not None and event.step <= before.step and self._ledger.went_back(event, document):
            rewound = before.step
            state = policies.rewind(state, event.step, policy, self._kept(event.step))
            documents = self._rewound(event.step)
            before = DriftState.from_dict(documents[f"drift/{event.kind}"])
        elif said is not None:
            documents[_WENT_BACK] = {**said, "told": True}
        after, drift = measure(before, profile, event.step, self._reference(event.kind, profile))
        back_to = None if rewound is not None or said is None else said["step"]
        evidence = Evidence(
            drift, self._clock(), event.kind, rewound=rewound is not None or back_to is not None, back_to=back_to
        )
        overtaken = self._is_overtaken(event)
        state, decision = decide(state, evidence, policy, hold or (CATCHING_UP if overtaken else None))
        documents |= self._documents(state, decision)
        documents["overtaken"] = {"kind": event.kind, "step": event.step} if overtaken else {}
        if after is not None:
            documents[f"drift/{event.kind}"] = after.to_dict()
        outcome = Outcome(document, evidence.to_dict(), decision.to_dict())
        self._ledger.finish(event, outcome, documents, undone=rewound is not None)
        self.state, self._overtaken = state, documents["overtaken"]
        return Judgement(drift, decision, rewound)

    def went_back(self, step: int, generation: int, at: float) -> bool:
        """Undo what came after ``step``, to which the trainer says that this order has taken it; False if it is known.

        ``at`` is when it said so, in seconds since the epoch.

        The next event says so too, for whoever replays the history.
        """
        if generation <= (self._ledger.load(_WENT_BACK) or {"generation": 0})["generation"]:
            return False
        state = policies.rewind(self.state, step + 1, self._settings.policy, self._kept(step + 1))
        documents = self._rewound(step + 1) | self._documents(state, None)
        documents[_WENT_BACK] = {"generation": generation, "step": step, "at": at, "told": False}
        self._ledger.set_aside(step + 1, documents)
        self.state = state
        return True

    def undone_by(self, event: Event) -> int | None:
        """Return the step that the trainer went back to after the event's file was written, if it undid that."""
        said = self._ledger.load(_WENT_BACK) or {}
        if event.step <= said.get("step", event.step):
            return None
        return int(said["step"]) if _written(event) < said.get("at", 0.0) else None

    def obey(self, hold: Hold | None) -> Decision | None:
        """Take a person's word into account at once; return what it led to, None when it changed nothing.

        What began, changed or ended is kept once, whoever starts again, and so is each order that follows from it.
        """
        if self._overtaken and not self._ledger.later_ready(**self._overtaken):
            self._overtaken = {}
        in_force = hold or (CATCHING_UP if self._overtaken else None)
        news = hold != self._heard
        state, decision = decree(self.state, self._settings.policy, in_force, self._clock(), news=news)
        if news:
            decision = decision or Decision(
                state.level, state.level, (), None, Reason(state.level, state.step), hold=hold
            )
        if decision is not None:
            documents = self._documents(state, decision) | {"hold": self._kept_of(hold)}
            self._ledger.decree(state.step or 0, decision.to_dict(), documents)
        elif state != self.state:
            self._ledger.store(self._documents(state, None))
        self.state, self._heard = state, hold
        return decision

    def _kept_of(self, hold: Hold | None) -> dict[str, Any]:
        """Return what is remembered of a hold; a watcher that only observes leaves its rollback to one that orders."""
        if hold is None:
            return {}
        return (hold if self._settings.enforce else dataclasses.replace(hold, rollback_to=None)).to_dict()

    def _is_overtaken(self, event: Event) -> bool:
        """Whether this is old evidence, and a later event of its kind waits: a trainer must not be told of that.

        A watcher that is attached to a run in its midst, or was away for a while, sees what it missed all at once.
        """
        if not self._ledger.later_ready(event.kind, event.step):
            return False
        return self._clock() - _written(event) > OLD_SECONDS

    def _untold(self) -> dict[str, Any] | None:
        """Return the going back, as the trainer said it, that no event has told of since."""
        said = self._ledger.load(_WENT_BACK)
        return None if said is None or said["told"] else said

    def _rewound(self, step: int) -> dict[str, Any]:
        """Return the drift states, of both kinds of events, for a run that went back to before the step."""
        documents = {}
        for kind in KINDS:
            state = self._drift_state(kind)
            if state is not None and state.step >= step:
                drifts = (each.drift for each in self._kept(step) if each.series == kind)
                documents[f"drift/{kind}"] = rewind(state, step, drifts).to_dict()
        return documents

    def _kept(self, step: int) -> Iterator[Evidence]:
        """Yield what was judged before the step and stands, one at a time: there may be a hundred thousand."""
        return map(Evidence.from_dict, self._ledger.evidence_before(step))

    def _reference(self, kind: str, profile: ModelProfile) -> Reference | None:
        """Return the healthy run's series; one that cannot be compared with this run is said so and dropped."""
        reference = self._references.get(kind)
        try:
            if reference is not None:
                reference.check(profile)
        except ProfileError as error:
            self._warn(str(error))
            del self._references[kind]
            return None
        return reference

    def _documents(self, state: PolicyState, decision: Decision | None) -> dict[str, Any]:
        documents: dict[str, Any] = {"policy": state.to_dict()}
        if self._settings.enforce and decision is not None:
            documents |= self._orders.prepare(decision, state.ordered_until, self._clock())
        return documents

    def _drift_state(self, kind: str) -> DriftState | None:
        stored = self._ledger.load(f"drift/{kind}")
        return DriftState.from_dict(stored) if stored else None


def _written(event: Event) -> float:
    """Return when the event's file was written, in seconds since the epoch; when it was seen, where it is gone."""
    try:
        return event.path.stat().st_mtime
    except OSError:
        return event.first_seen
