"""The demo while it runs: a table that follows both arms, or a line now and then where nobody looks at a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rksp_core.policy import LEVELS
from rksp_monitor.demo.arm import Arm, Sample

LOOK_EVERY = 0.25  # seconds
SPEAK_EVERY = 10.0  # seconds between two lines where the output is no terminal
CATCH_UP = 10.0  # seconds the watchers get to judge the last profiles

ROWS: tuple[tuple[str, Callable[[Sample], str]], ...] = (
    ("step", lambda s: _number(s.step, "d")),
    ("loss", lambda s: _number(s.loss, ".3f")),
    ("gradient norm", lambda s: _number(s.gradient_norm, ".3g")),
    ("judged up to step", lambda s: _number(s.judged_step, ".0f")),
    ("near-unit mass (min)", lambda s: _number(s.mass, ".3f")),
    ("drift of near-unit mass", lambda s: _number(s.mass_drift, "+.3f")),
    ("drift of log Kreiss constant", lambda s: _number(s.kreiss_drift, "+.3f")),
    ("risk", lambda s: "-" if s.risk is None else LEVELS[int(s.risk)]),
    ("learning rate", lambda s: _number(s.learning_rate, ".3g")),
    ("KSS weight applied", lambda s: _number(s.applied, "g")),
    ("times it went back", lambda s: _number(s.backs, ".0f")),
    ("order given", lambda s: _number(s.desired_generation, ".0f")),
    ("order acknowledged", lambda s: _number(s.applied_generation, ".0f")),
)


def follow(arms: Sequence[Arm], console: Console) -> None:
    """Sample both arms until their trainers have ended and their watchers have caught up."""
    with Live(_table(arms), console=console, refresh_per_second=4, transient=True) as live:
        spoken, ended = time.monotonic(), None
        while True:
            for arm in arms:
                arm.look()
            live.update(_table(arms))
            now = time.monotonic()
            if not console.is_terminal and now - spoken >= SPEAK_EVERY:
                spoken = now
                console.print(" | ".join(f"{arm.name}: {_line(arm.samples[-1])}" for arm in arms), soft_wrap=True)
            if not any(arm.training for arm in arms):
                ended = ended or now
                if all(arm.caught_up for arm in arms) or now - ended > CATCH_UP:
                    return
            time.sleep(LOOK_EVERY)


def _table(arms: Sequence[Arm]) -> Table:
    table = Table(title="One unstable run, twice")
    table.add_column("")
    for arm in arms:
        table.add_column(f"{arm.name}{'' if arm.training else ' (ended)'}", justify="right", min_width=18)
    for heading, cell in ROWS:
        table.add_row(heading, *(cell(arm.samples[-1]) if arm.samples else "-" for arm in arms))
    return table


def _line(sample: Sample) -> str:
    risk = "-" if sample.risk is None else LEVELS[int(sample.risk)]
    step, loss, rate = _number(sample.step, "d"), _number(sample.loss, ".3f"), _number(sample.learning_rate, ".3g")
    return f"step {step}, loss {loss}, risk {risk}, learning rate {rate}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
