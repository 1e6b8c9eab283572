"""``rksp control status|hold|set|release RUN_FOLDER``: a person's word over the policy's, and how things stand.

Files only: the watcher finds them at its next scan, or when it starts.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rksp_core.errors import ConfigError
from rksp_core.orders import Variant
from rksp_monitor.commands.one_run import ConfigFile, RunId, StateDir, one_run
from rksp_monitor.printable import printable

if TYPE_CHECKING:
    from rksp_core.orders import Levers
    from rksp_core.policy import Hold
    from rksp_monitor.config import RunEntry, RunSettings
    from rksp_monitor.run import Run
    from rksp_monitor.standing import Standing

control = typer.Typer(no_args_is_help=True, help="See or take over what a watcher orders its trainer to do.")

RunFolder = Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="The folder of the run, or its URL.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept with every decision of that time.")]
For = Annotated[str | None, typer.Option("--for", metavar="TIME", help="How long: 90s, 30m, 2h or 1d.")]
Until = Annotated[
    str | None, typer.Option(metavar="MOMENT", help="Until when: 2031-05-20T18:00, UTC unless it says otherwise.")
]

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@control.command()
def status(
    run_folder: RunFolder,
    form: Annotated[Literal["table", "json"], typer.Option("--format", help="Of the answer.")] = "table",
    config: ConfigFile = None,
    state_dir: StateDir = None,
    run_id: RunId = None,
) -> int:
    """Say who watches, the risk level, what was ordered and by whom, and what the trainer answered."""
    from rksp_monitor.history import no_ledger
    from rksp_monitor.standing import look

    run, settings = one_run(run_folder, config, state_dir, run_id)
    if not run.ledger.is_file():
        raise no_ledger(run.ledger)
    now = time.time()
    standing = look(run, settings, now)
    if form == "json":
        print(json.dumps(standing.to_dict(), indent=1, allow_nan=False))
    else:
        for name, text in _lines(standing, now):
            print(f"{name:9} {printable(text)}")
    return 0


@control.command()
def hold(
    run_folder: RunFolder,
    reason: Reason,
    period: For = None,
    until: Until = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    run_id: RunId = None,
) -> int:
    """Let the policy give no orders; what was ordered last goes on until its time is over."""
    return _ask(run_folder, None, reason, period, until, config, state_dir, run_id)


@control.command("set")
def set_(
    run_folder: RunFolder,
    reason: Reason,
    alpha: Annotated[float, typer.Option(help="Weight of KSS, at least 0; 0 is off.")],
    interval: Annotated[int | None, typer.Option(help="Steps between two KSS terms, at least 1.")] = None,
    layer_fraction: Annotated[float | None, typer.Option(help="Share of layers in a term, in (0, 1].")] = None,
    gamma: Annotated[float | None, typer.Option(help="Target of the near-unit mass, 0 to 1.")] = None,
    variant: Annotated[Variant | None, typer.Option(help="Form of the unstable term.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; default: the trainer's own.")] = None,
    learning_rate_scale: Annotated[
        float | None, typer.Option(help="Factor on the trainer's schedule; default: none.")
    ] = None,
    surprise: Annotated[
        float | None, typer.Option(help="How surprising a gradient may be to Adam; default: the trainer's own.")
    ] = None,
    rollback_to: Annotated[
        int | None, typer.Option(min=0, help="Go back, once, to the newest checkpoint at or before this step.")
    ] = None,
    period: For = None,
    until: Until = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    run_id: RunId = None,
) -> int:
    """Order this in the policy's place; what is left out is the default, or the trainer's own."""
    from rksp_core.orders import Levers

    given: dict[str, Any] = {
        "alpha": alpha,
        "interval": interval,
        "layer_fraction": layer_fraction,
        "gamma": gamma,
        "variant": variant,
        "clip": clip,
        "learning_rate_scale": learning_rate_scale,
        "surprise": surprise,
    }
    levers = Levers(**{name: value for name, value in given.items() if value is not None})
    return _ask(run_folder, levers, reason, period, until, config, state_dir, run_id, rollback_to)


@control.command()
def release(run_folder: RunFolder, config: ConfigFile = None, state_dir: StateDir = None, run_id: RunId = None) -> int:
    """End what `hold` or `set` began: the policy orders what its level asks for."""
    from rksp_monitor.hold import hold_file, remove_hold

    run, settings = _existing(run_folder, config, state_dir, run_id)
    if not remove_hold(hold_file(run.ledger)):
        print(printable(f"run {run.name} was not held"))
        return 0
    print(printable(f"run {run.name} is the policy's again"))
    _warn(run, settings)
    return 0


def _existing(folder: str, config: Path | None, state_dir: Path | None, run_id: str | None) -> tuple[Run, RunEntry]:
    """Return the run as `one_run` does; a hold must not be left where no watcher will look for it."""
    from rksp_monitor.history import no_ledger

    run, settings = one_run(folder, config, state_dir, run_id)
    if not run.folder.is_dir():
        raise ConfigError(f"there is no run folder {folder}")
    if not run.ledger.parent.is_dir():  # a watcher makes it when it starts for the first time
        raise no_ledger(run.ledger)
    return run, settings


def _ask(
    folder: str,
    levers: Levers | None,
    reason: str,
    period: str | None,
    until: str | None,
    config: Path | None,
    state_dir: Path | None,
    run_id: str | None,
    rollback_to: int | None = None,
) -> int:
    """Write a hold, and say what will come of it."""
    from rksp_core.policy import Hold
    from rksp_monitor.hold import hold_file, write_hold
    from rksp_monitor.standing import objection

    now = time.time()
    end = _end(period, until, now)
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, for whoever finds the run like this")
    run, settings = _existing(folder, config, state_dir, run_id)
    refusal = None if levers is None else objection(run, levers, rollback_to)
    if refusal is not None:
        raise ConfigError(f"nothing is ordered, as the trainer would reject it: {refusal}")
    asked = Hold(levers, end, _user(), reason, rollback_to)
    write_hold(hold_file(run.ledger), asked, now)
    print(printable(f"run {run.name} is held: {_hold_line(asked, now, now)}"))
    _warn(run, settings)
    return 0


def _warn(run: Run, settings: RunSettings) -> None:
    """Say on stderr why nothing will happen yet."""
    from rksp_monitor.standing import look

    problem = look(run, settings, time.time()).hindrance
    if problem:
        print(f"rksp: {printable(problem)}", file=sys.stderr)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose users have no names
        return f"user {os.geteuid()}"


def _end(period: str | None, until: str | None, now: float) -> float | None:
    """Return when it ends, in seconds since the epoch; None until it is released."""
    if period is not None and until is not None:
        raise ConfigError("--for and --until say the same; give one of them")
    if period is not None:
        return now + duration(period)
    if until is None:
        return None
    from rksp_core.orders import seconds

    try:
        end = seconds(until)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--until takes a moment such as 2031-05-20T18:00, got {until!r}") from error
    if end <= now:
        raise ConfigError(f"--until must lie ahead, got {until}: {_ago(now - end)} (UTC unless it says otherwise)")
    return end


def duration(text: str) -> float:
    """Return a length of time such as 90s, 30m, 2h or 1d in seconds, above 0 and at most 31 years.

    Raises
    ------
    ConfigError
        When it is none.
    """
    from rksp_core.policy import FOR_EVER

    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])", text.strip())
    length = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < length <= FOR_EVER:
        raise ConfigError(f"a length of time is a number and s, m, h or d, such as 90s or 2h, got {text!r}")
    return length


# -- words


def _lines(standing: Standing, now: float) -> Iterator[tuple[str, str]]:
    """Yield how things stand, as (what, how)."""
    from rksp_core.policy import LEVELS

    run, watcher = standing.run, standing.watcher
    yield "run", f"{run.name}, in {run.folder}"
    state = {True: "", False: ", which runs no more", None: ", which cannot be looked up from here"}[watcher.alive]
    mode = "enforces" if watcher.enforces else "only observes"
    yield "watcher", f"{watcher.owner}{state}, {mode}" if watcher.owner else "none runs"
    if standing.other:
        yield "orders", f"come from {standing.other}, a watcher that keeps its ledger elsewhere"
    judged = "" if standing.step is None else f", at step {standing.step}"
    yield "level", "unknown: nothing was judged yet" if standing.level is None else LEVELS[standing.level] + judged
    yield "hold", "none" if standing.hold is None else _hold_line(standing.hold, standing.since, now)
    yield "order", _order_line(standing, now)
    yield "answer", _answer_line(standing, now)
    if standing.hold is not None and standing.hindrance:
        yield "note", standing.hindrance


def _hold_line(hold: Hold, since: float | None, now: float) -> str:
    from rksp_core.orders import timestamp

    what = "the policy gives no orders"
    if hold.levers is not None:
        what = f"ordered is {_levers_line(hold.levers)}{_back(hold.rollback_to)}"
    end = (
        "until it is released"
        if hold.until is None
        else f"until {timestamp(hold.until)} (in {_span(hold.until - now)})"
    )
    began = "" if since is None or since >= now else f" {_ago(now - since)}"
    return f"{what}, {end}; by {hold.by or 'nobody named'}{began}: {hold.reason or 'no reason given'}"


def _levers_line(levers: Levers) -> str:
    if levers.idle:
        return "nothing: KSS off, and all else the trainer's own"
    shares = f"every {levers.interval} steps on {levers.layer_fraction:g} of the layers, gamma {levers.gamma:g}"
    variant = f", {levers.variant}" if levers.variant else ""
    parts = [f"KSS {levers.alpha:g} ({shares}{variant})" if levers.alpha > 0 else "KSS off"]
    beside = {name.replace("learning_rate_", "learning-rate "): value for name, value in levers.beside.items()}
    return ", ".join([*parts, *(f"{name} {value:g}" for name, value in beside.items() if value is not None)])


def _order_line(standing: Standing, now: float) -> str:
    from rksp_core.orders import seconds

    order = standing.order
    if order is None:
        return "none was given"
    age = f", {_ago(now - seconds(order.issued_at))}" if order.issued_at else ""
    notes = [
        "its time is over: KSS is off" if standing.expired(now) else "",
        "" if standing.delivered else "the control folder has not got it yet",
    ]
    asked = f"{_levers_line(order.levers)}{_back(order.rollback_to)}"
    return "; ".join([f"{order.generation}{age}: {asked}", *filter(None, notes)])


def _back(step: int | None) -> str:
    return "" if step is None else f", back to the checkpoint at or before step {step}"


def _answer_line(standing: Standing, now: float) -> str:
    from rksp_core.orders import seconds

    answer = standing.answer
    if answer is None:
        return "the trainer has not said anything"
    told = f"{answer.status} {answer.generation} at step {answer.step}, {_ago(now - seconds(answer.at))}"
    message = f" ({answer.message})" if answer.message else ""
    if answer.run_id != standing.run.name:
        return f"{told}{message}, by the trainer of {answer.run_id!r}, which is another run"
    active = f"; in force is {answer.active_generation}: {_levers_line(answer.active)}"
    behind = "" if standing.answered() else "; nothing yet about the last order"
    return f"{told}{message}{active}{behind}"


def _ago(length: float) -> str:
    return f"{_span(length)} ago" if length >= 0 else f"in {_span(-length)}"


def _span(length: float) -> str:
    """Return a length of time in its two largest units: 2 h 5 min."""
    whole = round(length)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"
