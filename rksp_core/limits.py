"""What a trainer lets an order set. What lies outside is refused, never clamped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rksp_core.errors import ConfigError
from rksp_core.orders import VARIANTS, Desired, Variant, is_whole

Bounds = tuple[float, float]

_KSS = ("alpha", "interval", "layer_fraction", "gamma")
_BESIDE = ("clip", "learning_rate_scale", "surprise")


@dataclass(frozen=True)
class Limits:
    """Lowest and highest value of each lever, both allowed; ``variants`` are those that an order may choose.

    The regularizer's bounds are by default as wide as `rksp_core.KSSSettings` takes. ``clip``, ``learning_rate_scale``
    and ``surprise`` None: this trainer has no such lever. ``rollbacks``: how often orders may take the trainer back to
    a checkpoint in all, so that nobody goes in circles for ever; beyond that it obeys the rest of the order.

    Raises
    ------
    ConfigError
        When bounds are not two numbers in order, a variant is unknown, or ``rollbacks`` is no count.
    """

    alpha: Bounds = (0.0, math.inf)
    interval: Bounds = (1, math.inf)
    layer_fraction: Bounds = (0.0, 1.0)
    gamma: Bounds = (0.0, 1.0)
    variants: tuple[Variant, ...] = VARIANTS
    clip: Bounds | None = None
    learning_rate_scale: Bounds | None = None
    surprise: Bounds | None = None
    rollbacks: int = 3

    def __post_init__(self) -> None:
        for name in (*_KSS, *_BESIDE):
            bounds = getattr(self, name)
            if not (_ordered(bounds) or (bounds is None and name in _BESIDE)):
                raise ConfigError(f"limits.{name} must be [lowest, highest], got {bounds!r}; correct it")
        unknown = [variant for variant in self.variants if variant not in VARIANTS]
        if unknown:
            raise ConfigError(f"limits.variants has {unknown[0]!r}; the variants are {', '.join(VARIANTS)}")
        if not is_whole(self.rollbacks) or self.rollbacks < 0:
            raise ConfigError(
                f"limits.rollbacks must be a whole number of at least 0, got {self.rollbacks!r}; correct it"
            )

    def refusal(self, desired: Desired) -> str | None:
        """Return why an order must not be applied, as a sentence; None when it may be.

        Alpha 0 is always allowed, whatever stands beside it: the regularizer is off, and nothing else in it counts.
        """
        levers = desired.levers
        for name in _KSS if levers.alpha > 0 else ():
            low, high = getattr(self, name)
            if not low <= getattr(levers, name) <= high:
                return _outside(f"kss.{name}", getattr(levers, name), f"{low:g} to {high:g}", name)
        if levers.alpha > 0 and levers.variant is not None and levers.variant not in self.variants:
            return _outside("kss.variant", levers.variant, " or ".join(self.variants) or "none", "variants")
        for name in _BESIDE:
            value, bounds = getattr(levers, name), getattr(self, name)
            if value is None:
                continue
            if bounds is None:
                asked = f"the order asks for {name} {value}"
                return f"{asked}, this trainer has no such lever; its limits.{name} must allow it"
            if not bounds[0] <= value <= bounds[1]:
                return _outside(name, value, f"{bounds[0]:g} to {bounds[1]:g}", name)
        return None


def _ordered(bounds: Any) -> bool:
    """Whether these are two numbers, not NaN, the lower one first."""
    numbers = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(isinstance(n, int | float) for n in bounds)
    return numbers and bool(bounds[0] <= bounds[1])


def _outside(lever: str, value: object, allowed: str, key: str) -> str:
    return f"the order asks for {lever} {value}, this trainer allows {allowed} (limits.{key})"
