"""The training loop.

Every random number of a step is a function of (seed, step): batches come from counted streams, and torch is seeded
anew at each step. So a resumed run is bitwise the run that was never interrupted, and observers, whatever they draw,
change nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rksp_core import KSSRegularizer
from rksp_core.atomic import write_atomic
from training.build import build_model, build_optimizer, build_task, learning_rate
from training.callbacks import Control, MetricsLog, Profiles, Record, Say
from training.checkpoint import keep_newest, load_checkpoint, save_checkpoint, step_of
from training.config import Config
from training.labels import Labels, judge
from training.ranks import Ranks
from training.run_folder import open_folder, write_probe
from training.tasks import EVALUATION, PROBE, TRAINING, Batch, Task

EVALUATED_SEQUENCES = 512


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

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return this process's share of a batch, on its device."""
        share = slice(self.ranks.rank, None, self.ranks.size)
        return Batch(*(part[share].to(self.ranks.device) for part in self.task.batch(stream, step, size)))


def build(config: Config, ranks: Ranks) -> Run:
    """Make a run at step 0.

    Raises
    ------
    RkspError
        When the configuration cannot be carried out: the factory, its arguments, the device, no residual blocks.
    """
    task = build_task(config.task, config.seed)
    model = build_model(config.model, config.seed).to(ranks.device).train()
    optimizer = build_optimizer(config.optimizer, model)
    regularizer = KSSRegularizer(model, **config.kss.model_dump(), seed=config.seed)
    return Run(config, ranks, task, model, ranks.wrap(model), optimizer, regularizer)


def train(
    config: Config,
    ranks: Ranks,
    *,
    resume: bool = False,
    until: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Train to ``config.steps``, or until the run diverges, ``until`` is reached or ``stop`` says so.

    Returns
    -------
    dict
        The content of ``result.json``: status ``finished`` | ``diverged`` | ``stopped``, the two divergence labels.

    Raises
    ------
    RkspError
        When the run cannot start or continue, or a checkpoint cannot be written.
    """
    run = build(config, ranks)
    start = open_folder(config, resume=resume) if ranks.first else None
    run_step = int(ranks.from_first([-1 if start is None else step_of(start)])[0])
    folder, say = Path(config.output), say if ranks.first else lambda _: None
    if run_step >= 0:
        restore(run, folder / "checkpoints" / f"step-{run_step:08d}")
        say(f"resumed from step {run.step}")
    control = Control(
        config.control_folder,
        config.run_id,
        every=config.control.every,
        ranks=ranks,
        regularizer=run.regularizer,
        say=say,
    )
    observers = Observers(run, folder, say) if ranks.first else None
    began, last = time.perf_counter(), min(config.steps, until or config.steps)
    if observers is not None and run.step == 0:
        observers.after(run, None)
    while run.step < last and run.labels.rksp is None and not control.obey(run.step, stop=stop()):
        record = advance(run)
        if observers is not None:
            observers.after(run, record)
    result = conclude(run, seconds=time.perf_counter() - began)
    if observers is not None:
        observers.close(run, result)
    return result


def advance(run: Run) -> Record:
    """Make one step; when the run diverges in it, the weights stay as they are."""
    config, step = run.config, run.step + 1
    seed_step(config.seed, step, run.ranks)
    rate = learning_rate(config.optimizer.learning_rate, config.schedule, step, config.steps)
    batch = run.batch(TRAINING, step, config.task.batch)
    weight = run.regularizer.settings.alpha
    with run.regularizer:
        loss = run.task.loss(run.parallel(batch.input_ids), batch.targets)
    term = run.regularizer.term()
    run.optimizer.zero_grad(set_to_none=True)
    (loss + term).backward()
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    record = Record(
        step,
        run.ranks.mean(loss),
        float(norm),
        rate,
        weight,
        run.ranks.mean(term),
        run.regularizer.skipped_layers,
    )
    run.labels = judge(run.labels, step, record.loss, record.gradient_norm)
    if run.labels.rksp is None:
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        run.step = step
    return record


def seed_step(seed: int, step: int, ranks: Ranks) -> None:
    """Seed the random state that a model may draw from (dropout, say) as a function of seed, step and process."""
    state = int(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)  # `torch.manual_seed` asks after every kind of device: 0.2 ms a step
    if ranks.device.type == "cuda":
        torch.cuda.manual_seed(state)


def restore(run: Run, checkpoint: Path) -> None:
    """Bring a fresh run to where the checkpoint was written.

    Raises
    ------
    CheckpointError
        When the checkpoint is damaged.
    """
    weights, state = load_checkpoint(checkpoint)
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(state["optimizer"])
    run.regularizer.load_state_dict(state["kss"])
    run.labels = Labels(**state["labels"])
    run.step = state["step"]


def conclude(run: Run, *, seconds: float) -> dict[str, Any]:
    """Evaluate the run on held-out sequences and say how it ended."""
    config = run.config
    status = "diverged" if run.labels.rksp is not None else "finished" if run.step == config.steps else "stopped"
    held_out = run.task.batch(EVALUATION, 0, EVALUATED_SEQUENCES)
    with torch.no_grad():
        logits = run.model(held_out.input_ids.to(run.ranks.device)).cpu()
    loss = float(run.task.loss(logits, held_out.targets))
    return {
        "schema": "rksp.result/1",
        "run_id": config.run_id,
        "status": status,
        "step": run.step,
        "horizon": config.steps,
        "diverged_at": {"paper": run.labels.paper, "rksp": run.labels.rksp},
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": float(run.task.accuracy(logits, held_out.targets)),
        "evaluated_sequences": EVALUATED_SEQUENCES,
        "kss_skipped_layers": run.regularizer.skipped_layers,
        "seconds": round(seconds, 3),
    }


class Observers:
    """The log, the profiles and the checkpoints of rank 0."""

    def __init__(self, run: Run, folder: Path, say: Say) -> None:
        config = run.config
        probe = run.task.batch(PROBE, 0, config.profile.sequences).input_ids
        write_probe(folder, probe)
        self._folder = folder
        self._log = MetricsLog(folder / "metrics.jsonl", step=run.step, print_every=config.print_every, say=say)
        self._profiles = Profiles(
            folder,
            every=config.profile.every,
            samples=config.profile.samples,
            probe=probe.to(run.ranks.device),
            say=say,
        )
        self._record: Record | None = None

    def after(self, run: Run, record: Record | None) -> None:
        """Observe a step that was made; None: the state before the first."""
        self._record = record
        if record is not None:
            self._log.write(record)
        if run.labels.rksp is None:
            self._profiles.at(run.step, run.model, record)
            every = run.config.checkpoint.every
            if every and run.step % every == 0:
                self._save(run)

    def close(self, run: Run, result: dict[str, Any]) -> None:
        """Write the last checkpoint (unless the run diverged) and the result."""
        self._log.close()
        if run.labels.rksp is None and run.config.checkpoint.every:
            self._save(run)
        write_atomic(self._folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")

    def _save(self, run: Run) -> None:
        config, folder = run.config, self._folder / "checkpoints"
        state = {
            "step": run.step,
            "optimizer": run.optimizer.state_dict(),
            "kss": run.regularizer.state_dict(),
            "labels": asdict(run.labels),
        }
        description = {
            "run_id": config.run_id,
            "metrics": None if self._record is None else self._record.to_dict(),
            "config": config.model_dump(mode="json"),
        }
        save_checkpoint(folder, run.step, run.model.state_dict(), state, description)
        if config.checkpoint.keep_last is not None:
            keep_newest(folder, config.checkpoint.keep_last)
