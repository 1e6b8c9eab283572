"""How the monitor asks a trainer to switch or strengthen KSS, and how the trainer answers: two small JSON files.

``desired.json`` is written by the monitor, ``applied.json`` by the trainer's rank 0; both are replaced atomically in
one control folder. A trainer polls at its step boundaries:

    listener = ControlListener(folder, run_id="run-7")
    desired = listener.poll(step)           # None when nothing changed: one `stat`
    if desired is not None:
        regularizer.configure(desired.kss)
        listener.acknowledge(desired, step)

Expiry is handled inside `ControlListener.poll`: once an applied order has expired, it returns an order with alpha 0.
No torch here: any process can import this module cheaply.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeGuard

from rksp_core.atomic import write_atomic
from rksp_core.errors import ControlError

ORDER_SCHEMA = "rksp.control/1"
ACK_SCHEMA = "rksp.control.ack/1"
ORDER_FILE = "desired.json"
ACK_FILE = "applied.json"

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
            ("alpha", "a number of at least 0", _number(self.alpha) and self.alpha >= 0),
            ("interval", "a whole number of at least 1", _whole(self.interval) and self.interval >= 1),
            (
                "layer_fraction",
                "a number in (0, 1]",
                _number(self.layer_fraction) and 0 < self.layer_fraction <= 1,
            ),
            ("gamma", "a number in [0, 1]", _number(self.gamma) and 0 <= self.gamma <= 1),
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
            if not _whole(generation) or generation < 1 or not isinstance(run_id, str):
                raise ControlError(
                    f"an order needs a run_id and a generation of at least 1, got {run_id!r} and {generation!r}"
                )
            expires_at = document.get("expires_at")
            if expires_at is not None:
                _seconds(expires_at)
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
            if not all(_whole(number) for number in numbers):
                raise ControlError(f"an acknowledgement needs whole numbers for generation and step, got {numbers}")
            return cls(
                **{name: document[name] for name in ("run_id", "generation", "step", "at", "status", "message")},
                active_generation=active["generation"],
                active_kss=KSSSettings(**active["kss"]),
            )
        except (KeyError, TypeError) as error:
            raise ControlError(f"the acknowledgement cannot be read ({error!r})") from error


class ControlWriter:
    """The monitor's end: writes orders, reads acknowledgements.

    Parameters
    ----------
    folder
        The control folder; it is created (0700) when it is missing.
    mode
        Permission bits of ``desired.json``; 0600 unless the trainer runs as another user.
    clock
        Seconds since the epoch.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, mode: int = 0o600, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = Path(folder)
        self._mode = mode
        self._clock = clock

    def next_generation(self, known: int = 0) -> int:
        """Return one more than the largest generation in both files and ``known`` (the ledger's largest)."""
        largest = known
        desired, applied = _read(self.folder / ORDER_FILE), _read(self.folder / ACK_FILE)
        for document in (desired, applied, applied.get("active", {}) if isinstance(applied, dict) else None):
            generation = document.get("generation") if isinstance(document, dict) else None
            if _whole(generation):
                largest = max(largest, generation)
        return largest + 1

    def prepare(
        self,
        run_id: str,
        kss: KSSSettings,
        reason: Reason,
        *,
        known: int = 0,
        expires_in: float | None = None,
    ) -> Desired:
        """Return the next order without writing it, so that a ledger can hold it before the trainer sees it.

        ``known`` is the largest generation in the ledger; ``expires_in`` is in seconds from now, None never expires.
        """
        now = self._clock()
        return Desired(
            run_id=run_id,
            generation=self.next_generation(known),
            kss=kss,
            issued_at=_timestamp(now),
            expires_at=None if expires_in is None else _timestamp(now + expires_in),
            reason=reason,
        )

    def issue(
        self,
        run_id: str,
        kss: KSSSettings,
        reason: Reason,
        *,
        known: int = 0,
        expires_in: float | None = None,
    ) -> Desired:
        """Prepare the next order, write it and return it.

        Raises
        ------
        ControlError
            When the control folder cannot be written.
        """
        desired = self.prepare(run_id, kss, reason, known=known, expires_in=expires_in)
        self.write(desired)
        return desired

    def desired_generation(self) -> int:
        """Return the generation in ``desired.json``, 0 when there is none that can be read."""
        document = _read(self.folder / ORDER_FILE)
        generation = document.get("generation") if isinstance(document, dict) else None
        return generation if _whole(generation) else 0

    def write(self, desired: Desired) -> None:
        """Replace ``desired.json`` by this order.

        Raises
        ------
        ControlError
            When the control folder cannot be written.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(
                self.folder / ORDER_FILE,
                json.dumps(desired.to_dict(), indent=1, allow_nan=False) + "\n",
                mode=self._mode,
            )
        except OSError as error:
            raise ControlError(
                f"cannot write an order to {self.folder} ({error.strerror}); it must be a folder this user may write"
            ) from error

    def applied(self) -> Acknowledgement | None:
        """Return the trainer's last acknowledgement; None when there is none that can be read."""
        try:
            return Acknowledgement.from_dict(_read(self.folder / ACK_FILE))
        except ControlError:
            return None


class ControlListener:
    """The trainer's end: polls orders at step boundaries and acknowledges them. Use it on rank 0 only.

    An order that is unreadable or out of range is ``rejected``; one for another run or of an older generation is
    ``ignored``. Both are acknowledged here, with a message; what held before goes on. An order that has expired,
    on arrival or later, means alpha 0.

    Parameters
    ----------
    folder
        The control folder; it need not exist yet.
    run_id
        Orders for another run are ignored.
    mode
        Permission bits of ``applied.json``.
    clock
        Seconds since the epoch.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run_id: str,
        *,
        mode: int = 0o600,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder)
        self.run_id = run_id
        self._mode = mode
        self._clock = clock
        self._order_path = str(self.folder / ORDER_FILE)
        self._signature: tuple[int, int, int] | None = None
        self._active = KSSSettings()
        self._active_generation = 0
        self._highest = self._acknowledged_generation()
        self._pending_expiry: tuple[float, Desired] | None = None

    def poll(self, step: int) -> Desired | None:
        """Return an order to apply at this step boundary, or None. Costs one ``stat`` when nothing changed.

        Call `acknowledge` once it is applied. An order of this run whose time is over comes back once, with
        ``kss.alpha`` 0 and ``expired`` set.

        Raises
        ------
        OSError
            When an acknowledgement cannot be written (the folder is gone or full).
        """
        if self._pending_expiry is not None and self._clock() >= self._pending_expiry[0]:
            order = self._pending_expiry[1]
            self._pending_expiry = None
            return dataclasses.replace(order, kss=dataclasses.replace(order.kss, alpha=0.0), expired=True)
        try:
            stat = os.stat(self._order_path)  # noqa: PTH116 - a Path costs more than the call itself
        except OSError:
            return None
        signature = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if signature == self._signature:
            return None
        self._signature = signature
        return self._take(step)

    def acknowledge(self, desired: Desired, step: int, status: AckStatus = "applied", message: str = "") -> None:
        """Answer an order that `poll` returned: ``applied`` (an expired one says ``expired``), or ``rejected``.

        Raises
        ------
        OSError
            When ``applied.json`` cannot be written.
        """
        if status == "applied":
            self._active, self._active_generation = desired.kss, desired.generation
            if desired.expired:
                status, message = "expired", message or "the order's time is over: KSS is off"
        self._answer(desired.generation, step, status, message)

    @property
    def active(self) -> tuple[int, KSSSettings]:
        """The generation and the settings that hold now."""
        return self._active_generation, self._active

    def _take(self, step: int) -> Desired | None:
        document = _read(Path(self._order_path))
        try:
            desired = Desired.from_dict(document)
        except ControlError as error:
            generation = document.get("generation") if isinstance(document, dict) else None
            self._answer(generation if _whole(generation) else 0, step, "rejected", str(error))
            return None
        refusal = self._refusal(desired)
        if refusal is not None:
            self._answer(desired.generation, step, "ignored", refusal)
            return None
        self._highest = desired.generation
        self._pending_expiry = None
        if desired.expires_at is not None:
            end = _seconds(desired.expires_at)
            if end <= self._clock():
                return dataclasses.replace(desired, kss=dataclasses.replace(desired.kss, alpha=0.0), expired=True)
            self._pending_expiry = (end, desired)
        return desired

    def _refusal(self, desired: Desired) -> str | None:
        if desired.run_id != self.run_id:
            return f"the order is for run {desired.run_id!r}, this is run {self.run_id!r}"
        if desired.generation < self._highest or desired.generation == self._active_generation:
            return f"generation {desired.generation} is not newer than {max(self._highest, self._active_generation)}"
        return None

    def _answer(self, generation: int, step: int, status: str, message: str) -> None:
        answer = Acknowledgement(
            self.run_id,
            generation,
            step,
            _timestamp(self._clock()),
            status,
            message,
            self._active_generation,
            self._active,
        )
        # A trainer's first poll may come before the monitor created the folder; then there was no order to answer.
        write_atomic(
            self.folder / ACK_FILE,
            json.dumps(answer.to_dict(), indent=1, allow_nan=False) + "\n",
            mode=self._mode,
        )

    def _acknowledged_generation(self) -> int:
        """After a restart, orders older than the one this run last obeyed stay ignored; that one is applied again."""
        try:
            answer = Acknowledgement.from_dict(_read(self.folder / ACK_FILE))
        except ControlError:
            return 0
        return answer.active_generation if answer.run_id == self.run_id else 0


def _read(path: Path) -> Any:
    """Return the JSON in ``path``, or None when it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(timestamp: str) -> float:
    moment = datetime.fromisoformat(timestamp)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
