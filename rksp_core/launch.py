"""What is known of a run before its first step, as the few numbers that its risk is estimated from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rksp_core.errors import ConfigError
from rksp_core.orders import is_number, is_whole

if TYPE_CHECKING:
    from rksp_core.lookahead import LookAhead

LARGEST_RISE = 6.0  # e^6 = 400 times: what is beyond, or not finite, is no worse


@dataclass(frozen=True)
class Feature:
    """One number: what it is called, what it is in words, and whether more of it may never mean less risk."""

    name: str
    words: str
    risky: bool = False


FEATURES = (
    Feature("log_learning_rate", "the learning rate", risky=True),
    Feature("lion", "the optimizer"),
    Feature("sgd", "the optimizer"),
    Feature("unclipped", "clipping or its absence", risky=True),
    Feature("without_norm", "normalization or its absence"),
    Feature("lion_without_norm", "the optimizer"),
    Feature("sgd_without_norm", "the optimizer"),
    Feature("log_depth", "the depth"),
    Feature("log_width", "the width"),
    Feature("loss_rise", "the rise of the loss in the look-ahead", risky=True),
    Feature("gradient_rise", "the rise of the gradient norm in the look-ahead", risky=True),
    Feature("hidden_rise", "the growth of the hidden states in the look-ahead", risky=True),
)
NAMES = tuple(feature.name for feature in FEATURES)

# Optimizers whose rates have one scale are one family: Adam is AdamW without decay.
FAMILIES = MappingProxyType({"adamw": "adamw", "adam": "adamw", "lion": "lion", "sgd": "sgd"})


@dataclass(frozen=True)
class Launch:
    """A run that is about to start.

    Attributes
    ----------
    learning_rate
        The peak rate, > 0.
    optimizer
        One of `FAMILIES`.
    depth, width
        Blocks of the model, and of its residual stream.
    losses, gradient_norms
        Of the look-ahead at the full rate, one a step; None where not finite.
    hidden_rms
        Of the last block's output, before and after the look-ahead; None where not finite.
    finite
        Whether everything of the look-ahead stayed finite.
    steps
        Steps that the look-ahead was to take.
    normalized
        Whether the blocks hold a normalization.
    clipped
        Whether the run clips the norm of its gradient; the look-ahead does not.
    """

    learning_rate: float
    optimizer: str
    depth: int
    width: int
    losses: Sequence[float | None]
    gradient_norms: Sequence[float | None]
    hidden_rms: tuple[float | None, float | None]
    finite: bool
    steps: int
    normalized: bool
    clipped: bool

    @classmethod
    def of(
        cls,
        look_ahead: LookAhead,
        *,
        steps: int,
        learning_rate: float,
        optimizer: str,
        depth: int,
        width: int,
        clipped: bool,
    ) -> Launch:
        """Return the launch that this look-ahead, of ``steps`` steps, was made for."""
        return cls(
            learning_rate=learning_rate,
            optimizer=optimizer,
            depth=depth,
            width=width,
            losses=look_ahead.losses,
            gradient_norms=look_ahead.gradient_norms,
            hidden_rms=(look_ahead.hidden_rms_before, look_ahead.hidden_rms_after),
            finite=look_ahead.finite,
            steps=steps,
            normalized=look_ahead.normalized,
            clipped=clipped,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the launch as JSON."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("losses", "gradient_norms", "hidden_rms")}

    @classmethod
    def from_dict(cls, document: object) -> Launch:
        """Return the launch of a document.

        Raises
        ------
        ConfigError
            When a key is missing, unknown, or holds something else.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(document, Mapping) or set(document) != names:
            raise ConfigError(f"a launch has the keys {', '.join(sorted(names))}; got {_keys(document)}")
        whole = all(is_whole(document[name]) and document[name] > 0 for name in ("depth", "width", "steps"))
        lists = [document[name] for name in ("losses", "gradient_norms", "hidden_rms")]
        if (
            not whole
            or not all(map(_numbers, lists))
            or len(document["hidden_rms"]) != 2
            or not is_number(document["learning_rate"])
            or not all(isinstance(document[name], bool) for name in ("finite", "normalized", "clipped"))
        ):
            raise ConfigError(
                "a launch has numbers, or null, where its look-ahead has them, and a depth, a width and "
                "steps of at least 1; copy it from a preflight report as it is"
            )
        before, after = document["hidden_rms"]
        return cls(**{**document, "hidden_rms": (before, after)})

    def features(self) -> Mapping[str, float]:
        """Return the numbers by the names of `FEATURES`.

        Rises are natural logarithms of the largest figure of the look-ahead over the first, within `LARGEST_RISE`;
        one that did not stay finite has the largest. So they have no unit, and do not depend on the vocabulary.

        Raises
        ------
        ConfigError
            When the optimizer is of no family, or the rate is not positive.
        """
        family = FAMILIES.get(self.optimizer)
        if family is None:
            raise ConfigError(f"no risk is known for the optimizer {self.optimizer!r}; known are {', '.join(FAMILIES)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"the learning rate must be positive, got {self.learning_rate}")
        return {
            "log_learning_rate": math.log(self.learning_rate),
            "lion": float(family == "lion"),
            "sgd": float(family == "sgd"),
            "unclipped": float(not self.clipped),
            "without_norm": float(not self.normalized),
            "lion_without_norm": float(family == "lion" and not self.normalized),
            "sgd_without_norm": float(family == "sgd" and not self.normalized),
            "log_depth": math.log(self.depth),
            "log_width": math.log(self.width),
            "loss_rise": self._rise(self.losses),
            "gradient_rise": self._rise(self.gradient_norms),
            "hidden_rise": self._rise(self.hidden_rms),
        }

    def _rise(self, figures: Sequence[float | None]) -> float:
        first, *later = figures if len(figures) > 1 else (None, None)
        if not self.finite or first is None or first <= 0 or None in later:
            return LARGEST_RISE
        largest = max(value for value in later if value is not None)
        return min(max(math.log(max(largest, 1e-300) / first), -LARGEST_RISE), LARGEST_RISE)


def _keys(document: object) -> str:
    return ", ".join(sorted(map(str, document))) if isinstance(document, Mapping) else type(document).__name__


def _numbers(values: object) -> bool:
    return isinstance(values, list | tuple) and all(value is None or is_number(value) for value in values)
