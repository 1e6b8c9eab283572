"""How a training loop obeys a monitor in two lines, in one process or in many at once.

    follower = ControlFollower("runs/my-run/control", "my-run", regularizer)
    for step in range(steps):
        follower.follow(step)   # rank 0 reads, every process applies, rank 0 answers
        ...

The numbers of an order travel as one small tensor, at a step boundary and nowhere else: no process ever acts on an
order that another one has not seen.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from rksp_core.control import ControlListener
from rksp_core.kss import KSSRegularizer
from rksp_core.limits import Limits
from rksp_core.orders import VARIANTS, Desired, Levers
from rksp_core.surprise import obstacle

_log = logging.getLogger(__name__)

_NONE = [0.0] * 10

Rollback = Callable[[int], int | None]


class ControlFollower:
    """Obeys the orders of a monitor: rank 0 reads, all processes apply at the same boundary, rank 0 acknowledges once.

    The regularizer is configured here. What an order sets beside it, where the limits allow that, the loop takes from
    ``levers``: the clip threshold, the factor on the learning rate, the limit of surprise; None is the loop's own.

    An answer that cannot be written is logged, and never stops the run. Where `torch.distributed` runs by the first
    call of `follow`, every process makes a follower and calls it at the same steps, which costs one small broadcast
    between CPUs.

    Parameters
    ----------
    folder
        The control folder; it need not exist yet.
    run_id
        Orders for another run are ignored.
    regularizer
        What an order switches and configures.
    limits
        What this trainer lets an order set; by default any regularizer, and nothing beside it. The shipped policy
        orders half the learning rate: a loop that applies it says ``Limits(learning_rate_scale=(0.01, 1.0))``.
    optimizers
        Those that the loop steps with, where ``limits.surprise`` is set: an order of surprise is rejected, rather than
        raised in the middle of a step, where one of them keeps no second moments (`rksp_core.surprise.obstacle`).
    rollback
        Takes the loop back to its newest checkpoint at or before a step, weights, optimizer, schedule and its own
        count of steps, and returns the step from which it goes on; None where there is no such checkpoint. Called in
        every process at the same boundary, before the levers of the order are set. Without it an order's other levers
        are obeyed, and the answer says that this trainer cannot go back.
    mode
        Permission bits of the answer.

    Attributes
    ----------
    levers
        What holds now.
    order
        The order that was obeyed last, in the process that reads; None before the first.
    rollback
        As above; a loop may set it later.
    rollbacks
        How often it went back; `state_dict` keeps it over restarts. A checkpoint knows of none after it: a loop that
        is resumed from there forgets these, unless it keeps the number and sets it, as the bundled trainer does.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run_id: str,
        regularizer: KSSRegularizer,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        *,
        optimizers: Iterable[Optimizer] = (),
        rollback: Rollback | None = None,
        mode: int = 0o600,
    ) -> None:
        self.levers = Levers.of(regularizer.settings)
        self.order: Desired | None = None
        self.rollback, self.rollbacks = rollback, 0
        self._regularizer, self._limits, self._optimizers = regularizer, limits, tuple(optimizers)
        self._listener: ControlListener | None = ControlListener(
            folder, run_id, limits, obstacle=self._unable, own=self.levers.kss, mode=mode
        )
        self._several: bool | None = None  # not known before the first step: a loop may join its processes until then
        self._group: dist.ProcessGroup | None = None

    def follow(self, step: int) -> Levers | None:
        """Obey an order that has come since the last call; return what holds from now on, None when nothing changed.

        ``step`` counts the updates made so far; an order may have taken the loop back when this returns.
        """
        if self._several is None:
            self._join()
        desired = self._poll(step)
        if desired is None and not self._several:
            return None
        hindrance = self._hindrance(desired)
        *numbers, back = self._from_first(_numbers(desired, rollback=hindrance is None))
        levers, reached = _levers(numbers), None
        if back and self.rollback is not None:
            reached = self.rollback(int(back) - 1)
            self.rollbacks += reached is not None
        if levers is not None:
            self._set(levers)
        if desired is not None:
            self._acknowledge(desired, step, reached, hindrance)
        return levers

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON-able values; rank 0 has it."""
        order = None if self.order is None else {**self.order.standing.to_dict(), "expired": self.order.expired}
        return {"order": order, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the order that held when rank 0 returned this state."""
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))  # a checkpoint knows of none after it
        if state["order"] is None:
            return
        order = dict(state["order"])
        expired = order.pop("expired")
        self.order = dataclasses.replace(Desired.from_dict(order), expired=expired)
        unable = self._unable(self.order.levers)
        if unable is not None:  # the loop resumes with another optimizer
            _log.warning("order %d holds without surprise: %s", self.order.generation, unable)
            self.order = dataclasses.replace(self.order, surprise=None)
        self._set(self.order.levers)
        if self._listener is not None:
            self._listener.restore(self.order)

    def _join(self) -> None:
        """Find the other processes; the first one alone keeps its listener."""
        self._several = dist.is_available() and dist.is_initialized()
        if self._several and dist.get_rank() > 0:
            self._listener = None
        # Orders stay among CPUs: a loop that waited for its GPU at every step would be slower for it.
        if self._several and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def _set(self, levers: Levers) -> None:
        self.levers = levers
        self._regularizer.configure(levers.kss)

    def _poll(self, step: int) -> Desired | None:
        try:
            return None if self._listener is None else self._listener.poll(step)
        except OSError as error:
            _log.warning("step %d: an order was refused, and the answer cannot be written: %s", step, error)
            return None

    def _unable(self, levers: Levers) -> str | None:
        """Return why levers that the limits allow cannot be had with these optimizers."""
        if levers.surprise is None:
            return None
        found = next(filter(None, map(obstacle, self._optimizers)), None)
        return None if found is None else f"the order asks for surprise {levers.surprise}, and {found}"

    def _hindrance(self, desired: Desired | None) -> str | None:
        """Return why an order that asks for it cannot take this loop back, whatever checkpoints there are."""
        if desired is None or desired.rollback_to is None:
            return None
        if self.rollback is None:
            return "this trainer cannot go back"
        if self.rollbacks >= self._limits.rollbacks:
            return f"this trainer goes back {self._limits.rollbacks} times at most (limits.rollbacks)"
        return None

    def _acknowledge(self, desired: Desired, step: int, reached: int | None, hindrance: str | None) -> None:
        self.order = desired
        _log.info("step %d: order %d, KSS weight %g", step, desired.generation, desired.kss.alpha)
        message = ""
        if desired.rollback_to is not None:
            missing = f"there is no checkpoint at or before step {desired.rollback_to}"
            message = (
                f"went back to step {reached}" if reached is not None else f"did not go back: {hindrance or missing}"
            )
            _log.warning("step %d: %s", step, message)
        try:
            if self._listener is not None:
                self._listener.acknowledge(desired, step, message=message, rolled_back_to=reached)
        except OSError as error:
            _log.warning("step %d: the answer cannot be written: %s", step, error)

    def _from_first(self, numbers: list[float]) -> list[float]:
        if not self._several:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(tensor, src=0, group=self._group)
        values: list[float] = tensor.tolist()
        return values


def _numbers(desired: Desired | None, *, rollback: bool) -> list[float]:
    """Return an order as numbers; 0 stands for what it does not set, and for no order.

    The last one is one more than the step to go back to, where that may be done.
    """
    if desired is None:
        return _NONE
    levers = desired.levers
    return [
        1.0,
        *(levers.alpha, levers.interval, levers.layer_fraction, levers.gamma),
        0.0 if levers.variant is None else VARIANTS.index(levers.variant) + 1.0,
        *(levers.clip or 0.0, levers.learning_rate_scale or 0.0, levers.surprise or 0.0),
        0.0 if desired.rollback_to is None or not rollback else desired.rollback_to + 1.0,
    ]


def _levers(numbers: list[float]) -> Levers | None:
    """Return the levers that `_numbers` was given."""
    order, alpha, interval, layer_fraction, gamma, variant, *beside = numbers
    if not order:
        return None
    chosen = VARIANTS[int(variant) - 1] if variant else None
    return Levers(alpha, int(interval), layer_fraction, gamma, chosen, *(value or None for value in beside))
