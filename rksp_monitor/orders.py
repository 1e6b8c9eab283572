"""The monitor's orders to one trainer: prepared with the ledger's knowledge, delivered after the ledger holds them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError
from rksp_core.orders import Acknowledgement, Desired, seconds
from rksp_core.policy import Decision, PolicyState
from rksp_monitor.ledger import Ledger
from rksp_monitor.ownership import Owned, owned

_PERSON = "a person: "  # how the reason of an order begins that the policy did not give
STATE = "order"  # the ledger's name for the last order
OWNER = "watcher"  # of the orders in a control folder: what its lock is called


@contextlib.contextmanager
def sole_orderer(control: ControlWriter) -> Iterator[None]:
    """Be the only watcher that gives orders in a control folder; one that knows no locks is left to its luck.

    Raises
    ------
    ConfigError
        When another watcher does, with whatever state folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            control.make_folder()
            stack.enter_context(owned(control.folder / OWNER, mode=0o660 if control.shared else 0o600))
        except Owned as error:
            raise ConfigError(
                f"{control.folder} gets its orders from {error} already; stop that watcher first, or let one of the "
                "two observe (enforce: false)"
            ) from error
        except OSError:
            pass  # a folder that cannot be written is said, and tried again, when there is an order
        yield


class Orders:
    """Orders of one run.

    An order is stored in the ledger, in the transaction of the event that led to it, before it is written; so a crash
    between the two repeats the same order with the same generation, and never gives a generation twice. Without a
    ``control`` folder there is no trainer to tell anything.
    """

    def __init__(self, run: str, ledger: Ledger, control: ControlWriter | None) -> None:
        self._run, self._ledger, self._control = run, ledger, control

    @property
    def last(self) -> Desired | None:
        """The order of the largest generation in the ledger."""
        stored = self._ledger.load(STATE)
        return Desired.from_dict(stored) if stored else None

    def prepare(self, decision: Decision, until: float | None, now: float) -> Mapping[str, Mapping[str, Any]]:
        """Return the documents to store in the ledger for a decision: the next order, or nothing.

        It expires at ``until``, also when no watcher runs by then; what a person ordered says whose word it is.
        """
        if decision.order is None or self._control is None:
            return {}
        last = self.last
        levers, reason, hold, back_to = decision.order, decision.reason, decision.hold, decision.rollback_to
        if back_to is None and hold is None:
            back_to = self._unread(last, now)
        if hold is not None and hold.levers is not None:
            reason = dataclasses.replace(reason, metric=f"{_PERSON}{hold.by}, {hold.reason}")
        order = self._control.prepare(
            self._run,
            levers.kss,
            reason,
            **levers.beside,
            rollback_to=back_to,
            known=last.generation if last else 0,
            expires_in=None if until is None else until - now,
        )
        return {STATE: order.to_dict()}

    def deliver(self) -> None:
        """Write the last order unless it is there: the first time, or again after a crash or a full disk.

        Raises
        ------
        ControlError
            When the control folder cannot be written.
        """
        last = self.last
        if last is not None and self._control is not None and self._control.desired_generation() < last.generation:
            self._control.write(last)

    def foreign(self) -> int:
        """Return the generation in the control folder when another watcher wrote it, else 0."""
        last = self.last
        found = 0 if self._control is None else self._control.desired_generation()
        return found if last is not None and found > last.generation else 0

    def reconcile(self, state: PolicyState) -> PolicyState:
        """Return the policy's state with what was really ordered, when, and until when.

        A monitor that only observed, or was told to forget its state, thinks otherwise, and would renew too late.
        """
        last = self.last
        if last is None:  # nor was there a rollback, or anything for a ratchet to keep
            return PolicyState(state.level, state.series, held=state.held, healthy_step=state.healthy_step)
        steps = [step for step in (state.ordered_step, last.reason.checkpoint_step) if step is not None]
        return dataclasses.replace(
            state,
            ordered=last.levers,
            ordered_level=last.reason.risk_level,
            ordered_step=min(steps, default=None),  # the lower one, where the trainer went back since
            ordered_at=seconds(last.issued_at),
            ordered_until=None if last.expires_at is None else seconds(last.expires_at),
        )

    def answer(self) -> Acknowledgement | None:
        """Return the last acknowledgement in the control folder, whoever wrote it."""
        return None if self._control is None else self._control.applied()

    def rollback(self) -> tuple[int, int, float] | None:
        """Return the step that this run's trainer says it went back to, the generation that asked for it, and when."""
        answer = self.answer()
        if answer is None or answer.run_id != self._run or answer.rolled_back_to is None:
            return None
        try:
            return answer.rolled_back_to, answer.generation, seconds(answer.at)
        except ValueError:
            return None

    def overdue(self, now: float, within: float) -> Desired | None:
        """Return the order that the trainer should have answered by now, if there is one.

        One that has run out asks for nothing any more. A trainer of another name does not answer for this one.
        """
        last = self.last
        if last is None or now - seconds(last.issued_at) <= within:
            return None
        if last.expires_at is not None and now > seconds(last.expires_at):
            return None
        return None if self._answered(last) else last

    def _answered(self, order: Desired) -> bool:
        answer = self.answer()
        return answer is not None and answer.run_id == self._run and answer.generation >= order.generation

    def _unread(self, last: Desired | None, now: float) -> int | None:
        """Return the step that the policy's last order asks to go back to, where the trainer has not answered it yet.

        The next order takes its place in the control folder, maybe before the trainer has looked.
        """
        if last is None or last.rollback_to is None or (last.reason.metric or "").startswith(_PERSON):
            return None
        over = last.expires_at is not None and now > seconds(last.expires_at)
        return None if over or self._answered(last) else last.rollback_to
