"""What the drift of a run asks for: a risk level, and an order to the trainer when one is due. Pure.

    state, decision = decide(state, Evidence(drift, at), policy)

Rules fire on one event; the level moves only when events in a row agree (hysteresis); orders keep a distance
(cool-down) and are renewed before they expire. Time enters as a value, so a decision can be replayed exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from rksp_core.drift import FEATURES, Drift
from rksp_core.errors import ConfigError
from rksp_core.orders import Levers, Reason, is_number, is_whole

LEVELS = ("ok", "elevated", "high", "critical")
FOR_EVER = 1e9  # seconds, 31 years: a longer time ends where no calendar goes


@dataclass(frozen=True)
class Condition:
    """One comparison: ``metric`` (of `rksp_core.drift.FEATURES`) falls or rises by more than ``by``.

    ``against`` is the run's trailing average, its baseline, or ``absolute``: then the value itself must lie above
    ``by`` (rises) or below it (falls). An unknown value never fires.
    """

    metric: str
    by: float
    against: Literal["trailing", "baseline", "absolute"] = "trailing"
    direction: Literal["falls", "rises"] = "rises"

    def __post_init__(self) -> None:
        if self.metric not in FEATURES:
            near = get_close_matches(self.metric, FEATURES, 1, 0.0)[0]
            raise ConfigError(f"a rule names the unknown metric {self.metric!r}; did you mean {near!r}?")
        if not is_number(self.by):
            raise ConfigError(f"a rule about {self.metric}: by must be a finite number, got {self.by!r}; correct it")

    def holds(self, drift: Drift) -> bool:
        """Whether the comparison is true of this event."""
        value, reference = drift.values.get(self.metric), self.reference(drift)
        if value is None or reference is None:
            return False
        if self.against == "absolute":
            return value > self.by if self.direction == "rises" else value < self.by
        moved = value - reference
        return moved > self.by if self.direction == "rises" else -moved > self.by

    def reference(self, drift: Drift) -> float | None:
        """Return the number that the value is compared with."""
        if self.against == "absolute":
            return self.by
        return (drift.trailing if self.against == "trailing" else drift.baseline).get(self.metric)


@dataclass(frozen=True)
class Rule:
    """A conjunction: it proposes ``level`` (1 elevated, 2 high, 3 critical) when ``all`` its conditions hold."""

    name: str
    level: int
    all: tuple[Condition, ...]
    arm_after_step: int = 0

    def __post_init__(self) -> None:
        if self.level not in (1, 2, 3):
            raise ConfigError(f"rule {self.name!r}: level must be 1, 2 or 3, got {self.level!r}; correct the rule")
        if not self.all:
            raise ConfigError(f"rule {self.name!r} has no condition, so it would always fire; add one under `all`")

    def fires(self, drift: Drift) -> bool:
        """Whether the rule is armed at this step and every condition holds."""
        return drift.step >= self.arm_after_step and all(condition.holds(drift) for condition in self.all)


# Healthy learning moves these numbers too, so every threshold is advisory. The first conjunction was the best alarm of
# a prototype (small networks without normalization, profiles every 10 steps; on runs not used to choose it 5-7 of 8
# divergences caught, 2-5 false alarms on 15 healthy runs). The other drift thresholds are round figures, not measured.
DEFAULT_RULES = (
    Rule(
        "mass_falls_and_henrici_rises",
        2,
        (Condition("near_unit_mass_min", 0.0475, direction="falls"), Condition("log_henrici_max", 1.22)),
        arm_after_step=60,
    ),
    Rule(
        "mass_falls_and_kreiss_rises",
        2,
        (Condition("near_unit_mass_min", 0.0475, direction="falls"), Condition("log_kreiss_mean", 0.7)),
        arm_after_step=60,
    ),
    Rule("mass_falls", 1, (Condition("near_unit_mass_min", 0.15, direction="falls"),), arm_after_step=60),
    Rule("kreiss_rises", 1, (Condition("log_kreiss_mean", 1.0),), arm_after_step=60),
    Rule("gradient_norm_is_large", 3, (Condition("gradient_norm", 500.0, "absolute"),)),
    Rule("loss_is_large", 3, (Condition("loss", 50.0, "absolute"),)),
    Rule("activations_not_finite", 3, (Condition("not_finite_layers", 0.0, "absolute"),)),
    Rule("loss_or_gradient_not_finite", 3, (Condition("not_finite_figures", 0.0, "absolute"),)),
)

# A level that is not listed takes the entry of the next lower one that is; level 0 without an entry is off.
DEFAULT_LADDER = {0: Levers(), 2: Levers(alpha=0.15)}


@dataclass(frozen=True)
class Policy:
    """When the level moves, and what each level orders.

    ``raise_after`` and ``clear_after`` are the events in a row that raise or lower the level; ``cooldown_steps`` the
    least distance between two orders (a higher level than the one last answered never waits); ``expires_in`` the
    seconds an order holds, None for ever: it is renewed by the first event after half that time.
    """

    rules: tuple[Rule, ...] = DEFAULT_RULES
    raise_after: int = 1
    clear_after: int = 5
    cooldown_steps: int = 100
    expires_in: float | None = 86400.0
    ladder: Mapping[int, Levers] = field(default_factory=lambda: dict(DEFAULT_LADDER))

    def __post_init__(self) -> None:
        for name, least in (("raise_after", 1), ("clear_after", 1), ("cooldown_steps", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise ConfigError(f"policy.{name} must be at least {least}, got {value}; correct it")
        if self.expires_in is not None and not (is_number(self.expires_in) and 0 < self.expires_in <= FOR_EVER):
            raise ConfigError(
                f"policy.expires_in must be above 0 seconds and at most {FOR_EVER:g}, or null, got {self.expires_in}; "
                "correct it"
            )
        unknown = [level for level in self.ladder if level not in range(4)]
        if unknown:
            raise ConfigError(f"policy.ladder has the level {unknown[0]}; levels are 0 ok, 1, 2 and 3 critical")

    def levers(self, level: int) -> Levers:
        """Return what a level asks for."""
        listed = [step for step in self.ladder if step <= level]
        return self.ladder[max(listed)] if listed else Levers()


@dataclass(frozen=True)
class Evidence:
    """One judged event; ``at`` is in seconds since the epoch, as the caller's clock says."""

    drift: Drift
    at: float = 0.0


@dataclass(frozen=True)
class PolicyState:
    """What the policy remembers: the level, the newest step, the last proposals, and the order that holds."""

    level: int = 0
    step: int | None = None
    proposals: tuple[int, ...] = ()
    ordered: Levers = field(default_factory=Levers)
    ordered_level: int = 0
    ordered_step: int | None = None
    ordered_at: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> PolicyState:
        """Read the JSON form; one of a time when an order set the regularizer alone lacks the levers beside it."""
        values = dict(document)
        values["proposals"] = tuple(values["proposals"])
        values["ordered"] = Levers(**values["ordered"])
        return cls(**values)


@dataclass(frozen=True)
class Decision:
    """The outcome of one event: the level that holds, the rules that fired, and the order that is due, if any.

    ``late`` marks an event that came after a newer one: it decided nothing.
    """

    level: int
    previous_level: int
    fired: tuple[str, ...]
    order: Levers | None
    reason: Reason
    late: bool = False


def decide(state: PolicyState, evidence: Evidence, policy: Policy) -> tuple[PolicyState, Decision]:
    """Judge one event.

    An event older than one already judged (of its own series or another) is no evidence about now: it changes nothing.
    """
    drift = evidence.drift
    if drift.late or (state.step is not None and drift.step < state.step):
        return state, Decision(state.level, state.level, (), None, Reason(state.level, drift.step), late=True)
    fired = [rule for rule in policy.rules if rule.fires(drift)]
    keep = max(policy.raise_after, policy.clear_after)
    proposals = (*state.proposals, max((rule.level for rule in fired), default=0))[-keep:]
    level = _level(state.level, proposals, policy)
    reason = _reason(level, fired, drift)
    order = policy.levers(level) if _order_is_due(state, level, evidence, policy) else None
    after = dataclasses.replace(state, level=level, step=drift.step, proposals=proposals)
    if order is not None:
        after = dataclasses.replace(
            after, ordered=order, ordered_level=level, ordered_step=drift.step, ordered_at=evidence.at
        )
    return after, Decision(level, state.level, tuple(rule.name for rule in fired), order, reason)


def _level(level: int, proposals: tuple[int, ...], policy: Policy) -> int:
    """Rise to what the last ``raise_after`` proposals all support; fall to the worst of the last ``clear_after``."""
    rising, falling = proposals[-policy.raise_after :], proposals[-policy.clear_after :]
    if len(rising) == policy.raise_after and min(rising) > level:
        return min(rising)
    if len(falling) == policy.clear_after and max(falling) < level:
        return max(falling)
    return level


def _order_is_due(state: PolicyState, level: int, evidence: Evidence, policy: Policy) -> bool:
    wanted = policy.levers(level)
    renew = (
        not wanted.idle
        and policy.expires_in is not None
        and state.ordered_at is not None
        and evidence.at - state.ordered_at > policy.expires_in / 2
    )
    if wanted == state.ordered and not renew:
        return False
    if state.ordered_step is None or level > state.ordered_level or renew:
        return True
    return evidence.drift.step - state.ordered_step >= policy.cooldown_steps


def _reason(level: int, fired: list[Rule], drift: Drift) -> Reason:
    """Quote the first condition of the strongest rule that fired."""
    if not fired:
        return Reason(level, drift.step)
    condition = max(fired, key=lambda rule: rule.level).all[0]
    return Reason(
        risk_level=level,
        checkpoint_step=drift.step,
        metric=condition.metric,
        value=drift.values.get(condition.metric),
        baseline=None if condition.against == "absolute" else condition.reference(drift),
        threshold=condition.by,
    )
