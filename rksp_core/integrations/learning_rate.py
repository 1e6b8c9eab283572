"""A factor on the learning rate that no schedule ever sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


class LearningRateScale:
    """Multiplies the learning rates of optimizers by ``factor`` while they step, and only then.

    Schedulers that compute a rate from the last one, logs and checkpoints see the trainer's own rates: so nothing
    compounds, and a factor of 1 gives them back exactly.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.factor = 1.0
        self._own: dict[Optimizer, list[Any]] = {}
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()

    def _scale(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if self.factor == 1.0:
            return
        self._own[optimizer] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        for group, rate in zip(optimizer.param_groups, self._own.pop(optimizer, []), strict=False):
            group["lr"] = rate
