"""Alarm rules as data, and what they do to a run. Each says what a rule of `rksp_core.policy` says, of more figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from training.experiments.early_warning.series import FORMS, PLACES, Form, Series

Direction = Literal["falls", "rises"]


@dataclass(frozen=True)
class Clause:
    """One comparison, as `rksp_core.policy.Condition`.

    ``form`` is its ``against``, or ``sigmas`` for sigmas against the trailing average. ``by`` is what the figure must
    rise or fall by; of an ``absolute`` one, the value that it must exceed or fall below.
    """

    metric: str
    form: Form
    direction: Direction
    by: float

    def __post_init__(self) -> None:
        if self.metric not in PLACES or self.form not in FORMS or self.direction not in ("falls", "rises"):
            raise ValueError(f"no clause is about {self.metric!r}, {self.form!r}, {self.direction!r}")

    def fires(self, run: Series) -> np.ndarray:
        """Return at which events it holds; an unknown value never does."""
        values, sign = run.forms[self.form][:, PLACES[self.metric]], 1.0 if self.direction == "rises" else -1.0
        least = sign * self.by if self.form == "absolute" else self.by
        with np.errstate(invalid="ignore"):
            return np.asarray(sign * values > least)

    def __str__(self) -> str:
        """Return e.g. ``loss rises by 0.2 (trailing)``."""
        if self.form == "absolute":
            return f"{self.metric} {'above' if self.direction == 'rises' else 'below'} {self.by:.3g}"
        return f"{self.metric} {self.direction} by {self.by:.3g} ({self.form})"


@dataclass(frozen=True)
class Rule:
    """A conjunction, armed at a step, that must hold at ``in_a_row`` events."""

    all: tuple[Clause, ...]
    arm_after_step: int
    in_a_row: int = 1

    def fires(self, run: Series) -> np.ndarray:
        """Return at which events it gives an alarm."""
        held = np.all([clause.fires(run) for clause in self.all], axis=0) & (run.steps >= self.arm_after_step)
        fired = held.copy()
        for back in range(1, self.in_a_row):
            fired[back:] &= held[:-back]
            fired[:back] = False
        return fired

    def __str__(self) -> str:
        """Return the conditions, and when they count."""
        more = f", {self.in_a_row} in a row" if self.in_a_row > 1 else ""
        return f"{' and '.join(map(str, self.all))}, from step {self.arm_after_step}{more}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Rule:
        """Read the JSON form."""
        clauses = tuple(Clause(**each) for each in document["all"])
        return cls(clauses, document["arm_after_step"], document["in_a_row"])


def first_alarm(rules: Sequence[Rule], run: Series) -> int | None:
    """Return the step of the first alarm that any of the rules gives."""
    fired = np.any([rule.fires(run) for rule in rules], axis=0) if rules else np.zeros(len(run.steps), dtype=bool)
    return int(run.steps[np.argmax(fired)]) if fired.any() else None


def _both(metric: str, by: float) -> Rule:
    return Rule(
        (Clause("near_unit_mass_min", "trailing", "falls", 0.0475), Clause(metric, "trailing", "rises", by)), 60
    )


# What the policy had before: from a task that was not learned, and thresholds that nothing was measured for.
PROTOTYPE = (
    _both("log_henrici_max", 1.22),
    _both("log_kreiss_mean", 0.7),
    Rule((Clause("near_unit_mass_min", "trailing", "falls", 0.15),), 60),
    Rule((Clause("log_kreiss_mean", "trailing", "rises", 1.0),), 60),
)

# What takes a run back in the experiments of training.experiments.rescue, beside figures that are not finite: chosen on
# the screens of remedies, not on these runs.
RESCUE = (
    Rule((Clause("gradient_norm", "trailing", "rises", 20.0),), 50),
    Rule((Clause("loss", "trailing", "rises", 1.0),), 50),
    Rule((Clause("gradient_norm", "absolute", "rises", 500.0),), 0),
    Rule((Clause("loss", "absolute", "rises", 50.0),), 0),
)
