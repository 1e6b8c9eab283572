"""A run in memory: its parts, what a checkpoint keeps of them, and how they are brought back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rksp_core import KSSRegularizer
from rksp_core.errors import ConfigError
from training.build import build_model, build_optimizer, build_task
from training.checkpoint import load_checkpoint
from training.config import Config
from training.labels import Labels
from training.ranks import Ranks
from training.tasks import Batch, Task


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
    step: int = 0
    labels: Labels = field(default_factory=Labels)

    @property
    def diverged(self) -> bool:
        """Whether the label `rksp` holds."""
        return self.labels.rksp is not None

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return this process's share of a batch, on its device."""
        share = slice(self.ranks.rank, None, self.ranks.size)
        return Batch(*(part[share].to(self.ranks.device) for part in self.task.batch(stream, step, size)))

    def state(self) -> dict[str, Any]:
        """Return what a resume needs beside the weights; random numbers are functions of the step and need nothing."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "kss": self.regularizer.state_dict(),
            "labels": asdict(self.labels),
        }

    def restore(self, checkpoint: Path) -> None:
        """Bring a fresh run to where the checkpoint was written.

        Raises
        ------
        CheckpointError
            When the checkpoint is damaged.
        """
        weights, state = load_checkpoint(checkpoint)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.regularizer.load_state_dict(state["kss"])
        self.labels = Labels(**state["labels"])
        self.step = state["step"]


def build_run(config: Config, ranks: Ranks) -> Run:
    """Make a run at step 0.

    Raises
    ------
    RkspError
        When the configuration cannot be carried out: the factory, its arguments, no residual blocks, a batch that the
        processes cannot share equally.
    """
    if config.task.batch % ranks.size:
        raise ConfigError(
            f"task.batch = {config.task.batch} cannot be shared equally by {ranks.size} processes; choose a multiple"
        )
    task = build_task(config.task, config.seed)
    model = build_model(config.model, config.seed).to(ranks.device).train()
    optimizer = build_optimizer(config.optimizer, model)
    regularizer = KSSRegularizer(model, **config.kss.model_dump(), seed=config.seed)
    return Run(config, ranks, task, model, ranks.wrap(model), optimizer, regularizer)
