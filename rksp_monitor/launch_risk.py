"""What `rksp preflight` asks of a risk model, and how it says the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rksp_core.launch import Launch

if TYPE_CHECKING:
    from rksp_core.lookahead import LookAhead
    from rksp_core.risk_model import Risk, SafeRate
    from rksp_monitor.preflight import Settings

SPAN, TRIED = 32.0, 11  # rates from 1/32 of the planned one to 32 times, a factor of 2 apart to begin with

NO_MODEL = (
    "no risk model was given (--risk-model, made by `rksp calibrate`): what the baselines say is a score, not a "
    "probability; larger means riskier, and only within one kind of model"
)
NO_LAUNCH = "the probability needs the planned learning rate (--lr) and a look-ahead, and there is none"


def launch_of(ahead: LookAhead | str | None, settings: Settings, *, depth: int, width: int) -> Launch | None:
    """Return the launch that is asked about, or None without a look-ahead."""
    if ahead is None or isinstance(ahead, str) or settings.learning_rate is None:
        return None
    return Launch.of(
        ahead,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        optimizer=settings.optimizer,
        depth=settings.depth or depth,
        width=width,
    )


def suggest(settings: Settings, launch_at: Callable[[float], Launch]) -> SafeRate:
    """Return the learning rate at which the risk crosses the threshold, looked for around the planned one."""
    if settings.risk_model is None or settings.threshold is None or settings.learning_rate is None:
        raise ValueError("a rate is suggested by a risk model, for a threshold, around a planned rate")
    rates = [float(rate) for rate in settings.learning_rate * np.geomspace(1 / SPAN, SPAN, TRIED)]
    return settings.risk_model.safe_rate(launch_at, rates, settings.threshold)


def risk_document(
    settings: Settings, launch: Launch | None, risk: Risk | None, safe: SafeRate | None
) -> dict[str, Any]:
    """Return the section ``risk`` of the report, without the baselines."""
    model = settings.risk_model
    reason = NO_MODEL if model is None else NO_LAUNCH if risk is None else risk.outside or None
    return {
        "divergence_probability": None if risk is None else risk.probability,
        "interval": None if risk is None or risk.interval is None else list(risk.interval),
        "reason": reason,
        "contributions": {} if risk is None else dict(risk.reasons),
        "suggested_learning_rate": None
        if safe is None
        else dataclasses.asdict(safe) | {"interval": list(safe.interval)},
        "model": None
        if model is None
        else {
            "sha256": model.sha256,
            "horizon": model.horizon,
            "look_ahead_steps": model.look_ahead_steps,
            "about": dict(model.about),
        },
        "launch": None if launch is None else launch.to_dict(),
    }


def in_words(safe: SafeRate) -> str:
    """Return one sentence on the rate that was looked for."""
    wanted = f"the learning rate at which the risk reaches {safe.threshold:.0%}"
    if safe.rate is None:
        side = f"below {safe.lowest:.3g}" if safe.crossed else f"above {safe.highest:.3g}"
        return f"{wanted} is {side}, beyond the rates that were tried"
    low, high = safe.interval
    ends = (
        f"below {safe.lowest:.3g}" if low is None else f"{low:.3g}",
        f"above {safe.highest:.3g}" if high is None else f"{high:.3g}",
    )
    return f"{wanted} is {safe.rate:.3g} ({ends[0]} to {ends[1]})"
