"""A policy replay for a terminal: where two policies disagree, and what each came to."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from rksp_core.policy import LEVELS, Decision
from rksp_monitor.policy_replay import PolicyReplay, Sum
from rksp_monitor.printable import counted, printable
from rksp_monitor.report.columns import MISSING
from rksp_monitor.report.drawing import draw, table
from rksp_monitor.report.history import order_in_short

LISTED = 40  # events that are listed; JSON has all
SHORT = 2 * 3600.0  # seconds below which a run is told in minutes


def replay_table(replay: PolicyReplay, *, width: int = 120, colour: bool = False) -> str:
    """Return the sums, and the first `LISTED` events that differ."""
    differing, total = replay.differences, len(replay.steps)
    say = f"{len(differing)} decided otherwise" if differing else "all are decided as they were"
    title = Text(f"run {printable(replay.run)}: {counted(total, 'judged event')}, {say}")
    sums = table([("", False), ("was", True), ("would be", True)])
    for name, was, would in _sums(replay.was, replay.would):
        sums.add_row(name, was, would)
    if not differing:
        return draw([title, sums], sums, width, colour)
    headings = ("step", "kind", "was", "would be", "order was", "order would be", "because of")
    steps = table([(heading, heading == "step") for heading in headings])
    for step in differing[:LISTED]:
        held = step.was.hold is not None
        cells = (
            str(step.row.step),
            step.row.kind,
            LEVELS[step.was.level],
            LEVELS[step.would.level],
            "held" if held else _ordered(step.was),
            _ordered(step.would),
            _because(step.was, step.would),
        )
        steps.add_row(*map(Text, cells))
    parts: list[Table | Text] = [title, sums, Text(""), steps]
    if len(differing) > LISTED:
        parts.append(Text(f"and {len(differing) - LISTED} more; --format json has all"))
    return draw(parts, steps, width, colour)


def _sums(was: Sum, would: Sum) -> list[tuple[str, str, str]]:
    unit, length, decimals = ("hours", 3600.0, 2) if sum(was.seconds) >= SHORT else ("minutes", 60.0, 1)
    rows = [
        (
            f"{level}: events, {unit}",
            *(f"{each.events[index]}, {each.seconds[index] / length:.{decimals}f}" for each in (was, would)),
        )
        for index, level in enumerate(LEVELS)
    ]
    rows.append(("orders", str(was.orders), str(would.orders)))
    alarms = (MISSING if each.first_alarm is None else str(each.first_alarm) for each in (was, would))
    return [(name, one, other) for name, one, other in [*rows, ("first alarm at step", *alarms)]]


def _because(was: Decision, would: Decision) -> str:
    """Return the rules that fired in one and not in the other; with the same rules, memory made the difference."""
    only = [f"+{name}" for name in would.fired if name not in was.fired]
    only += [f"-{name}" for name in was.fired if name not in would.fired]
    return " ".join(only) or "what came before"


def _ordered(decision: Decision) -> str:
    """Return an order in a few letters: alpha, what lies beside it, and whereto the trainer is sent back."""
    levers = decision.order
    if levers is None:
        return MISSING
    return order_in_short({"alpha": levers.alpha, **levers.beside}, decision.rollback_to)
