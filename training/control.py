"""Obeys the orders of a monitor: rank 0 reads, all processes apply at the same step boundary, rank 0 acknowledges."""

from __future__ import annotations

from collections.abc import Callable

from rksp_core import ControlListener, Desired, Limits
from rksp_core.errors import ConfigError
from rksp_core.orders import VARIANTS, Levers
from training.run import Run

Say = Callable[[str], None]


class Control:
    """The trainer's end of the control folder.

    An answer that cannot be written is said, and never stops the run; only a folder that cannot be made is an error.

    Raises
    ------
    ConfigError
        When the control folder cannot be made.
    """

    def __init__(self, run: Run, say: Say) -> None:
        config = run.config
        self._run, self._every, self._say = run, config.control.every, say
        self._listener = None
        if run.ranks.first:
            folder = config.control_folder
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"cannot make the control folder {folder} ({error.strerror}); change control.folder"
                ) from error
            self._listener = ControlListener(folder, config.run_id, limits=Limits(**dict(config.control.limits)))
            if run.order is not None:
                self._listener.restore(run.order)

    def obey(self, *, stop: bool) -> bool:
        """Apply an order that has come since the last boundary; return whether any process wants to stop.

        Where there are several processes this costs one reduction: rank 0 adds the order, the others zeros.
        """
        step = self._run.step
        desired = self._poll(step) if step % self._every == 0 else None
        if self._run.ranks.size == 1 and desired is None:
            return stop
        stops, orders, *numbers = self._run.ranks.sum([stop, desired is not None, *_numbers(desired)])
        if orders:
            self._apply(numbers)
        if desired is not None:
            self._acknowledge(desired, step)
        return stops > 0

    def _apply(self, numbers: list[float]) -> None:
        alpha, interval, layer_fraction, gamma, variant, clip, scale = numbers
        chosen = VARIANTS[int(variant) - 1] if variant else None
        self._run.levers = Levers(alpha, int(interval), layer_fraction, gamma, chosen, clip or None, scale or None)
        self._run.regularizer.configure(self._run.levers.kss)

    def _poll(self, step: int) -> Desired | None:
        try:
            return None if self._listener is None else self._listener.poll(step)
        except OSError as error:
            self._say(f"step {step:6d}  an order was refused, and the answer cannot be written: {error}")
            return None

    def _acknowledge(self, desired: Desired, step: int) -> None:
        self._run.order = desired
        levers, own = desired.levers, self._run.config
        self._say(
            f"step {step:6d}  order {desired.generation}: KSS weight {levers.alpha:g} every {levers.interval} steps on "
            f"{levers.layer_fraction:g} of the layers, {levers.variant or own.kss.variant} form; "
            f"clip {levers.clip or own.stabilizers.clip or 'off'}, learning rate x {levers.learning_rate_scale or 1:g}"
        )
        try:
            if self._listener is not None:
                self._listener.acknowledge(desired, step)
        except OSError as error:
            self._say(f"step {step:6d}  the answer cannot be written: {error}")


def _numbers(desired: Desired | None) -> list[float]:
    """Return an order as numbers, which can be added up over processes; 0 stands for what it does not name."""
    if desired is None:
        return [0.0] * 7
    levers = desired.levers
    return [
        *(levers.alpha, levers.interval, levers.layer_fraction, levers.gamma),
        0 if levers.variant is None else VARIANTS.index(levers.variant) + 1,
        *(levers.clip or 0.0, levers.learning_rate_scale or 0.0),
    ]
