"""What the drift of a run asks for: a risk level, and an order to the trainer when one is due. Pure.

    state, decision = decide(state, Evidence(drift, at, series), policy, hold)

Rules fire on one event; the level moves only when events in a row agree (hysteresis); orders keep a distance
(cool-down) and are renewed before they expire. Checkpoints and the trainer's own profiles are two series, each with its
own order of events and its own hysteresis: a replay that takes an hour says something about its step all the same. The
run's level is the highest of them. Time enters as a value, so a decision can be replayed exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from rksp_core.drift import Drift
from rksp_core.errors import ConfigError, ControlError
from rksp_core.features import DISTANCES, FEATURES
from rksp_core.orders import Levers, Reason, is_number, is_whole

LEVELS = ("ok", "elevated", "high", "critical")
CRITICAL = 3
LEAST_SCALE = 0.01  # of the learning rate, as far as a trainer that has to go back again and again is slowed down
FOR_EVER = 1e9  # seconds, 31 years: a longer time ends where no calendar goes


class PolicyError(ConfigError, ValueError):
    """A policy says something impossible; as a ValueError, so that a reader of settings can say where it stands."""


@dataclass(frozen=True)
class Condition:
    """One comparison: ``metric`` falls or rises by more than ``by``, by more than so many ``sigmas``, or by both.

    Metrics are `rksp_core.features.FEATURES` and `DISTANCES`. ``against`` is the run's trailing average, its baseline,
    the healthy reference run at the same step, or ``absolute``: then the value itself must lie above ``by`` (rises) or
    below it (falls). A move has to be large enough to matter and certain enough to be real, so ``by`` and ``sigmas``
    together ask for both. An unknown value never fires.
    """

    metric: str
    by: float | None = None
    against: Literal["trailing", "baseline", "reference", "absolute"] = "trailing"
    direction: Literal["falls", "rises"] = "rises"
    sigmas: float | None = None

    def __post_init__(self) -> None:
        known = (*FEATURES, *DISTANCES)
        if self.metric not in known:
            near = get_close_matches(self.metric, known, 1, 0.0)[0]
            raise PolicyError(f"a rule names the unknown metric {self.metric!r}; did you mean {near!r}?")
        about = f"a rule about {self.metric}"
        if self.by is None and self.sigmas is None:
            raise PolicyError(f"{about} says not how far it must move; give by, sigmas or both")
        if self.by is not None and not is_number(self.by):
            raise PolicyError(f"{about}: by must be a finite number, got {self.by!r}; correct it")
        if self.sigmas is not None and not (is_number(self.sigmas) and self.sigmas > 0):
            raise PolicyError(f"{about}: sigmas must be a number above 0, got {self.sigmas!r}; correct it")
        if self.against == "absolute" and self.sigmas is not None:
            raise PolicyError(f"{about}: an absolute value has no sigmas; give by alone, or compare it with something")
        if self.metric in DISTANCES and (self.against == "absolute" or self.direction == "falls"):
            raise PolicyError(f"{about}: a distance rises, against trailing, baseline or reference; correct it")

    def judge(self, drift: Drift) -> ConditionFinding:
        """Return whether the comparison is true of this event, with the numbers that say so."""
        sign = 1.0 if self.direction == "rises" else -1.0
        value, other, deviation, least = drift.values.get(self.metric), None, None, self.by
        if self.against == "absolute":
            moved, least = value, None if self.by is None else sign * self.by
        else:
            moved, deviation = drift.moved(self.metric, self.against), drift.sigmas(self.metric, self.against)
            other = drift.compared(self.against).get(self.metric)
            value = moved if self.metric in DISTANCES else value
        far = least is None or (moved is not None and sign * moved > least)
        sure = self.sigmas is None or (deviation is not None and sign * deviation > self.sigmas)
        return ConditionFinding(self, value, other, deviation, far and sure)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; what is None is left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ConditionFinding:
    """What a condition found: the value, what it was compared with, the deviation in sigmas, and whether it held.

    ``value`` of a distance is the distance. None is what is not known, or does not apply.
    """

    condition: Condition
    value: float | None
    reference: float | None
    deviation: float | None
    held: bool

    @property
    def text(self) -> str:
        """The finding in a few words, as a log shows it."""
        asked, words = self.condition, []
        if asked.by is not None:
            words.append(f"{asked.by:g}")
        if asked.sigmas is not None:
            words.append(f"{asked.sigmas:g} sigmas")
        far = " and ".join(words)
        if asked.against == "absolute":
            return f"{asked.metric} {'above' if asked.direction == 'rises' else 'below'} {far}: {_figure(self.value)}"
        found = (
            _figure(self.value) if asked.metric in DISTANCES else f"{_figure(self.reference)} -> {_figure(self.value)}"
        )
        sure = "" if self.deviation is None else f" ({self.deviation:+.1f} sigmas)"
        return f"{asked.metric} {asked.direction} by {far} against {asked.against}: {found}{sure}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the condition's own, with what it found beside it; what is None is left out."""
        found = {"value": self.value, "reference": self.reference, "deviation": self.deviation, "held": self.held}
        return self.condition.to_dict() | {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ConditionFinding:
        """Read the JSON form."""
        values = dict(document)
        found = {name: values.pop(name, None) for name in ("value", "reference", "deviation")}
        return cls(held=values.pop("held"), **found, condition=Condition(**values))


@dataclass(frozen=True)
class Rule:
    """A conjunction: it proposes ``level`` (1 elevated, 2 high, 3 critical) when ``all`` its conditions hold.

    It fires from step ``arm_after_step`` on, where they hold at ``in_a_row`` events of one series one after another.
    """

    name: str
    level: int
    all: tuple[Condition, ...]
    arm_after_step: int = 0
    in_a_row: int = 1

    def __post_init__(self) -> None:
        if self.level not in (1, 2, 3):
            raise PolicyError(f"rule {self.name!r}: level must be 1, 2 or 3, got {self.level!r}; correct the rule")
        if not is_whole(self.in_a_row) or self.in_a_row < 1:
            raise PolicyError(f"rule {self.name!r}: in_a_row must be at least 1, got {self.in_a_row!r}; correct it")
        if not self.all:
            raise PolicyError(f"rule {self.name!r} has no condition, so it would always fire; add one under `all`")

    def judge(self, drift: Drift, before: int | None = None) -> RuleFinding:
        """Return whether the rule fires, armed at this step and every condition held, and what each condition found.

        ``before``: at how many armed events in a row they held before this one; None, where that is not known, is
        enough.
        """
        findings = tuple(condition.judge(drift) for condition in self.all)
        armed = drift.step >= self.arm_after_step
        row = 0
        if armed and all(each.held for each in findings):
            row = 1 + (self.in_a_row - 1 if before is None else before)
        return RuleFinding(self.name, self.level, row >= self.in_a_row, armed, findings, row)


@dataclass(frozen=True)
class RuleFinding:
    """What a rule found: whether it fired, whether it was armed yet, and what its conditions found.

    ``row`` counts the armed events in a row at which all of them held, this one included.
    """

    rule: str
    level: int
    fired: bool
    armed: bool
    conditions: tuple[ConditionFinding, ...]
    row: int = 0

    @property
    def text(self) -> str:
        """The finding in a few words, as a log shows it."""
        return f"{self.rule}: {'; '.join(finding.text for finding in self.conditions)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        conditions = [finding.to_dict() for finding in self.conditions]
        return {name: getattr(self, name) for name in ("rule", "level", "fired", "armed", "row")} | {
            "conditions": conditions
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RuleFinding:
        """Read the JSON form."""
        conditions = tuple(ConditionFinding.from_dict(finding) for finding in document["conditions"])
        row = document.get("row", 0)
        return cls(document["rule"], document["level"], document["fired"], document["armed"], conditions, row)


# Levels 1 and 2 are what training.experiments.early_warning chose on the tuning runs of its sweep, and
# training/experiments/early_warning/rules.json holds them with the runs that they are of; docs/science.md says what
# they do on runs that they were not chosen on. Healthy learning moves these numbers too, so they are advisory. Level 3
# is no forecast: the trainer's own figures are far out, or not finite.
DEFAULT_RULES = (
    Rule(
        "expansive_mass_falls",
        1,
        (Condition("expansive_mass_mean", 0.444, "baseline", direction="falls"),),
        arm_after_step=20,
    ),
    Rule("sigma_max_grows", 1, (Condition("log_sigma_max", 5.188),), arm_after_step=20, in_a_row=2),
    Rule(
        "henrici_and_kreiss_jump",
        1,
        (
            Condition("log_henrici_max", 10.04),
            Condition("log_kreiss_mean", 2.246),
        ),
        arm_after_step=20,
    ),
    Rule("head_weights_grow", 2, (Condition("log_weight_norm_head", 3.038),), arm_after_step=20, in_a_row=2),
    Rule("head_weights_jump", 2, (Condition("log_weight_norm_head", 4.265),), arm_after_step=20),
    Rule("block_weights_grow", 2, (Condition("log_weight_norm_max", 2.558),), arm_after_step=20, in_a_row=2),
    Rule("gradient_norm_jumps", 3, (Condition("gradient_norm", 20.0),), arm_after_step=50),
    Rule("loss_jumps", 3, (Condition("loss", 1.0),), arm_after_step=50),
    Rule("gradient_norm_is_large", 3, (Condition("gradient_norm", 500.0, "absolute"),)),
    Rule("loss_is_large", 3, (Condition("loss", 50.0, "absolute"),)),
    Rule("activations_not_finite", 3, (Condition("not_finite_layers", 0.0, "absolute"),)),
    Rule("loss_or_gradient_not_finite", 3, (Condition("not_finite_figures", 0.0, "absolute"),)),
)


@dataclass(frozen=True)
class Rung(Levers):
    """What a level orders: levers, and with ``rollback`` that the trainer goes back to before the trouble began.

    That is asked once in an excursion from level 0, unless the run gets worse than it was then, and only where an event
    of level 0 went before: its step is as far as the trainer may go back. It is an event, the levers are a state.
    """

    rollback: bool = False

    @property
    def levers(self) -> Levers:
        """The state alone."""
        return Levers.of(self.kss, **self.beside)


# A level that is not listed takes the entry of the next lower one that is; without one nothing is ordered. Levels 1 and
# 2 alert people. Back to the last healthy checkpoint and on at half the rate is what saved runs in
# training/experiments/specs/rescue; half the rate alone came too late, and KSS at the alarm saved none.
DEFAULT_LADDER = {3: Rung(learning_rate_scale=0.5, rollback=True)}


@dataclass(frozen=True)
class Policy:
    """When the level moves, and what each level orders.

    ``raise_after`` and ``clear_after`` are the events in a row that raise or lower the level; ``cooldown_steps`` the
    least distance between two orders (a higher level than the one last answered never waits); ``expires_in`` the
    seconds an order holds: it is renewed by the first event after half that time. None, for ever, is the default, as an
    order that ends while nobody watches gives the run the full learning rate back with which it was in trouble. A
    series (checkpoints, or the trainer's own profiles) whose newest step lies more than ``silent_after_steps`` behind
    the run's newest one has fallen silent: its level does not count until it is heard again. None: it always counts.
    With ``ratchet`` no order is taken back when the level falls, as it does when a trainer goes back: only a higher
    level asks for another, and a trainer that went back and has to again gets the rung's ``learning_rate_scale`` once
    more on top: .5, .25, .125, down to `LEAST_SCALE`. A limit of ``surprise`` stays at higher levels, too: the tighter
    of two holds.
    ``rollback_margin``: how many steps before its last healthy event the run is trusted again, as trouble is older than
    its signs.
    """

    rules: tuple[Rule, ...] = DEFAULT_RULES
    raise_after: int = 1
    clear_after: int = 3
    cooldown_steps: int = 20
    expires_in: float | None = None
    # Checkpoints are often 500-5000 steps apart: one series must not lose its word between two of its own events.
    silent_after_steps: int | None = 5000
    ratchet: bool = True
    rollback_margin: int = 30
    ladder: Mapping[int, Rung] = field(default_factory=lambda: dict(DEFAULT_LADDER))

    def __post_init__(self) -> None:
        for name, least in (
            ("raise_after", 1),
            ("clear_after", 1),
            ("cooldown_steps", 0),
            ("silent_after_steps", 1),
            ("rollback_margin", 0),
        ):
            value = getattr(self, name)
            endless = name == "silent_after_steps" and value is None
            if not endless and (not is_whole(value) or value < least):
                raise PolicyError(f"{name} must be at least {least}, got {value}; correct it")
        if self.expires_in is not None and not (is_number(self.expires_in) and 0 < self.expires_in <= FOR_EVER):
            given = self.expires_in
            raise PolicyError(
                f"expires_in must be above 0 seconds and at most {FOR_EVER:g}, or null, got {given}; correct it"
            )
        unknown = [level for level in self.ladder if level not in range(4)]
        if unknown:
            raise PolicyError(f"the ladder has the level {unknown[0]}; levels are 0 ok, 1, 2 and 3 critical")

    def rung(self, level: int) -> Rung:
        """Return what a level asks for."""
        listed = [step for step in self.ladder if step <= level]
        return self.ladder[max(listed)] if listed else Rung()


@dataclass(frozen=True)
class Hold:
    """A person's word: the policy gives no orders while it holds.

    ``levers`` are what the trainer is told instead; None tells it nothing more, and what was ordered last runs out by
    itself. ``until`` is in seconds since the epoch, None until it is released. ``rollback_to``: beside the levers the
    trainer is asked, once, to go back to its newest checkpoint at or before this step.
    """

    levers: Levers | None = None
    until: float | None = None
    by: str = ""
    reason: str = ""
    rollback_to: int | None = None

    def holds(self, at: float) -> bool:
        """Whether it holds at this time."""
        return self.until is None or at < self.until

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        levers = None if self.levers is None else self.levers.to_dict()
        back = {} if self.rollback_to is None else {"rollback_to": self.rollback_to}
        return {"levers": levers, "until": self.until, "by": self.by, "reason": self.reason, **back}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Hold:
        """Read the JSON form.

        Raises
        ------
        ControlError
            When it is no hold, or a value is out of its range.
        """
        try:
            levers, until = document["levers"], document["until"]
            by, reason, back = document["by"], document["reason"], document.get("rollback_to")
            if back is not None and (not is_whole(back) or back < 0 or levers is None):
                raise ValueError("rollback_to must be a step, beside levers")
            if not (until is None or is_number(until)) or not isinstance(by, str) or not isinstance(reason, str):
                raise ValueError("until must be a number or null, by and reason must be texts")
            return cls(None if levers is None else Levers.from_dict(levers, 3), until, by, reason, back)
        except ControlError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ControlError(f"the document is no hold ({error!r}); write one with `rksp control hold`") from error


@dataclass(frozen=True)
class Evidence:
    """One judged event; ``at`` is in seconds since the epoch, as the caller's clock says.

    ``series`` is where it comes from ("checkpoint", or "profile" for the trainer's own); ``rewound`` says that the
    trainer had gone back to before it (`rewind` was called first), ``back_to`` to which step, where it said so itself.
    """

    drift: Drift
    at: float = 0.0
    series: str = "checkpoint"
    rewound: bool = False
    back_to: int | None = None

    @property
    def undone_from(self) -> int:
        """The first step that a trainer which went back has undone."""
        return self.drift.step if self.back_to is None else self.back_to + 1

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        back = {} if self.back_to is None else {"back_to": self.back_to}
        return {"drift": self.drift.to_dict(), "at": self.at, "series": self.series, "rewound": self.rewound, **back}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Evidence:
        """Read the JSON form."""
        return cls(
            Drift.from_dict(document["drift"]),
            document["at"],
            document["series"],
            document.get("rewound", False),
            document.get("back_to"),
        )


@dataclass(frozen=True)
class Series:
    """What is remembered of one series: its level, its newest step, its last proposals, and how long rules held.

    ``rows`` counts, for each rule that asks for several, the events in a row at which all its conditions held.
    """

    level: int = 0
    step: int | None = None
    proposals: tuple[int, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)


# A ledger of before levels were kept by series holds one for all of them: the first that is heard goes on with it.
_SHARED = ""


@dataclass(frozen=True)
class PolicyState:
    """What the policy remembers: the level, that of each series, and the order that was given last.

    ``ordered_at`` is when it was given and ``ordered_until`` when its time is over, None for never, in seconds since
    the epoch. ``held`` says that a hold was in force when the state was made. ``kept_level`` and ``kept_surprise`` are
    the highest level that a ratchet has answered and the limit it ordered, ``healthy_step`` the newest step of level 0
    up to which no rule fired, ``back_level`` the level at which this excursion from level 0 was answered by a rollback,
    0 before, ``back_step`` the step of the last.
    ``back_asked`` says that the run has not gone back since, ``backs`` how often it did when the policy asked for it.
    """

    level: int = 0
    series: Mapping[str, Series] = field(default_factory=dict)
    ordered: Levers = field(default_factory=Levers)
    ordered_level: int = 0
    ordered_step: int | None = None
    ordered_at: float | None = None
    ordered_until: float | None = None
    held: bool = False
    kept_level: int = 0
    kept_surprise: float | None = None
    healthy_step: int | None = None
    back_level: int = 0
    back_step: int | None = None
    back_asked: bool = False
    backs: int = 0

    @property
    def step(self) -> int | None:
        """The newest step of any series."""
        return max((each.step for each in self.series.values() if each.step is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> PolicyState:
        """Read the JSON form, also that of a time when all series shared one level or orders set fewer levers."""
        values = dict(document)
        if "series" not in values:
            shared = {name: values.pop(name) for name in ("step", "proposals")}
            values["series"] = {_SHARED: {"level": values["level"], **shared}}
        values["series"] = {
            name: Series(each["level"], each["step"], tuple(each["proposals"]), each.get("rows", {}))
            for name, each in values["series"].items()
        }
        values["ordered"] = Levers(**values["ordered"])
        return cls(**values)


@dataclass(frozen=True)
class Decision:
    """The outcome of one event: the level that holds, the rules that fired, and the order that is due, if any.

    ``rollback_to`` is as in `rksp_core.orders.Desired`. ``rules`` are all rules with the numbers that made them;
    ``hold`` the hold in force. ``late`` marks an event that came after a newer one of its series: it decided nothing.
    """

    level: int
    previous_level: int
    fired: tuple[str, ...]
    order: Levers | None
    reason: Reason
    late: bool = False
    rules: tuple[RuleFinding, ...] = ()
    hold: Hold | None = None
    rollback_to: int | None = None

    @property
    def explanation(self) -> list[str]:
        """A line for each rule that fired, with the numbers that made it."""
        return [rule.text for rule in self.rules if rule.fired]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "level": self.level,
            "previous_level": self.previous_level,
            "fired": list(self.fired),
            "order": None if self.order is None else self.order.to_dict(),
            **({} if self.rollback_to is None else {"rollback_to": self.rollback_to}),
            "reason": dataclasses.asdict(self.reason),
            "late": self.late,
            "rules": [rule.to_dict() for rule in self.rules],
            "hold": None if self.hold is None else self.hold.to_dict(),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Decision:
        """Read the JSON form."""
        order, hold = document["order"], document["hold"]
        return cls(
            document["level"],
            document["previous_level"],
            tuple(document["fired"]),
            None if order is None else Levers.from_dict(order, 3),
            Reason(**document["reason"]),
            document["late"],
            tuple(RuleFinding.from_dict(rule) for rule in document["rules"]),
            None if hold is None else Hold.from_dict(hold),
            document.get("rollback_to"),
        )


def decide(
    state: PolicyState, evidence: Evidence, policy: Policy, hold: Hold | None = None
) -> tuple[PolicyState, Decision]:
    """Judge one event.

    Its series goes on with it, unless it is older than the newest one there; the run's level is the highest of its
    series, but for those that have fallen silent. While a hold is in force, levels move and the policy orders nothing.
    """
    drift, at = evidence.drift, evidence.at
    before = state.series.get(evidence.series, state.series.get(_SHARED, Series()))
    if drift.late or (before.step is not None and drift.step <= before.step):
        return state, Decision(state.level, state.level, (), None, Reason(state.level, drift.step), late=True)
    heard, findings = _heard(before, drift, policy)
    fired = [rule for rule, finding in zip(policy.rules, findings, strict=True) if finding.fired]
    after = _with(state, evidence.series, heard, policy)
    healthy = after.healthy_step
    if fired:  # a checkpoint may be judged when profiles of later steps, on which nothing fired, were judged already
        healthy = None if healthy is None else min(healthy, drift.step - 1)
    elif after.level == 0:
        healthy = max(drift.step, healthy or 0)
    after = dataclasses.replace(after, healthy_step=healthy, back_level=0 if after.level == 0 else after.back_level)
    back_to = _rollback(after, policy) if _in_force(hold, at) is None else None
    after, order = _order(after, policy, hold, at, back_to)
    names = tuple(rule.name for rule in fired)
    reason, in_force = _reason(after.level, fired, drift), _in_force(hold, at)
    decision = Decision(
        after.level, state.level, names, order, reason, rules=findings, hold=in_force, rollback_to=back_to
    )
    return after, decision


def decree(
    state: PolicyState, policy: Policy, hold: Hold | None, at: float, *, news: bool = False
) -> tuple[PolicyState, Decision | None]:
    """Return what a hold that began, changed or ended asks for without an event; None when nothing is due.

    The state may be another one all the same: it remembers that a hold is in force. What a hold orders is renewed here
    too, before it expires: it stands on a person's word and waits for no event. ``news``: the hold was not heard
    before, so that what it asks for only once is due.
    """
    in_force = _in_force(hold, at)
    if in_force is None and not state.held:
        return state, None
    back_to = in_force.rollback_to if in_force is not None and news else None
    after, order = _order(state, policy, hold, at, back_to)
    if order is None:
        return after, None
    reason = Reason(state.level, state.step)
    return after, Decision(state.level, state.level, (), order, reason, hold=in_force, rollback_to=back_to)


def rewind(state: PolicyState, step: int, policy: Policy, kept: Iterable[Evidence] = ()) -> PolicyState:
    """Return the state for a run that went back to before ``step``: what came after is undone, orders are not.

    ``kept`` are the events before ``step`` in the order they were judged, without those of an earlier excursion that
    was undone. A series that reached ``step`` has the level that they give, and starts anew where there are none.
    """
    undone = {name for name, each in state.series.items() if each.step is not None and each.step >= step}
    series = {name: each for name, each in state.series.items() if name not in undone}
    for evidence in kept:
        drift, before = evidence.drift, series.get(evidence.series, Series())
        if evidence.series not in undone or drift.late or drift.step >= step:
            continue
        series[evidence.series], _ = _heard(before, drift, policy)
    return dataclasses.replace(
        state,
        series=series,
        level=_highest(series, policy),
        ordered_step=None if state.ordered_step is None else min(state.ordered_step, step),
        healthy_step=None if state.healthy_step is None else min(state.healthy_step, step - 1),
        back_level=0,
        back_step=None if state.back_step is None else min(state.back_step, step),
        back_asked=False,
        backs=state.backs + state.back_asked,
    )


def replay_decisions(evidences: Iterable[Evidence], policy: Policy) -> list[Decision]:
    """Return what a policy decides about a history, in the order it was judged: all of it, what was undone too.

    With the policy of the time these are the decisions that were made, but for the orders of a hold.
    """
    state = PolicyState()
    kept: list[Evidence] = []
    decisions: list[Decision] = []
    for evidence in evidences:
        if evidence.rewound:
            kept = [each for each in kept if each.drift.step < evidence.undone_from]
            state = rewind(state, evidence.undone_from, policy, kept)
        state, decision = decide(state, evidence, policy)
        kept.append(evidence)
        decisions.append(decision)
    return decisions


def _heard(series: Series, drift: Drift, policy: Policy) -> tuple[Series, tuple[RuleFinding, ...]]:
    """Return the series with one more event, and what each rule found in that."""
    findings = tuple(rule.judge(drift, series.rows.get(rule.name, 0)) for rule in policy.rules)
    keep = max(policy.raise_after, policy.clear_after)
    proposal = max((finding.level for finding in findings if finding.fired), default=0)
    proposals = (*series.proposals, proposal)[-keep:]
    rows = {rule.name: finding.row for rule, finding in zip(policy.rules, findings, strict=True) if rule.in_a_row > 1}
    return Series(_level(series.level, proposals, policy), drift.step, proposals, rows), findings


def _with(state: PolicyState, name: str, heard: Series, policy: Policy) -> PolicyState:
    series = {other: each for other, each in state.series.items() if other != _SHARED} | {name: heard}
    return dataclasses.replace(state, series=series, level=_highest(series, policy))


def _highest(series: Mapping[str, Series], policy: Policy) -> int:
    """Return the highest level of the series that are still heard."""
    newest = max((each.step for each in series.values() if each.step is not None), default=0)
    return max(
        (
            each.level
            for each in series.values()
            if policy.silent_after_steps is None or each.step is None or newest - each.step <= policy.silent_after_steps
        ),
        default=0,
    )


def _level(level: int, proposals: tuple[int, ...], policy: Policy) -> int:
    """Rise to what the last ``raise_after`` proposals all support; fall to the worst of the last ``clear_after``."""
    rising, falling = proposals[-policy.raise_after :], proposals[-policy.clear_after :]
    if len(rising) == policy.raise_after and min(rising) > level:
        return min(rising)
    if len(falling) == policy.clear_after and max(falling) < level:
        return max(falling)
    return level


def _in_force(hold: Hold | None, at: float) -> Hold | None:
    return hold if hold is not None and hold.holds(at) else None


def _rollback(state: PolicyState, policy: Policy) -> int | None:
    """Return the step to go back to where the level asks for it: once an excursion, unless the run got worse.

    The cool-down does not hold for the critical level: a run that diverged sends no later event.
    """
    if not policy.rung(state.level).rollback or state.level <= state.back_level:
        return None
    since = math.inf if state.back_step is None else (state.step or 0) - state.back_step
    if since < policy.cooldown_steps and state.level < CRITICAL:
        return None
    return None if state.healthy_step is None else max(0, state.healthy_step - policy.rollback_margin)


def _order(
    state: PolicyState, policy: Policy, hold: Hold | None, at: float, back_to: int | None
) -> tuple[PolicyState, Levers | None]:
    """Return the state that remembers the hold and the order that is due, and that order."""
    in_force = _in_force(hold, at)
    level = max(state.level, state.kept_level) if policy.ratchet else state.level
    after = dataclasses.replace(state, held=in_force is not None)
    wanted = policy.rung(level).levers if in_force is None else in_force.levers
    if wanted is None:
        return after, None
    ends = [
        math.inf if policy.expires_in is None else at + policy.expires_in,
        math.inf if in_force is None or in_force.until is None else in_force.until,
    ]
    asked = state.back_asked or (back_to is not None and in_force is None)
    backs = state.backs + asked
    if policy.ratchet and in_force is None and backs > 1 and wanted.learning_rate_scale is not None:
        scale = max(wanted.learning_rate_scale**backs, min(wanted.learning_rate_scale, LEAST_SCALE))
        wanted = dataclasses.replace(wanted, learning_rate_scale=scale)
    if policy.ratchet and in_force is None and state.kept_surprise is not None:
        tighter = min(wanted.surprise or math.inf, state.kept_surprise)
        wanted = dataclasses.replace(wanted, surprise=tighter)
    # A person's word waits for no cool-down, nor does the policy at the end of it.
    due = _is_due(state, wanted, policy, at, min(ends), at_once=state.held or after.held)
    if not due and back_to is None:
        return after, None
    if back_to is not None:
        after = dataclasses.replace(after, back_level=state.level, back_step=state.step or 0, back_asked=asked)
    return dataclasses.replace(
        after,
        ordered=wanted,
        kept_level=level if in_force is None else state.kept_level,
        kept_surprise=wanted.surprise if in_force is None else state.kept_surprise,
        ordered_level=level,
        ordered_step=state.step or 0,
        ordered_at=at,
        ordered_until=None if math.isinf(min(ends)) else min(ends),
    ), wanted


def _is_due(state: PolicyState, wanted: Levers, policy: Policy, at: float, end: float, *, at_once: bool) -> bool:
    """Whether to order this, until ``end``, which may be infinity.

    What is ordered already is renewed where half as long is left as a new order would have; or twice as long, since
    the policy's ``expires_in`` is another one by now.
    """
    life, left = end - at, (math.inf if state.ordered_until is None else state.ordered_until) - at
    renew = not wanted.idle and state.ordered_at is not None and not life / 2 <= left <= 2 * life
    if wanted == state.ordered and not renew:
        return False
    if at_once or state.ordered_step is None or state.level > state.ordered_level or renew:
        return True
    return (state.step or 0) - state.ordered_step >= policy.cooldown_steps


def _reason(level: int, fired: Sequence[Rule], drift: Drift) -> Reason:
    """Quote the first condition of the strongest rule that fired."""
    if not fired:
        return Reason(level, drift.step)
    condition = max(fired, key=lambda rule: rule.level).all[0]
    finding = condition.judge(drift)
    return Reason(
        risk_level=level,
        checkpoint_step=drift.step,
        metric=condition.metric,
        value=finding.value,
        baseline=finding.reference,
        threshold=condition.by if condition.by is not None else condition.sigmas,
    )


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
