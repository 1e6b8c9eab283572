"""What an order to a trainer says and what the trainer answers: the content of ``desired.json`` and ``applied.json``.

Values and their JSON forms only; `rksp_core.control` writes, reads and obeys them. Both forms have three versions. The
second one adds ``kss.variant``, ``clip`` and ``learning_rate_scale``, the third ``surprise`` and ``rollback_to``
(``rolled_back_to`` in the answer); each is written only where it is needed: so a trainer of the first version obeys all
that it knows, and refuses the rest by the name of the schema. No torch here: any process imports this module cheaply.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard

from rksp_core.errors import ControlError

ORDER_SCHEMAS = ("rksp.control/1", "rksp.control/2", "rksp.control/3")
ACK_SCHEMAS = ("rksp.control.ack/1", "rksp.control.ack/2", "rksp.control.ack/3")

AckStatus = Literal["applied", "ignored", "rejected", "expired"]
Variant = Literal["paper", "hinge"]
VARIANTS: tuple[Variant, ...] = ("paper", "hinge")


class LeverError(ControlError, ValueError):
    """A lever is out of its range; as a ValueError, so that a reader of settings can say where it stands."""


@dataclass(frozen=True)
class KSSSettings:
    """Settings of the regularizer that an order carries.

    ``alpha`` >= 0 weighs the term (0 = off), ``interval`` >= 1 is its period in steps, ``layer_fraction`` in (0, 1]
    the random share of layers, ``gamma`` in [0, 1] the target of the soft near-unit mass (Kim et al. 2026, Eq. 15),
    ``variant`` the form of the unstable term (see `rksp_core.kss_loss`; None: the trainer's own).
    """

    alpha: float = 0.0
    interval: int = 10
    layer_fraction: float = 0.5
    gamma: float = 0.4
    variant: Variant | None = None

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
            ("variant", f"one of {', '.join(VARIANTS)}", self.variant is None or self.variant in VARIANTS),
        ):
            if not good:
                raise LeverError(f"kss.{name} must be {wanted}, got {getattr(self, name)!r}; correct it")


@dataclass(frozen=True)
class Levers(KSSSettings):
    """All that an order sets: the regularizer, and what lies beside it in a trainer.

    ``clip`` > 0 is the largest gradient norm, ``learning_rate_scale`` > 0 a factor on the trainer's schedule,
    ``surprise`` > 0 how many times its usual size a gradient may enter Adam's moments (`rksp_core.surprise`). None is
    the trainer's own: an order describes the whole state, so what it leaves out goes back to that.
    """

    clip: float | None = None
    learning_rate_scale: float | None = None
    surprise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.beside.items():
            if value is not None and not (is_number(value) and value > 0):
                raise LeverError(f"{name} must be a number above 0 or left out, got {value!r}; correct it")

    @classmethod
    def of(
        cls,
        kss: KSSSettings,
        clip: float | None = None,
        learning_rate_scale: float | None = None,
        surprise: float | None = None,
    ) -> Levers:
        """Put the settings of the regularizer and the levers beside it together."""
        settings = {f.name: getattr(kss, f.name) for f in dataclasses.fields(KSSSettings)}
        return cls(**settings, clip=clip, learning_rate_scale=learning_rate_scale, surprise=surprise)

    @property
    def kss(self) -> KSSSettings:
        """The settings of the regularizer alone."""
        return KSSSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(KSSSettings)})

    @property
    def beside(self) -> dict[str, Any]:
        """The levers beside the regularizer, by name: numbers above 0, or None."""
        return {name: getattr(self, name) for name in _BESIDE}

    @property
    def idle(self) -> bool:
        """Whether nothing is asked for but what the trainer does by itself, with the regularizer off."""
        return self.alpha == 0 and not any(self.beside.values())

    @property
    def version(self) -> Literal[1, 2, 3]:
        """The first version of the files that can say this."""
        if self.surprise is not None:
            return 3
        return 2 if self.variant is not None or any(self.beside.values()) else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as it lies in orders and acknowledgements: what is None is left out."""
        kss = {name: value for name, value in dataclasses.asdict(self.kss).items() if value is not None}
        return {"kss": kss} | {name: value for name, value in self.beside.items() if value is not None}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], version: int) -> Levers:
        """Read the JSON form out of a document of this version that holds more.

        Raises
        ------
        ControlError
            When a value is out of its range, or the version has no such lever.
        """
        kss = document["kss"]
        unknown = [name for name in kss if name not in _KSS_FIELDS]
        if unknown:
            raise ControlError(f"kss has no setting {unknown[0]!r}; it has {', '.join(_KSS_FIELDS)}")
        values = {**kss, **{name: document[name] for name in _BESIDE if name in document}}
        for name in ("variant", *_BESIDE):
            first = 3 if name == "surprise" else 2
            if name in values and version < first:
                schema = ORDER_SCHEMAS[first - 1]
                raise ControlError(f"{name} needs the schema {schema!r}; let a monitor write the order")
        return cls(**values)


_KSS_FIELDS = tuple(f.name for f in dataclasses.fields(KSSSettings))
_BESIDE = tuple(f.name for f in dataclasses.fields(Levers) if f.name not in _KSS_FIELDS)


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
    """One order of the monitor; ``clip``, ``learning_rate_scale`` and ``surprise`` as in `Levers`.

    ``rollback_to`` asks the trainer to go back, once, to its newest checkpoint at or before this step, and to go on
    from there with the levers; None leaves it where it is. It is an event: no part of the state that the levers are.
    ``expired`` marks the order that follows when its time is over: alpha 0, and all else the trainer's own.
    """

    run_id: str
    generation: int
    kss: KSSSettings
    issued_at: str = ""
    expires_at: str | None = None
    reason: Reason = field(default_factory=Reason)
    expired: bool = False
    clip: float | None = None
    learning_rate_scale: float | None = None
    surprise: float | None = None
    rollback_to: int | None = None

    @property
    def levers(self) -> Levers:
        """All that the order sets."""
        return Levers.of(self.kss, self.clip, self.learning_rate_scale, self.surprise)

    @property
    def standing(self) -> Desired:
        """The order without what happens only once."""
        return dataclasses.replace(self, rollback_to=None)

    def ended(self) -> Desired:
        """Return what holds when the order's time is over."""
        off = dataclasses.replace(self.kss, alpha=0.0, variant=None)
        own: dict[str, Any] = dict.fromkeys(_BESIDE)
        return dataclasses.replace(self.standing, kss=off, **own, expired=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of ``desired.json``."""
        levers, once = self.levers, {} if self.rollback_to is None else {"rollback_to": self.rollback_to}
        return {
            "schema": ORDER_SCHEMAS[(3 if once else levers.version) - 1],
            "run_id": self.run_id,
            "generation": self.generation,
            **levers.to_dict(),
            **once,
            "issued_at": self.issued_at,
            "expires_at": self.expires_at,
            "reason": dataclasses.asdict(self.reason),
        }

    @classmethod
    def from_dict(cls, document: Any) -> Desired:
        """Read the JSON form.

        Raises
        ------
        ControlError
            When the schema is unknown or a value is missing or out of its range.
        """
        schema = document.get("schema") if isinstance(document, Mapping) else document
        if not isinstance(document, Mapping) or schema not in ORDER_SCHEMAS:
            raise ControlError(
                f"an order has schema {' or '.join(map(repr, ORDER_SCHEMAS))}, got {schema!r}; use a monitor of this "
                "version"
            )
        version = ORDER_SCHEMAS.index(schema) + 1
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
            if version > 1:
                _check_later(document, version)
            back = _step_back(document, version)
            levers = Levers.from_dict(document, version)
            return cls(
                run_id=run_id,
                generation=generation,
                kss=levers.kss,
                issued_at=document.get("issued_at", ""),
                expires_at=expires_at,
                reason=Reason(**reason),
                **levers.beside,
                rollback_to=back,
            )
        except ControlError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ControlError(f"the order cannot be read ({error!r}); let the monitor write it again") from error


@dataclass(frozen=True)
class Acknowledgement:
    """What the trainer says about an order; ``active`` is what holds now, whatever became of the order.

    ``rollback`` says that the order asked the trainer to go back, ``rolled_back_to`` the step from which it goes on
    since then: None where it could not, for the reason in ``message``.
    """

    run_id: str
    generation: int
    step: int
    at: str
    status: str
    message: str
    active_generation: int
    active_kss: KSSSettings
    active_clip: float | None = None
    active_learning_rate_scale: float | None = None
    active_surprise: float | None = None
    rollback: bool = False
    rolled_back_to: int | None = None

    @property
    def active(self) -> Levers:
        """All that holds now."""
        return Levers.of(self.active_kss, self.active_clip, self.active_learning_rate_scale, self.active_surprise)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of ``applied.json``."""
        active, once = self.active, {"rolled_back_to": self.rolled_back_to} if self.rollback else {}
        return {
            "schema": ACK_SCHEMAS[(3 if once else active.version) - 1],
            "run_id": self.run_id,
            "generation": self.generation,
            "step": self.step,
            "at": self.at,
            "status": self.status,
            "message": self.message,
            **once,
            "active": {"generation": self.active_generation, **active.to_dict()},
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
            schema, active = document["schema"], document["active"]
            if schema not in ACK_SCHEMAS:
                raise ControlError(f"an acknowledgement has schema {' or '.join(ACK_SCHEMAS)}, got {schema!r}")
            version = ACK_SCHEMAS.index(schema) + 1
            levers = Levers.from_dict(active, version)
            rollback = version == 3 and "rolled_back_to" in document
            reached = document["rolled_back_to"] if rollback else None
            numbers = (
                document["generation"],
                document["step"],
                active["generation"],
                0 if reached is None else reached,
            )
            if not all(is_whole(number) for number in numbers):
                raise ControlError(f"an acknowledgement needs whole numbers for generation and step, got {numbers}")
            return cls(
                **{name: document[name] for name in ("run_id", "generation", "step", "at", "status", "message")},
                active_generation=active["generation"],
                active_kss=levers.kss,
                **{f"active_{name}": value for name, value in levers.beside.items()},
                rollback=rollback,
                rolled_back_to=reached,
            )
        except (KeyError, TypeError) as error:
            raise ControlError(f"the acknowledgement cannot be read ({error!r})") from error


def _check_later(document: Mapping[str, Any], version: int) -> None:
    """Refuse what a later version does not know: a misspelt lever would go back to the trainer's own unseen."""
    known = {"schema", "run_id", "generation", "kss", *_BESIDE, "issued_at", "expires_at", "reason", "rollback_to"}
    unknown = [name for name in document if name not in known]
    if unknown:
        raise ControlError(f"an order has no field {unknown[0]!r}; the levers beside kss are {', '.join(_BESIDE)}")
    if "alpha" not in document["kss"]:
        raise ControlError(f"an order of schema {ORDER_SCHEMAS[version - 1]!r} names kss.alpha; 0 is off")


def _step_back(document: Mapping[str, Any], version: int) -> int | None:
    """Return the step that an order asks its trainer to go back to, None where it asks for no such thing."""
    if "rollback_to" not in document:
        if version == 3 and "surprise" not in document:
            raise ControlError(f"an order of schema {ORDER_SCHEMAS[2]!r} names rollback_to or surprise; it has neither")
        return None
    if version < 3:
        raise ControlError(f"rollback_to needs the schema {ORDER_SCHEMAS[2]!r}; let a monitor write the order")
    step = document["rollback_to"]
    if not is_whole(step) or step < 0:
        raise ControlError(f"rollback_to must be a step, a whole number of at least 0, got {step!r}; correct it")
    return step


def timestamp(moment: float) -> str:
    """Return seconds since the epoch as an ISO 8601 text in UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(text: str) -> float:
    """Return an ISO 8601 text, UTC where it does not say, as seconds since the epoch."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (True and False are none), within the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number (True and False are none), of 64 bits: more fits no tensor or ledger."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
