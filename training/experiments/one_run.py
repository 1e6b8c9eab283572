"""One run of a sweep, from its plan to its record, in memory."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rksp_core.device import choose_device
from rksp_core.features import figures
from rksp_core.lookahead import look_ahead
from rksp_core.profile import SUMMARY_FIELDS, ModelProfile
from rksp_core.wasserstein import Curves, distances
from training.config import Config
from training.experiments.faults import Faulty
from training.experiments.onset import onset
from training.experiments.plan import PlannedRun, configuration
from training.experiments.record import SCHEMA, Record, compact, compact_all
from training.experiments.spec import Spec
from training.experiments.trace import Trace
from training.loop import conclude, drive
from training.optimizers import build_optimizer
from training.ranks import Ranks
from training.run import build_run
from training.tasks import PROBE

# Of each layer of the profile before the first step.
LAYER_FIELDS = tuple(
    name for name in SUMMARY_FIELDS if name not in ("mid_mass", "eigenvector_condition", "reliable_modes_ratio")
)


@dataclass(frozen=True)
class Attempt:
    """How an attempt at a run ended: a record, an ``error``, or neither when the time was over before it began."""

    run: PlannedRun
    record: Record | None = None
    error: str = ""


def attempt(spec: Spec, planned: PlannedRun, device: str, deadline: float | None) -> Attempt:
    """Carry out a run in a worker, unless the clock is past ``deadline``; its trouble does not end the others."""
    if deadline is not None and time.time() > deadline:
        return Attempt(planned)
    try:
        return Attempt(planned, carry_out(spec, planned, device))
    except Exception as error:  # noqa: BLE001 - it is said at the end
        return Attempt(planned, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def carry_out(spec: Spec, planned: PlannedRun, device: str) -> Record:
    """Make a run and return its record; one thread, nothing is written.

    Raises
    ------
    RkspError
        When it cannot start.
    """
    torch.set_num_threads(1)
    chosen = choose_device(device)
    config = planned.config(spec, device)
    run = build_run(config, Ranks(0, 1, chosen))
    faults = [] if planned.fault is None else [Faulty(run, planned.fault)]
    trace = Trace(run, spec.measure)
    trace.after(run, None)
    curves = {} if trace.first is None else figures(trace.first).curves
    ahead = [_look_ahead(trace, curves, count) for count in spec.measure.look_ahead]
    before = trace.seconds
    seconds = drive(run, [trace, *faults], begun=True)
    result = conclude(run, seconds=seconds)
    diverged_at = run.labels.rksp
    chance = chance_loss(config)
    return {
        "schema": SCHEMA,
        "sweep": spec.name,
        "key": planned.key,
        "group": planned.group,
        "part": planned.part,
        "seed": planned.seed,
        "configuration": configuration(config, planned.fault),
        "environment": environment(chosen),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "chance_loss": compact(chance),
        "initial": _initial(trace.first),
        "look_ahead": ahead,
        **trace.document(),
        "labels": result["diverged_at"],
        "onset": None if diverged_at is None else onset(trace.losses, trace.gradient_norms, diverged_at),
        "horizon": result["horizon"],
        "step": result["step"],
        "status": result["status"],
        "final": {"loss": compact(result["loss"]), "accuracy": compact(result["accuracy"])},
        "learned": bool(diverged_at is None and result["loss"] is not None and result["loss"] <= chance / 2),
        "seconds": {
            "training": round(seconds - (trace.seconds - before), 2),
            "measuring": round(trace.seconds, 2),
            "look_ahead": round(sum(each["seconds"] for each in ahead), 2),
        },
    }


def chance_loss(config: Config) -> float:
    """Return the loss of guessing, in nats: all classes equally likely, and in associative recall all values."""
    task = config.task
    if task.name == "associative_recall":
        return math.log(task.vocabulary / 2)
    return math.log(task.classes if task.name == "images" else task.vocabulary)


def _look_ahead(trace: Trace, curves: Curves, count: int) -> dict[str, Any]:
    """Take ``count`` steps of the run's own optimizer at the full rate on a copy, and profile it again.

    One held-out batch of the run's size, again and again: a preflight has no more. Neither warm-up nor clipping.
    ``features`` and ``distances`` (to the ``curves`` of the model itself) are empty where it did not stay finite.
    """
    began, run = time.perf_counter(), trace.twin
    batch = run.task.batch(PROBE, 1, run.config.task.batch)
    targets = batch.targets.to(run.ranks.device)
    found = look_ahead(
        run.model,
        run.to_model(batch.inputs),
        lambda logits, _: run.task.loss(logits, targets),
        learning_rate=run.config.optimizer.learning_rate,
        optimizer=lambda moved: build_optimizer(run.config.optimizer, moved),
        steps=count,
        seed=run.config.seed,
        profile=trace.profile,
    )
    return {
        "steps": count,
        "finite": found.finite,
        "losses": [compact(loss) for loss in found.losses],
        "gradient_norms": [compact(norm) for norm in found.gradient_norms],
        "hidden_rms_before": compact(found.hidden_rms_before),
        "hidden_rms_after": compact(found.hidden_rms_after),
        "features": {} if found.profile is None else compact_all(figures(found.profile).numbers),
        "distances": {} if found.profile is None else compact_all(distances(figures(found.profile).curves, curves)),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _initial(profile: ModelProfile | None) -> dict[str, Any]:
    if profile is None:
        return {}
    layers = {name: [compact(value) for value in profile.values(name)] for name in LAYER_FIELDS}
    return {"features": compact_all(figures(profile).numbers), "layers": layers}


def environment(device: torch.device) -> dict[str, str]:
    """Return what a record says about where its run was made."""
    return {
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
