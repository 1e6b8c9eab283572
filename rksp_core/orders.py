"""What an order to a trainer says and what the trainer answers: the content of ``desired.json`` and ``applied.json``.

Values and their JSON forms only; `rksp_core.control` writes, reads and obeys them. No torch here: any process can
import this module cheaply.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard

from rksp_core.errors import ControlError

ORDER_SCHEMA = "rksp.control/1"
ACK_SCHEMA = "rksp.control.ack/1"

AckStatus = Literal["applied", "ignored", "rejected", "expired"]


@dataclass(frozen=True)
class KSSSettings:
    """Settings of the regularizer that an order carries.

    ``alpha`` >= 0 weighs the term (0 = off), ``interval`` >= 1 is its period in steps, ``layer_fraction`` in (0, 1]
    the random share of layers, ``gamma`` in [0, 1] the target of the soft near-unit mass (Kim et al. 2026, Eq. 15).
    """

    alpha: float = 0.0
    interval: int = 10
    layer_fraction: float = 0.5
    gamma: float = 0.4

    def __post_init__(self) -> None:
        for name, wanted, good in (
            ("alpha", "a number of at least 0", is_number(self.alpha) and self.alpha >= 0),
            ("interval", "a whole number of at least 1", is_whole(self.interval) and self.interval >= 1),
            (
                "layer_fraction",
                "a number in (0, 1]",
                is_number(self.layer_fraction) and 0 < self.layer_fraction <= 1,
            ),
            ("gamma", "a number in [0, 1]", is_number(self.gamma) and 0 <= self.gamma <= 1),
        ):
            if not good:
                raise ControlError(f"kss.{name} must be {wanted}, got {getattr(self, name)!r}; correct the order")


@dataclass(frozen=True)
class Reason:
    """Why an order was issued: the level, and the figure that made it."""

    risk_level: int = 0
    checkpoint_step: int | None = None
    metric: str | None = None
    value: float | None = None
    baseline: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Desired:
    """One order of the monitor. ``expired`` marks the order with alpha 0 that follows when its time is over."""

    run_id: str
    generation: int
    kss: KSSSettings
    issued_at: str = ""
    expires_at: str | None = None
    reason: Reason = field(default_factory=Reason)
    expired: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of ``desired.json``."""
        document = dataclasses.asdict(self)
        del document["expired"]
        return {"schema": ORDER_SCHEMA, **document}

    @classmethod
    def from_dict(cls, document: Any) -> Desired:
        """Read the JSON form.

        Raises
        ------
        ControlError
            When the schema is unknown or a value is missing or out of its range.
        """
        if not isinstance(document, Mapping) or document.get("schema") != ORDER_SCHEMA:
            schema = document.get("schema") if isinstance(document, Mapping) else document
            raise ControlError(f"an order has schema {ORDER_SCHEMA!r}, got {schema!r}; use a monitor of this version")
        try:
            generation, run_id = document["generation"], document["run_id"]
            if not is_whole(generation) or generation < 1 or not isinstance(run_id, str):
                raise ControlError(
                    f"an order needs a run_id and a generation of at least 1, got {run_id!r} and {generation!r}"
                )
            expires_at = document.get("expires_at")
            if expires_at is not None:
                seconds(expires_at)
            reason = {f.name: document.get("reason", {}).get(f.name) for f in dataclasses.fields(Reason)}
            return cls(
                run_id=run_id,
                generation=generation,
                kss=KSSSettings(**document["kss"]),
                issued_at=document.get("issued_at", ""),
                expires_at=expires_at,
                reason=Reason(**reason),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ControlError(f"the order cannot be read ({error!r}); let the monitor write it again") from error


@dataclass(frozen=True)
class Acknowledgement:
    """What the trainer says about an order; ``active`` is what holds now, whatever became of the order."""

    run_id: str
    generation: int
    step: int
    at: str
    status: str
    message: str
    active_generation: int
    active_kss: KSSSettings

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of ``applied.json``."""
        return {
            "schema": ACK_SCHEMA,
            "run_id": self.run_id,
            "generation": self.generation,
            "step": self.step,
            "at": self.at,
            "status": self.status,
            "message": self.message,
            "active": {"generation": self.active_generation, "kss": dataclasses.asdict(self.active_kss)},
        }

    @classmethod
    def from_dict(cls, document: Any) -> Acknowledgement:
        """Read the JSON form.

        Raises
        ------
        ControlError
            When the schema is unknown or a field is missing.
        """
        try:
            if document["schema"] != ACK_SCHEMA:
                raise ControlError(f"an acknowledgement has schema {ACK_SCHEMA!r}, got {document['schema']!r}")
            active = document["active"]
            numbers = (document["generation"], document["step"], active["generation"])
            if not all(is_whole(number) for number in numbers):
                raise ControlError(f"an acknowledgement needs whole numbers for generation and step, got {numbers}")
            return cls(
                **{name: document[name] for name in ("run_id", "generation", "step", "at", "status", "message")},
                active_generation=active["generation"],
                active_kss=KSSSettings(**active["kss"]),
            )
        except (KeyError, TypeError) as error:
            raise ControlError(f"the acknowledgement cannot be read ({error!r})") from error


def timestamp(moment: float) -> str:
    """Return seconds since the epoch as an ISO 8601 text in UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(text: str) -> float:
    """Return an ISO 8601 text, UTC where it does not say, as seconds since the epoch."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (True and False are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool)
