"""How things stand between a watcher, a trainer and a person: read from the files of a run, changing none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rksp_core.control import ORDER_FILE, ControlWriter
from rksp_core.errors import ConfigError, ControlError
from rksp_core.limits import Limits
from rksp_core.orders import Acknowledgement, Desired, Levers, seconds, timestamp
from rksp_core.policy import Hold, PolicyState
from rksp_monitor.config import RunSettings
from rksp_monitor.history import read_states
from rksp_monitor.hold import held_since, hold_file, read_hold
from rksp_monitor.orders import OWNER
from rksp_monitor.ownership import owner_of
from rksp_monitor.remote import is_local
from rksp_monitor.run import CONFIG, Run

SCHEMA = "rksp.standing/1"


@dataclass(frozen=True)
class Watcher:
    """Who watches a run. ``owner`` is what its file says, ``alive`` None where that cannot be known from here.

    ``enforces`` says whether it writes orders, as it said itself when it began, else as the settings say.
    """

    owner: str
    alive: bool | None
    enforces: bool


@dataclass(frozen=True)
class Standing:
    """All that is known: level and newest step judged, a person's hold, the last order, and the trainer's answer.

    ``other`` is who gives orders in the control folder where that is not this watcher: one with another state folder.
    """

    run: Run
    watcher: Watcher
    other: str
    level: int | None
    step: int | None
    hold: Hold | None
    since: float | None
    order: Desired | None
    delivered: bool
    answer: Acknowledgement | None

    @property
    def gap(self) -> int:
        """Generations between the last order and the one that the trainer obeys."""
        obeyed = self.answer.active_generation if self.answer is not None and self._ours(self.answer) else 0
        return 0 if self.order is None else max(0, self.order.generation - obeyed)

    def answered(self) -> bool:
        """Whether the trainer said anything to the last order."""
        answer, order = self.answer, self.order
        return answer is not None and order is not None and self._ours(answer) and answer.generation >= order.generation

    def expired(self, now: float) -> bool:
        """Whether the time of the last order is over."""
        ends = None if self.order is None else self.order.expires_at
        return ends is not None and seconds(ends) <= now

    @property
    def hindrance(self) -> str | None:
        """Why what a person asks for has no effect yet, as a sentence; None when it has at the watcher's next scan."""
        if not self.run.ledger.is_file():
            return (
                f"no watcher has kept a ledger in {self.run.ledger}, so nothing will happen until one does; name its "
                "--config or --state-dir if it lies elsewhere"
            )
        if self.other:
            return (
                f"another watcher, {self.other}, gives this trainer its orders, and keeps its ledger elsewhere; name "
                "its --config or --state-dir"
            )
        if self.watcher.alive is False:
            return "no watcher runs, so nothing will happen until one does"
        if not self.watcher.enforces:
            return "the watcher only observes, so the trainer will not be told; start it with --enforce"
        return None

    def _ours(self, answer: Acknowledgement) -> bool:
        return answer.run_id == self.run.name

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        hold = None if self.hold is None else self.hold.to_dict() | {"since": self.since}
        if hold is not None:
            hold |= {name: None if hold[name] is None else timestamp(hold[name]) for name in ("until", "since")}
        return {
            "schema": SCHEMA,
            "run": self.run.name,
            "folder": str(self.run.folder),
            "control": None if self.run.control is None else str(self.run.control),
            "ledger": str(self.run.ledger),
            "watcher": {
                "owner": self.watcher.owner or None,
                "alive": self.watcher.alive,
                "enforces": self.watcher.enforces,
            },
            "other_watcher": self.other or None,
            "level": self.level,
            "step": self.step,
            "hold": hold,
            "order": None if self.order is None else self.order.to_dict(),
            "delivered": self.delivered,
            "acknowledgement": None if self.answer is None else self.answer.to_dict(),
            "answered": self.answered(),
            "generation_gap": self.gap,
        }


def look(run: Run, settings: RunSettings, now: float) -> Standing:
    """Return how things stand at ``now``, in seconds since the epoch.

    Raises
    ------
    ConfigError, ControlError
        When the ledger or the hold cannot be read.
    """
    states = read_states(run.ledger, run.name)
    state = PolicyState.from_dict(states["policy"]) if "policy" in states else None
    known = Desired.from_dict(states["order"]) if "order" in states else None
    there = None if run.control is None else _order_in(run.control)
    order = max((each for each in (known, there) if each is not None), key=lambda each: each.generation, default=None)
    hold = hold_file(run.ledger)
    in_force = read_hold(hold, now)
    watcher = _watcher(run.ledger, states, settings)
    orderer, runs = ("", False) if run.control is None else owner_of(run.control / OWNER)
    return Standing(
        run=run,
        watcher=watcher,
        other=orderer if orderer != watcher.owner and runs is not False else "",
        level=None if state is None else state.level,
        step=None if state is None else state.step,
        hold=in_force,
        since=None if in_force is None else held_since(hold),
        order=order,
        delivered=order is not None and there is not None and there.generation == order.generation,
        answer=None if run.control is None else ControlWriter(run.control).applied(),
    )


def objection(run: Run, levers: Levers, rollback_to: int | None = None) -> str | None:
    """Return why the trainer would not do as it is told, as far as its configuration says; None when it would."""
    limits = _trainer_limits(run.folder)
    if limits is None:
        return None
    order = Desired(run.name, 1, levers.kss, **levers.beside)
    if rollback_to is not None and limits.rollbacks == 0:
        return "the order asks to go back, this trainer never does (limits.rollbacks)"
    return limits.refusal(order)


def _order_in(control: Path) -> Desired | None:
    try:
        return Desired.from_dict(json.loads((control / ORDER_FILE).read_bytes()))
    except (OSError, ValueError, RecursionError, ControlError):
        return None


def _watcher(ledger: Path, states: Mapping[str, Any], settings: RunSettings) -> Watcher:
    """Return who holds the ledger."""
    enforces = states.get("mode", {}).get("enforce", settings.enforce)
    owner, alive = owner_of(ledger)
    return Watcher(owner, alive, enforces)


def _trainer_limits(folder: Path) -> Limits | None:
    """Return what the trainer's own configuration says, if it does."""
    import yaml

    if not is_local(folder):
        return None
    try:
        limits = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["control"]["limits"]
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in limits.items()
        }
        return Limits(**given)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, ConfigError):
        return None
