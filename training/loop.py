"""The training loop: steps, observers around them, orders at their boundaries, and what is said at the end."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rksp_core.atomic import write_atomic
from rksp_core.untouched import evaluating
from training.callbacks import Checkpoints, MetricsLog, Observer, Profiles, Say
from training.config import Config
from training.exporters import exporters
from training.ranks import Ranks
from training.rollback import go_back
from training.run import Run, build_run
from training.run_folder import newest_checkpoint, open_folder, read_rollbacks, write_probe
from training.step import advance, autocast, surprise_limit
from training.tasks import PROBE
from training.tasks.evaluation import evaluate

EVALUATED_SEQUENCES = 512
RESCUE_POLL = 0.1  # seconds between two looks for the order that a diverged run waits for


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
    others: list[Observer] = []
    with ranks.together():
        if ranks.first:
            others = exporters(config)
            open_folder(config, resume=resume)
        else:
            say = _silent
    checkpoint = newest_checkpoint(config) if resume else None
    if checkpoint is not None:
        with ranks.together():
            run.restore(checkpoint)
            run.rollbacks = read_rollbacks(config)
            run.follower.rollbacks = len(run.rollbacks)
        say(f"resumed from step {run.step}")
    seconds = drive(run, usual(run, others, say), begun=checkpoint is not None, until=until, stop=stop, say=say)
    result = conclude(run, seconds=seconds)
    if ranks.first:
        write_atomic(Path(config.output) / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def drive(
    run: Run,
    observers: Sequence[Observer],
    *,
    begun: bool = False,
    until: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> float:
    """Make the steps that are left, observed, and return the seconds that took; arguments as for `train`.

    A run in memory needs no folder: ``drive(build_run(config, ranks), observers)``. ``begun``: the observers have seen
    the state before the first step already.
    """
    began, last = time.perf_counter(), run.config.steps if until is None else min(until, run.config.steps)
    run.follower.rollback = functools.partial(go_back, run, observers)
    if not begun:
        for observer in observers:
            observer.after(run, None)
    while run.step < last and not run.diverged and not obey(run, stop=stop(), say=say):
        record = advance(run)
        for observer in observers:
            observer.after(run, record)
        if run.diverged and run.config.control.wait_at_divergence:
            await_rescue(run, stop=stop, say=say)
    seconds = time.perf_counter() - began
    for observer in observers:  # before the evaluation, for which whoever sent SIGTERM may not wait
        observer.end(run)
    return seconds


def obey(run: Run, *, stop: bool, say: Say) -> bool:
    """Apply an order that has come since the last step boundary; return whether any process wants to stop."""
    if run.ranks.size > 1:
        stop = run.ranks.sum([stop]) != [0.0]
    left, due = run.step, run.diverged or run.step % run.config.control.every == 0
    levers = run.follower.follow(left) if due else None
    if levers is not None:
        own = run.config
        back = f"back to step {run.step}; " if run.step < left else ""
        say(
            f"step {left:6d}  an order: {back}KSS weight {levers.alpha:g} every {levers.interval} steps on "
            f"{levers.layer_fraction:g} of the layers, {levers.variant or own.kss.variant} form; "
            f"clip {levers.clip or own.stabilizers.clip or 'off'}, surprise {surprise_limit(run) or 'off'}, "
            f"learning rate x {levers.learning_rate_scale or 1:g}"
        )
    return stop


def await_rescue(run: Run, *, stop: Callable[[], bool], say: Say) -> None:
    """Keep a run that diverged alive until an order takes it back to a checkpoint, or its patience is over."""
    patience = run.config.control.wait_at_divergence
    say(f"step {run.step + 1:6d}  diverged; waiting {patience:g} s for an order to go back")
    end = time.monotonic() + patience
    while not obey(run, stop=stop(), say=say) and run.diverged:
        if run.ranks.from_first([time.monotonic() > end]) != [0.0]:
            return
        time.sleep(RESCUE_POLL)


def conclude(run: Run, *, seconds: float) -> dict[str, Any]:
    """Evaluate the run on held-out sequences and say how it ended."""
    at_once = run.config.task.batch // (run.ranks.size * run.config.accumulation)  # as many as in training fit
    with evaluating(run.model), autocast(run):
        figures = evaluate(run.task, lambda inputs: run.model(run.to_model(inputs)), EVALUATED_SEQUENCES, at_once)
    return {
        "schema": "rksp.result/1",
        "run_id": run.config.run_id,
        "status": "diverged" if run.diverged else "finished" if run.step == run.config.steps else "stopped",
        "step": run.step,
        "horizon": run.config.steps,
        "diverged_at": {"paper": run.labels.paper, "rksp": run.labels.rksp},
        **figures,
        "rollbacks": [asdict(rollback) for rollback in run.rollbacks],
        "kss_skipped_layers": run.regularizer.skipped_layers,
        "seconds": round(seconds, 3),
    }


def usual(run: Run, others: Sequence[Observer] = (), say: Say = lambda _: None) -> list[Observer]:
    """Return what acts after each step of a run that has a folder, with others among it.

    The checkpoint comes last: what it stands for is on disk by then.
    """
    probe = run.task.batch(PROBE, 0, run.config.profile.sequences).inputs
    together: list[Observer] = [Profiles(run, run.to_model(probe), say), Checkpoints(run)]
    if not run.ranks.first:
        return together
    write_probe(Path(run.config.output), {run.task.inputs_name: probe})
    return [MetricsLog(run, say), *others, *together]


def _silent(_: str) -> None:
    """Ranks other than 0 do not speak."""
