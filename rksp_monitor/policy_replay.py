"""What another policy would have decided about a history: the stored evidence, judged again in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rksp_core.errors import ConfigError, RkspError
from rksp_core.policy import LEVELS, Decision, Evidence, Policy, replay_decisions
from rksp_monitor.history import History, Row

SCHEMA = "rksp.policy-replay/1"


@dataclass(frozen=True)
class Step:
    """One judged event: what was decided then, and what would have been."""

    row: Row
    at: float
    was: Decision
    would: Decision

    @property
    def differs(self) -> bool:
        """Whether the level or the order is another one; what a person's hold ordered is no policy's doing."""
        held = self.was.hold is not None
        was, would = ((each.order, each.rollback_to) for each in (self.was, self.would))
        return self.was.level != self.would.level or (not held and was != would)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        names = ("level", "fired", "order", "rollback_to")
        documents = (each.to_dict() for each in (self.was, self.would))
        was, would = ({name: each[name] for name in names if name in each} for each in documents)
        held = self.was.hold is not None
        return {"kind": self.row.kind, "step": self.row.step, "was": was, "would": would, "held": held}


@dataclass(frozen=True)
class Sum:
    """What a policy came to over a history.

    ``seconds`` and ``events`` at each level, ``orders`` given, and the step of the first event above level 0.
    """

    seconds: tuple[float, ...]
    events: tuple[int, ...]
    orders: int
    first_alarm: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "seconds": dict(zip(LEVELS, self.seconds, strict=True)),
            "events": dict(zip(LEVELS, self.events, strict=True)),
            "orders": self.orders,
            "first_alarm_step": self.first_alarm,
        }


@dataclass(frozen=True)
class PolicyReplay:
    """The judged events of a history, and what two policies made of them."""

    run: str
    steps: tuple[Step, ...]

    @property
    def differences(self) -> list[Step]:
        """The events about which they disagree."""
        return [step for step in self.steps if step.differs]

    @property
    def was(self) -> Sum:
        """What was decided, in sum."""
        return _sum(self.steps, [step.was for step in self.steps])

    @property
    def would(self) -> Sum:
        """What would have been."""
        return _sum(self.steps, [step.would for step in self.steps])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": SCHEMA,
            "run": self.run,
            "events": len(self.steps),
            "differences": [step.to_dict() for step in self.differences],
            "was": self.was.to_dict(),
            "would": self.would.to_dict(),
        }


def replay(history: History, policy: Policy) -> PolicyReplay:
    """Judge every event of a history again.

    Raises
    ------
    ConfigError
        When it holds no evidence, or evidence that cannot be read.
    """
    rows: list[Row] = []
    evidences: list[Evidence] = []
    decisions: list[Decision] = []
    for row in history.rows():
        if row.evidence is None or row.decision is None:
            continue
        try:
            evidences.append(Evidence.from_dict(row.evidence))
            decisions.append(Decision.from_dict(row.decision))
        except (RkspError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"the evidence of step {row.step} in {history.source} cannot be read ({error!r}); export the history "
                "again with `rksp history --all --format json`"
            ) from error
        rows.append(Row(row.kind, row.step, row.status, set_aside=row.set_aside))  # without its profile
    if not evidences:
        raise ConfigError(
            f"{history.source} holds no evidence to judge again; it is kept for what a watcher of this version judges"
        )
    again = replay_decisions(evidences, policy)
    steps = zip(rows, (each.at for each in evidences), decisions, again, strict=True)
    return PolicyReplay(history.run, tuple(Step(*step) for step in steps))


def _sum(steps: Sequence[Step], decisions: Sequence[Decision]) -> Sum:
    """Count; a level holds from its event to the next one."""
    seconds, events = [0.0] * len(LEVELS), [0] * len(LEVELS)
    for decision in decisions:
        events[decision.level] += 1
    for (step, after), decision in zip(itertools.pairwise(steps), decisions, strict=False):
        seconds[decision.level] += max(0.0, after.at - step.at)
    orders = sum(decision.order is not None for decision in decisions)
    alarm = next((step.row.step for step, each in zip(steps, decisions, strict=True) if each.level > 0), None)
    return Sum(tuple(seconds), tuple(events), orders, alarm)
