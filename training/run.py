"""A run in memory: its parts, what a checkpoint keeps of them, and how they are brought back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rksp_core import ControlFollower, KSSRegularizer, Limits, find_blocks
from rksp_core.errors import ConfigError
from rksp_core.untouched import as_written, evaluating
from training.build import build_model, build_task, prepare_model
from training.checkpoint import load_checkpoint
from training.config import Config
from training.labels import Labels
from training.optimizers import build_optimizer
from training.ranks import Ranks
from training.stabilizers import Penalty, build_penalties
from training.stabilizers.sam import SAM
from training.tasks import PROBE, Task


@dataclass(frozen=True)
class Rollback:
    """The run went back from step ``left`` to ``reached``, and took its batches ``data_offset`` ahead from there on."""

    left: int
    reached: int
    diverged: bool
    data_offset: int


@dataclass
class Run:
    """Everything that a step reads and changes; ``step`` counts the updates made.

    ``rollbacks`` are kept in the run folder (`training.run_folder`), not in checkpoints, which they undo.
    """

    config: Config
    ranks: Ranks
    task: Task
    model: nn.Module
    parallel: nn.Module  # the model, its gradients averaged over the processes
    optimizer: torch.optim.Optimizer
    regularizer: KSSRegularizer
    follower: ControlFollower
    penalties: list[Penalty]
    sam: SAM | None
    step: int = 0
    labels: Labels = field(default_factory=Labels)
    rollbacks: list[Rollback] = field(default_factory=list)

    @property
    def data_offset(self) -> int:
        """How far the next batch runs ahead of its step, since those of stretches that were undone are left out."""
        return next((each.data_offset for each in reversed(self.rollbacks) if each.reached <= self.step), 0)

    @property
    def diverged(self) -> bool:
        """Whether the label `rksp` holds."""
        return self.labels.rksp is not None

    def to_model(self, inputs: Tensor) -> Tensor:
        """Return inputs where and as the model takes them: on its device, images in float64 where it is."""
        return _to_model(inputs, self.config, self.ranks)

    def state(self) -> dict[str, Any]:
        """Return what a resume needs beside weights and optimizer, as plain JSON.

        Random numbers are functions of the step and need nothing.
        """
        return {
            "step": self.step,
            "kss": self.regularizer.state_dict(),
            "penalties": [penalty.state_dict() for penalty in self.penalties],
            "labels": asdict(self.labels),
            "control": self.follower.state_dict(),
        }

    def restore(self, checkpoint: Path) -> None:
        """Bring a fresh run to where the checkpoint was written.

        Raises
        ------
        CheckpointError
            When the checkpoint is damaged.
        """
        state = self._load(checkpoint)
        self.follower.load_state_dict(state["control"])

    def go_back(self, checkpoint: Path) -> None:
        """Bring this run back to where the checkpoint was written; what orders have set stays as it is.

        Raises
        ------
        CheckpointError
            When the checkpoint is damaged.
        """
        left, diverged, ahead = self.step, self.diverged, self.data_offset
        self._load(checkpoint)
        seen = left + diverged - self.step  # a step that diverges has seen its batch
        offset = ahead + (seen if self.config.control.skip_batches else 0)
        self.rollbacks.append(Rollback(left, self.step, diverged, offset))

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        self.regularizer.load_state_dict(state["kss"])
        for penalty, kept in zip(self.penalties, state["penalties"], strict=True):
            penalty.load_state_dict(kept)
        self.labels, self.step = Labels(**state["labels"]), state["step"]
        return state


def build_run(config: Config, ranks: Ranks) -> Run:
    """Make a run at step 0.

    Raises
    ------
    RkspError
        When the configuration cannot be carried out: the factory, its arguments, no residual blocks, a batch that the
        processes cannot share equally, a task that is not the model's.
    """
    parts = ranks.size * config.accumulation
    if config.task.batch % parts:
        raise ConfigError(
            f"task.batch = {config.task.batch} cannot be shared equally by {ranks.size} processes with "
            f"{config.accumulation} micro-batches each; choose a multiple of {parts}"
        )
    with ranks.together():
        model = prepare_model(config, build_model(config.model, config.seed).to(ranks.device).train())
        blocks = len(find_blocks(model))
        _refuse_too_few_layers(config, blocks)
        task = build_task(config.task, config.seed)
        _refuse_another_task(config, ranks, model, task)
    regularizer = KSSRegularizer(model, **config.kss.model_dump(), seed=config.seed)
    limits = Limits(**dict(config.control.limits))
    least, most = limits.layer_fraction  # an order may not ask for less than one layer either
    limits = replace(limits, layer_fraction=(max(least, 1 / blocks), most))
    penalties = build_penalties(config.stabilizers, model, config.seed)
    parallel = ranks.wrap(model, config.parallel)
    optimizer = build_optimizer(config.optimizer, model)
    follower = ControlFollower(config.control_folder, config.run_id, regularizer, limits, optimizers=[optimizer])
    sam = None if config.stabilizers.sam is None else SAM(**config.stabilizers.sam.model_dump())
    return Run(config, ranks, task, model, parallel, optimizer, regularizer, follower, penalties, sam)


def _to_model(inputs: Tensor, config: Config, ranks: Ranks) -> Tensor:
    inputs = inputs.to(ranks.device)
    return inputs.double() if config.precision == "float64" and inputs.is_floating_point() else inputs


def _refuse_another_task(config: Config, ranks: Ranks, model: nn.Module, task: Task) -> None:
    """Run the model on one sequence or image, so that a mistake is seen before anything is written."""
    inputs, targets = task.batch(PROBE, 0, 1)
    try:
        with evaluating(model), as_written():
            task.loss(model(_to_model(inputs, config, ranks)), targets.to(ranks.device))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{type(model).__name__} raised {type(error).__name__} on the first inputs of the task "
            f"{config.task.name} ({reason}); choose a model and a task that fit"
        ) from error


def _refuse_too_few_layers(config: Config, blocks: int) -> None:
    fraction = config.kss.layer_fraction
    if config.kss.alpha > 0 and fraction * blocks < 1:
        raise ConfigError(
            f"kss.layer_fraction = {fraction:g} of the model's {blocks} blocks is less than one layer; "
            f"choose at least {1 / blocks:.3g}"
        )
