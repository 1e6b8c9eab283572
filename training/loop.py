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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rksp_core.atomic import write_atomic
from rksp_core.untouched import evaluating
from training.build import learning_rate
from training.callbacks import Checkpoints, Control, MetricsLog, Observer, Profiles, Record, Say
from training.config import Config
from training.labels import judge
from training.ranks import Ranks
from training.run import Run, build_run
from training.run_folder import newest_checkpoint, open_folder, write_probe
from training.tasks import EVALUATION, PROBE, TRAINING

EVALUATED_SEQUENCES = 512


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
    run = build_run(config, ranks)
    if ranks.first:
        open_folder(config, resume=resume)
    else:
        say = _silent
    ranks.wait()
    checkpoint = newest_checkpoint(config) if resume else None
    if checkpoint is not None:
        run.restore(checkpoint)
        say(f"resumed from step {run.step}")
    control = Control(config, ranks, run.regularizer, say)
    observers = _observers(run, say) if ranks.first else []
    began, last = time.perf_counter(), config.steps if until is None else min(until, config.steps)
    if checkpoint is None:
        for observer in observers:
            observer.after(run, None)
    while run.step < last and not run.diverged and not control.obey(run.step, stop=stop()):
        record = advance(run)
        for observer in observers:
            observer.after(run, record)
    result = conclude(run, seconds=time.perf_counter() - began)
    for observer in observers:
        observer.end(run)
    if ranks.first:
        write_atomic(Path(config.output) / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def advance(run: Run) -> Record:
    """Make one step; when the run diverges in it, the weights stay as they are."""
    config, step = run.config, run.step + 1
    seed_step(config.seed, step, run.ranks)
    batch = run.batch(TRAINING, step, config.task.batch)
    with run.regularizer:
        loss = run.task.loss(run.parallel(batch.inputs), batch.targets)
    term = run.regularizer.term()
    run.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss + term)
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    record = Record(
        step=step,
        loss=run.ranks.mean(loss),
        gradient_norm=float(norm),
        learning_rate=learning_rate(config.optimizer.learning_rate, config.schedule, step, config.steps),
        kss_weight=run.regularizer.settings.alpha,
        kss_term=run.ranks.mean(term),
        kss_skipped_layers=run.regularizer.skipped_layers,
    )
    run.labels = judge(run.labels, step, record.loss, record.gradient_norm)
    if not run.diverged:
        if config.stabilizers.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.stabilizers.clip, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = record.learning_rate
        run.optimizer.step()
        run.step = step
    return record


def seed_step(seed: int, step: int, ranks: Ranks) -> None:
    """Seed the random state that a model may draw from (dropout, say) as a function of seed, step and process."""
    state = int(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)  # `torch.manual_seed` asks after every kind of device: 0.2 ms a step
    if ranks.device.type == "cuda":
        torch.cuda.manual_seed(state)


def conclude(run: Run, *, seconds: float) -> dict[str, Any]:
    """Evaluate the run on held-out sequences and say how it ended."""
    held_out = run.task.batch(EVALUATION, 0, EVALUATED_SEQUENCES)
    with evaluating(run.model):
        logits = run.model(held_out.inputs.to(run.ranks.device)).cpu()
    loss = float(run.task.loss(logits, held_out.targets))
    return {
        "schema": "rksp.result/1",
        "run_id": run.config.run_id,
        "status": "diverged" if run.diverged else "finished" if run.step == run.config.steps else "stopped",
        "step": run.step,
        "horizon": run.config.steps,
        "diverged_at": {"paper": run.labels.paper, "rksp": run.labels.rksp},
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": float(run.task.accuracy(logits, held_out.targets)),
        "evaluated_sequences": EVALUATED_SEQUENCES,
        "kss_skipped_layers": run.regularizer.skipped_layers,
        "seconds": round(seconds, 3),
    }


def _observers(run: Run, say: Say) -> list[Observer]:
    """Return what rank 0 writes after each step; the checkpoint comes last: what it stands for is on disk by then."""
    probe = run.task.batch(PROBE, 0, run.config.profile.sequences).inputs
    write_probe(Path(run.config.output), {run.task.inputs_name: probe})
    return [MetricsLog(run, say), Profiles(run, probe.to(run.ranks.device), say), Checkpoints(run)]


def _silent(_: str) -> None:
    """Ranks other than 0 do not speak."""
