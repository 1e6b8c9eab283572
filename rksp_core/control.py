"""How the monitor asks a trainer to switch or strengthen KSS, and how the trainer answers: two small JSON files.

``desired.json`` is written by the monitor, ``applied.json`` by the trainer's rank 0; both are replaced atomically in
one control folder. A trainer polls at its step boundaries:

    listener = ControlListener(folder, run_id="run-7")
    desired = listener.poll(step)           # None when nothing changed: one `stat`
    if desired is not None:
        regularizer.configure(desired.kss)  # and clip, learning_rate_scale, surprise, where limits allow them
        listener.acknowledge(desired, step)

Expiry is handled inside `ControlListener.poll`: once an applied order has expired, it returns an order with alpha 0
and everything else the trainer's own.
What the files say is in `rksp_core.orders`. No torch here: any process can import this module cheaply.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rksp_core.atomic import write_atomic
from rksp_core.errors import ControlError
from rksp_core.limits import Limits
from rksp_core.orders import (
    Acknowledgement,
    AckStatus,
    Desired,
    KSSSettings,
    Levers,
    Reason,
    is_whole,
    seconds,
    timestamp,
)

_log = logging.getLogger(__name__)

ORDER_FILE = "desired.json"
ACK_FILE = "applied.json"


class ControlWriter:
    """The monitor's end: writes orders, reads acknowledgements.

    Parameters
    ----------
    folder
        The control folder; created when it is missing, 0700, or 0770 where ``mode`` lets the group read.
    mode
        Permission bits of ``desired.json``; 0600 unless the trainer runs as another user.
    clock
        Seconds since the epoch.

    Attributes
    ----------
    shared
        Whether ``mode`` lets the group read.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, mode: int = 0o600, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = Path(folder)
        self.shared = bool(mode & 0o040)
        self._mode = mode
        self._clock = clock

    def make_folder(self) -> None:
        """Make the control folder where it is missing; raise OSError where that is not possible."""
        # A trainer of the same group has to enter the folder and to put its answer there.
        self.folder.mkdir(mode=0o770 if self.shared else 0o700, parents=True, exist_ok=True)

    def next_generation(self, known: int = 0) -> int:
        """Return one more than the largest generation in both files and ``known`` (the ledger's largest)."""
        largest = known
        desired, applied = _read(self.folder / ORDER_FILE), _read(self.folder / ACK_FILE)
        for document in (desired, applied, applied.get("active", {}) if isinstance(applied, dict) else None):
            generation = document.get("generation") if isinstance(document, dict) else None
            if is_whole(generation):
                largest = max(largest, generation)
        return largest + 1

    def prepare(
        self,
        run_id: str,
        kss: KSSSettings,
        reason: Reason,
        *,
        clip: float | None = None,
        learning_rate_scale: float | None = None,
        surprise: float | None = None,
        rollback_to: int | None = None,
        known: int = 0,
        expires_in: float | None = None,
    ) -> Desired:
        """Return the next order without writing it, so that a ledger can hold it before the trainer sees it.

        ``clip``, ``learning_rate_scale`` and ``surprise`` are as in `rksp_core.orders.Levers`, which ``kss`` may be,
        ``rollback_to`` as in `Desired`; ``known`` is the largest generation in the ledger; ``expires_in`` is in seconds
        from now, None never expires.

        Raises
        ------
        ControlError
            When a lever is out of its range.
        """
        given = {"clip": clip, "learning_rate_scale": learning_rate_scale, "surprise": surprise}
        said = kss.beside if isinstance(kss, Levers) else {}
        levers = Levers.of(kss, **said | {name: value for name, value in given.items() if value is not None})
        now = self._clock()
        return Desired(
            run_id=run_id,
            generation=self.next_generation(known),
            kss=levers.kss,
            issued_at=timestamp(now),
            expires_at=None if expires_in is None else timestamp(now + expires_in),
            reason=reason,
            **levers.beside,
            rollback_to=rollback_to,
        )

    def issue(
        self,
        run_id: str,
        kss: KSSSettings,
        reason: Reason,
        *,
        clip: float | None = None,
        learning_rate_scale: float | None = None,
        surprise: float | None = None,
        rollback_to: int | None = None,
        known: int = 0,
        expires_in: float | None = None,
    ) -> Desired:
        """Prepare the next order as `prepare` does, write it and return it.

        Raises
        ------
        ControlError
            When a lever is out of its range, or the control folder cannot be written.
        """
        desired = self.prepare(
            run_id,
            kss,
            reason,
            clip=clip,
            learning_rate_scale=learning_rate_scale,
            surprise=surprise,
            rollback_to=rollback_to,
            known=known,
            expires_in=expires_in,
        )
        self.write(desired)
        return desired

    def desired_generation(self) -> int:
        """Return the generation in ``desired.json``, 0 when there is none that can be read."""
        document = _read(self.folder / ORDER_FILE)
        generation = document.get("generation") if isinstance(document, dict) else None
        return generation if is_whole(generation) else 0

    def write(self, desired: Desired) -> None:
        """Replace ``desired.json`` by this order.

        Raises
        ------
        ControlError
            When the control folder cannot be written.
        """
        try:
            self.make_folder()
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

    An order that is unreadable, out of range, outside the limits or meets an obstacle is ``rejected``, never clamped;
    one for another run or of an older generation is ``ignored``. Both are acknowledged here, with a message; what held
    before goes on. An order that has expired, on arrival or later, means alpha 0 and everything else the trainer's own.
    One that a restarted trainer had obeyed before comes again without ``rollback_to``: that happens once.

    Parameters
    ----------
    folder
        The control folder; it need not exist yet.
    run_id
        Orders for another run are ignored.
    limits
        What this trainer lets an order set; by default any regularizer, and nothing beside it.
    obstacle
        Says of levers within the limits why they cannot be had all the same, as a sentence; None when they can.
    own
        What holds before any order.
    mode
        Permission bits of ``applied.json``.
    clock
        Seconds since the epoch.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run_id: str,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        *,
        obstacle: Callable[[Levers], str | None] = lambda _: None,
        own: KSSSettings = KSSSettings(),  # noqa: B008
        mode: int = 0o600,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder)
        self.run_id = run_id
        self._limits, self._obstacle = limits, obstacle
        self._mode = mode
        self._clock = clock
        self._order_path = str(self.folder / ORDER_FILE)
        self._signature: tuple[int, int, int] | None = None
        self._active = Levers.of(own)
        self._active_generation = self._obeyed = 0
        self._highest, self._ended = self._acknowledged()
        self._before = self._highest  # a restart: this order was obeyed already
        self._pending_expiry: tuple[float, Desired] | None = None

    def poll(self, step: int) -> Desired | None:
        """Return an order to apply at this step boundary, or None. Costs one ``stat`` when nothing changed.

        Call `acknowledge` once it is applied. An order of this run whose time is over comes back once, as
        `Desired.ended` says: ``kss.alpha`` 0 and ``expired`` set.

        Raises
        ------
        OSError
            When an acknowledgement cannot be written (the folder is gone or full).
        """
        signature: tuple[int, int, int] | None
        try:
            signature = _signature(os.stat(self._order_path))  # noqa: PTH116 - a Path costs more than the call itself
        except OSError:
            signature = self._signature
        if signature != self._signature:
            self._signature = signature
            return self._take(step)
        # After the file: a newer order, or this one read again by a resumed trainer, says itself when it ends.
        if self._pending_expiry is not None and self._clock() >= self._pending_expiry[0]:
            order = self._pending_expiry[1]
            self._pending_expiry = None
            return order.ended()
        return None

    def acknowledge(
        self,
        desired: Desired,
        step: int,
        status: AckStatus = "applied",
        message: str = "",
        *,
        rolled_back_to: int | None = None,
    ) -> None:
        """Answer an order that `poll` returned: ``applied`` (an expired one says ``expired``), or ``rejected``.

        ``step`` is where the order was obeyed; ``rolled_back_to`` where the trainer went back to, if it was asked to
        and could.

        Raises
        ------
        OSError
            When ``applied.json`` cannot be written.
        """
        if status == "applied":
            self._active, self._active_generation = desired.levers, desired.generation
            self._obeyed = desired.generation
            if desired.expired:
                status, message = "expired", message or "the order's time is over: KSS is off"
        asked = desired.rollback_to is not None
        self._answer(desired.generation, step, status, message, rollback=asked, rolled_back_to=rolled_back_to)

    def restore(self, desired: Desired) -> None:
        """Go on with the order that held when the checkpoint was written from which a trainer resumes.

        Its time runs on. The order in the folder, the same one or a newer one, is obeyed at the next `poll` as ever.
        """
        self._active, self._active_generation = desired.levers, desired.generation
        self._before = max(self._before, desired.generation)
        if desired.expires_at is not None and not desired.expired:
            self._pending_expiry = seconds(desired.expires_at), desired

    @property
    def active(self) -> tuple[int, KSSSettings]:
        """The generation and the settings that hold now."""
        return self._active_generation, self._active.kss

    def _take(self, step: int) -> Desired | None:
        document = None
        try:
            document = self._open()
            desired = Desired.from_dict(document)
        except ControlError as error:
            generation = document.get("generation") if isinstance(document, dict) else None
            self._answer(generation if is_whole(generation) else 0, step, "rejected", str(error))
            return None
        refusal = self._refusal(desired)
        if refusal is not None:
            self._answer(desired.generation, step, "ignored", refusal)
            return None
        objection = self._limits.refusal(desired) or self._obstacle(desired.levers)
        if objection is not None:
            self._answer(desired.generation, step, "rejected", objection)
            return None
        self._highest = desired.generation
        if desired.generation <= self._before:
            desired = desired.standing
        self._pending_expiry = None
        if desired.expires_at is not None:
            end = seconds(desired.expires_at)
            # A clock that was set back must not revive, after a restart, an order that was over before.
            if end <= self._clock() or desired.generation == self._ended:
                return desired.ended()
            self._pending_expiry = (end, desired)
        return desired

    def _open(self) -> Any:
        """Return the JSON of the order and note which file it came from: another may just have taken its place."""
        try:
            with open(self._order_path, "rb") as stream:  # noqa: PTH123 - as for its `stat`
                self._signature = _signature(os.fstat(stream.fileno()))
                return _parsed(stream.read())
        except OSError as error:
            raise ControlError(
                f"the order cannot be read ({error.strerror}); it must be a file that this user may read"
            ) from error

    def _refusal(self, desired: Desired) -> str | None:
        if desired.run_id != self.run_id:
            return f"the order is for run {desired.run_id!r}, this is run {self.run_id!r}"
        if desired.generation < self._highest or desired.generation == self._obeyed:
            return f"generation {desired.generation} is not newer than {max(self._highest, self._obeyed)}"
        return None

    def _answer(
        self,
        generation: int,
        step: int,
        status: str,
        message: str,
        *,
        rollback: bool = False,
        rolled_back_to: int | None = None,
    ) -> None:
        if status in {"rejected", "ignored"}:
            _log.warning("step %d: order %d is %s: %s", step, generation, status, message)
        answer = Acknowledgement(
            self.run_id,
            generation,
            step,
            timestamp(self._clock()),
            status,
            message,
            self._active_generation,
            self._active.kss,
            self._active.clip,
            self._active.learning_rate_scale,
            self._active.surprise,
            rollback,
            rolled_back_to,
        )
        # A trainer's first poll may come before the monitor created the folder; then there was no order to answer.
        write_atomic(
            self.folder / ACK_FILE,
            json.dumps(answer.to_dict(), indent=1, allow_nan=False) + "\n",
            mode=self._mode,
        )

    def _acknowledged(self) -> tuple[int, int]:
        """Return the generation that this run last obeyed, and the one whose time was over; 0 for none.

        After a restart, orders older than the first stay ignored; that one is applied again unless it had expired.
        """
        try:
            answer = Acknowledgement.from_dict(_read(self.folder / ACK_FILE))
        except ControlError:
            return 0, 0
        if answer.run_id != self.run_id:
            return 0, 0
        return answer.active_generation, answer.generation if answer.status == "expired" else 0


def _read(path: Path) -> Any:
    """Return the JSON in ``path``, or None when it is missing or no JSON."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _signature(stat: os.stat_result) -> tuple[int, int, int]:
    """Return what changes whenever a file is replaced."""
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
