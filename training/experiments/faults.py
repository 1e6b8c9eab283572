"""Things that go wrong in a healthy run, on purpose and at a given step, so that there is something to be warned of.

    random_tokens     the batches of ``steps`` steps are uniformly random tokens
    constant_tokens   the batches of ``steps`` steps are one token, again and again
    learning_rate     the rate of ``steps`` steps is ``strength`` times as high
    second_moments    Adam's second moments are multiplied by ``strength``, once: a state that was restored wrongly
    momentum          the optimizer's momentum is multiplied by ``strength``, once
    weights           the weights of the middle block are multiplied by ``strength``, once: as after an overflow

A group of a sweep has one by its settings ``fault.kind``, ``fault.at``, ``fault.steps`` and ``fault.strength``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from rksp_core import find_blocks
from rksp_core.errors import ConfigError
from training.run import Run
from training.schema.mistakes import sentence
from training.schema.section import Count, Section
from training.step import Record
from training.tasks import TRAINING, Batch, Task

PREFIX = "fault."
_DATA = ("random_tokens", "constant_tokens")
_MOMENTA = ("exp_avg", "momentum_buffer")


class Fault(Section):
    """What goes wrong in step ``at``, and in the ``steps`` - 1 after it where it lasts."""

    kind: Literal["random_tokens", "constant_tokens", "learning_rate", "second_moments", "momentum", "weights"]
    at: Count
    steps: Count = 1
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _strength_where_it_means_something(self) -> Fault:
        if (self.strength is None) != (self.kind in _DATA):
            raise ValueError(f"fault.strength is for all kinds but {' and '.join(_DATA)}; fault.kind is {self.kind}")
        if self.steps > 1 and self.kind not in (*_DATA, "learning_rate"):
            raise ValueError(f"a fault of the kind {self.kind} happens once, so leave fault.steps out")
        return self

    def strikes(self, step: int) -> bool:
        """Return whether a step goes wrong."""
        return self.at <= step < self.at + self.steps


def fault_of(settings: Mapping[str, Any]) -> Fault | None:
    """Return the fault among the settings of a run.

    Raises
    ------
    ConfigError
        When it is none.
    """
    given = {name.removeprefix(PREFIX): value for name, value in settings.items() if name.startswith(PREFIX)}
    if not given:
        return None
    try:
        return Fault.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"fault: {sentence(error, Fault)}") from error


class Faulty:
    """An observer that makes a run go wrong; it comes last, so that the others see the state before.

    Random tokens are functions of the run's seed and the step.

    Raises
    ------
    ConfigError
        When the run has no such optimizer state, or its inputs are no tokens.
    """

    def __init__(self, run: Run, fault: Fault) -> None:
        self._fault = fault
        if fault.kind == "second_moments" and run.config.optimizer.name not in ("adamw", "lamb"):
            raise ConfigError(f"{run.config.optimizer.name} has no second moments; choose another fault.kind, or adamw")
        if fault.kind in _DATA:
            if run.task.batch(TRAINING, 1, 1).inputs.is_floating_point():
                raise ConfigError(f"the task {run.config.task.name} has no tokens; choose another fault.kind")
            run.task = _BadBatches(run.task, fault, run.config.seed)

    def after(self, run: Run, _: Record | None) -> None:
        """Prepare the next step."""
        step, strength = run.step + 1, self._fault.strength
        if strength is None:
            return
        if self._fault.kind == "learning_rate":
            if self._fault.strikes(step) or self._fault.strikes(run.step):
                scale = strength if self._fault.strikes(step) else None
                run.follower.levers = dataclasses.replace(run.follower.levers, learning_rate_scale=scale)
        elif self._fault.strikes(step):
            for tensor in self._tensors(run):
                tensor.detach().mul_(strength)

    def end(self, run: Run) -> None:
        """Do nothing."""

    def _tensors(self, run: Run) -> list[Tensor]:
        if self._fault.kind == "weights":
            blocks = find_blocks(run.model)
            return [each for each in blocks[len(blocks) // 2].module.parameters() if each.dim() >= 2]
        names = ("exp_avg_sq",) if self._fault.kind == "second_moments" else _MOMENTA
        return [state[name] for state in run.optimizer.state.values() for name in names if name in state]


class _BadBatches:
    """A task, some of whose training batches hold no text."""

    def __init__(self, task: Task, fault: Fault, seed: int) -> None:
        self._task, self._fault, self._seed = task, fault, seed
        self.inputs_name, self.evaluation_items = task.inputs_name, task.evaluation_items

    def batch(self, stream: int, step: int, size: int) -> Batch:
        good = self._task.batch(stream, step, size)
        if stream != TRAINING or not self._fault.strikes(step):
            return good
        return Batch(self._bad(good.inputs, step, 0), self._bad(good.targets, step, 1))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._task.loss(logits, targets)

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._task.accuracy(logits, targets)

    def _bad(self, tokens: Tensor, step: int, place: int) -> Tensor:
        if self._fault.kind == "constant_tokens":
            return torch.full_like(tokens, int(tokens.flatten()[0]))
        random = np.random.default_rng([self._seed, step, place])
        return torch.from_numpy(random.integers(0, int(tokens.max()) + 1, tuple(tokens.shape))).to(tokens)
