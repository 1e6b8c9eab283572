"""A run in memory: its parts, what a checkpoint keeps of them, and how they are brought back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rksp_core import ControlFollower, KSSRegularizer, Limits, find_blocks
from rksp_core.errors import ConfigError
from training.build import build_model, build_task, prepare_model
from training.checkpoint import load_checkpoint
from training.config import Config
from training.labels import Labels
from training.optimizers import build_optimizer
from training.ranks import Ranks
from training.stabilizers import Penalty, build_penalties
from training.stabilizers.sam import SAM
from training.tasks import Task


@dataclass
class Run:
    """Everything that a step reads and changes; ``step`` counts the updates made."""

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

    @property
    def diverged(self) -> bool:
        """Whether the label `rksp` holds."""
        return self.labels.rksp is not None

    def to_model(self, inputs: Tensor) -> Tensor:
        """Return inputs where and as the model takes them: on its device, images in float64 where it is."""
        inputs = inputs.to(self.ranks.device)
        return inputs.double() if self.config.precision == "float64" and inputs.is_floating_point() else inputs

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
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        self.regularizer.load_state_dict(state["kss"])
        for penalty, kept in zip(self.penalties, state["penalties"], strict=True):
            penalty.load_state_dict(kept)
        self.labels, self.step = Labels(**state["labels"]), state["step"]
        self.follower.load_state_dict(state["control"])


def build_run(config: Config, ranks: Ranks) -> Run:
    """Make a run at step 0.

    Raises
    ------
    RkspError
        When the configuration cannot be carried out: the factory, its arguments, no residual blocks, a batch that the
        processes cannot share equally.
    """
    parts = ranks.size * config.accumulation
    if config.task.batch % parts:
        raise ConfigError(
            f"task.batch = {config.task.batch} cannot be shared equally by {ranks.size} processes with "
            f"{config.accumulation} micro-batches each; choose a multiple of {parts}"
        )
    model = prepare_model(config, build_model(config.model, config.seed).to(ranks.device).train())
    _refuse_too_few_layers(config, len(find_blocks(model)))
    regularizer = KSSRegularizer(model, **config.kss.model_dump(), seed=config.seed)
    limits = Limits(**dict(config.control.limits))
    follower = ControlFollower(config.control_folder, config.run_id, regularizer, limits)
    penalties = build_penalties(config.stabilizers, model, config.seed)
    task = build_task(config.task, config.seed)
    parallel = ranks.wrap(model, config.parallel)
    optimizer = build_optimizer(config.optimizer, model)
    sam = None if config.stabilizers.sam is None else SAM(**config.stabilizers.sam.model_dump())
    return Run(config, ranks, task, model, parallel, optimizer, regularizer, follower, penalties, sam)


def _refuse_too_few_layers(config: Config, blocks: int) -> None:
    fraction = config.kss.layer_fraction
    if config.kss.alpha > 0 and fraction * blocks < 1:
        raise ConfigError(
            f"kss.layer_fraction = {fraction:g} of the model's {blocks} blocks is less than one layer; "
            f"choose at least {1 / blocks:.3g}"
        )
