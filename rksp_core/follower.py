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
from typing import Any

import torch
import torch.distributed as dist

from rksp_core.control import ControlListener
from rksp_core.kss import KSSRegularizer
from rksp_core.limits import Limits
from rksp_core.orders import VARIANTS, Desired, Levers

_log = logging.getLogger(__name__)

_NONE = [0.0] * 8


class ControlFollower:
    """Obeys the orders of a monitor: rank 0 reads, all processes apply at the same boundary, rank 0 acknowledges once.

    The regularizer is configured here. What an order sets beside it, where the limits allow that, the loop takes from
    ``levers``: the clip threshold and the factor on the learning rate; None is the loop's own.

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
        What this trainer lets an order set; by default any regularizer, and nothing beside it.
    mode
        Permission bits of the answer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run_id: str,
        regularizer: KSSRegularizer,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        *,
        mode: int = 0o600,
    ) -> None:
        self.levers = Levers.of(regularizer.settings, None, None)
        self.order: Desired | None = None
        self._regularizer = regularizer
        self._listener: ControlListener | None = ControlListener(folder, run_id, limits, own=self.levers.kss, mode=mode)
        self._several: bool | None = None  # not known before the first step: a loop may join its processes until then
        self._group: dist.ProcessGroup | None = None

    def follow(self, step: int) -> Levers | None:
        """Obey an order that has come since the last call; return what holds from now on, None when nothing changed.

        ``step`` counts the updates made so far.
        """
        if self._several is None:
            self._join()
        desired = self._poll(step)
        if desired is None and not self._several:
            return None
        levers = _levers(self._from_first(_numbers(desired)))
        if levers is not None:
            self._set(levers)
        if desired is not None:
            self._acknowledge(desired, step)
        return levers

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON-able values; rank 0 has it."""
        order = self.order
        return {"order": None if order is None else {**order.to_dict(), "expired": order.expired}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the order that held when rank 0 returned this state."""
        if state["order"] is None:
            return
        order = dict(state["order"])
        expired = order.pop("expired")
        self.order = dataclasses.replace(Desired.from_dict(order), expired=expired)
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

    def _acknowledge(self, desired: Desired, step: int) -> None:
        self.order = desired
        _log.info("step %d: order %d, KSS weight %g", step, desired.generation, desired.kss.alpha)
        try:
            if self._listener is not None:
                self._listener.acknowledge(desired, step)
        except OSError as error:
            _log.warning("step %d: the answer cannot be written: %s", step, error)

    def _from_first(self, numbers: list[float]) -> list[float]:
        if not self._several:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(tensor, src=0, group=self._group)
        values: list[float] = tensor.tolist()
        return values


def _numbers(desired: Desired | None) -> list[float]:
    """Return an order as numbers; 0 stands for what it does not set, and for no order."""
    if desired is None:
        return _NONE
    levers = desired.levers
    return [
        1.0,
        *(levers.alpha, levers.interval, levers.layer_fraction, levers.gamma),
        0.0 if levers.variant is None else VARIANTS.index(levers.variant) + 1.0,
        *(levers.clip or 0.0, levers.learning_rate_scale or 0.0),
    ]


def _levers(numbers: list[float]) -> Levers | None:
    """Return what `_numbers` was given, its levers only."""
    order, alpha, interval, layer_fraction, gamma, variant, clip, scale = numbers
    if not order:
        return None
    chosen = VARIANTS[int(variant) - 1] if variant else None
    return Levers(alpha, int(interval), layer_fraction, gamma, chosen, clip or None, scale or None)
