"""What `rksp preflight` asks of a risk model, and how it says the answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rksp_core.launch import Launch
from rksp_monitor.baselines import STEPS

if TYPE_CHECKING:
    from rksp_core.lookahead import LookAhead
    from rksp_core.risk_model import Risk, RiskModel, SafeRate
    from rksp_monitor.preflight import Settings

TRIED = tuple(3.0**power for power in range(-3, 4))  # times the planned rate, to begin with

NO_MODEL = (
    "no risk model was asked (--risk-model none, or other --look-ahead-steps than it was calibrated on): what the "
    "baselines say is a score, not a probability; larger means riskier, and only within one kind of model"
)
NO_LAUNCH = "the probability needs the planned learning rate (--lr) and a look-ahead, and there is none"


def look_ahead_steps(settings: Settings, *, depth: int, width: int) -> int | None:
    """Return how many steps the look-ahead takes: those of the risk models, where they may cover the model at all."""
    covered = [
        model.look_ahead_steps
        for model in settings.risk_models
        if model.covers(optimizer=settings.optimizer, depth=settings.depth or depth, width=width)
    ]
    return settings.steps or max(covered, default=None)


def launch_of(ahead: LookAhead | str | None, settings: Settings, *, depth: int, width: int) -> Launch | None:
    """Return the launch that is asked about, or None without a look-ahead."""
    if ahead is None or isinstance(ahead, str) or settings.learning_rate is None:
        return None
    return Launch.of(
        ahead,
        steps=settings.steps or STEPS,
        learning_rate=settings.learning_rate,
        optimizer=settings.optimizer,
        depth=settings.depth or depth,
        width=width,
        clipped=settings.clipped,
    )


def suggest(settings: Settings, launch_at: Callable[[float], Launch]) -> SafeRate:
    """Return the learning rate at which the first of the risks crosses the threshold, around the planned one."""
    if not settings.risk_models or settings.threshold is None or settings.learning_rate is None:
        raise ValueError("a rate is suggested by a risk model, for a threshold, around a planned rate")
    rates = [settings.learning_rate * times for times in TRIED]
    launches = cache(launch_at)  # the models begin with the same rates
    found = [model.safe_rate(launches, rates, settings.threshold) for model in settings.risk_models]
    return min(found, key=_smallest)


def _smallest(safe: SafeRate) -> float:
    return (0.0 if safe.crossed else math.inf) if safe.rate is None else safe.rate


def risk_document(
    settings: Settings, launch: Launch | None, risks: Sequence[Risk], safe: SafeRate | None
) -> dict[str, Any]:
    """Return the section ``risk`` of the report, without the baselines.

    What stands at its top is of the first model, which is that of divergence.
    """
    said: Sequence[Risk | None] = risks or [None] * len(settings.risk_models)
    outcomes = [_of_one(model, risk) for model, risk in zip(settings.risk_models, said, strict=True)]
    reason = NO_LAUNCH if launch is None else NO_MODEL if not risks else risks[0].outside or None
    nothing: dict[str, Any] = {"probability": None, "interval": None, "contributions": {}, "model": None}
    first = outcomes[0] if outcomes else nothing
    return {
        "divergence_probability": first["probability"],
        "reason": reason,
        **{name: first[name] for name in ("interval", "contributions", "model")},
        "outcomes": outcomes,
        "suggested_learning_rate": None
        if safe is None
        else dataclasses.asdict(safe) | {"interval": list(safe.interval)},
        "launch": None if launch is None else launch.to_dict(),
    }


def _of_one(model: RiskModel, risk: Risk | None) -> dict[str, Any]:
    return {
        "outcome": model.outcome,
        "probability": None if risk is None else risk.probability,
        "interval": None if risk is None or risk.interval is None else list(risk.interval),
        "contributions": {} if risk is None else dict(risk.reasons),
        "model": {
            "sha256": model.sha256,
            "horizon": model.horizon,
            "look_ahead_steps": model.look_ahead_steps,
            "about": dict(model.about),
        },
    }


def in_words(safe: SafeRate) -> str:
    """Return one sentence on the rate that was looked for."""
    wanted = f"the learning rate at which the risk of {safe.outcome} reaches {safe.threshold:.0%}"
    if safe.rate is None:
        side = f"below {safe.lowest:.3g}" if safe.crossed else f"above {safe.highest:.3g}"
        return f"{wanted} is {side}, beyond the rates that were tried"
    low, high = safe.interval
    ends = (
        f"below {safe.lowest:.3g}" if low is None else f"{low:.3g}",
        f"above {safe.highest:.3g}" if high is None else f"{high:.3g}",
    )
    return f"{wanted} is {safe.rate:.3g} ({ends[0]} to {ends[1]})"
