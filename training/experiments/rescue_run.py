"""One run beside a real watcher, in lockstep with it or free, from its plan to its record.

In lockstep the run waits, ``lag`` steps after each profile, until the watcher's metrics say that the profile was
judged; only there it looks for an order. What the run does is then a function of its seed, its arm and the lag, and of
no clock. A run that diverged waits likewise for what the watcher makes of that, and ends where it is not taken back.

A record (schema "rksp.rescue_record/1"):

    schema, experiment, key, arm, point, seed, lockstep, lag
    environment     as in a sweep's record
    status          finished | diverged; ``diverged_at``: both labels; ``step``, ``horizon``
    failed          whether it finished with a held-out loss above half of chance
    final           held-out ``loss`` and ``accuracy``; of a diverged run those of its last state before
    losses          mean training loss of every 50 steps of what stands in the end
    orders          each that was obeyed: ``step``, ``generation``, ``levers``, ``reason``
    rollbacks       `training.run.Rollback`
    overhead        ``steps`` made in all, ``step_seconds`` (the median of those without a KSS term), ``kss`` (seconds
                    of the others above it) and the ``ratio`` of what was added, by steps made again and by KSS
    seconds         ``training`` (all steps), ``observing`` (profiles, checkpoints), ``waiting`` for the watcher
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
from prometheus_client.parser import text_string_to_metric_families

from rksp_core.device import choose_device
from rksp_core.errors import RkspError
from rksp_core.orders import Levers
from training.experiments.one_run import chance_loss, environment
from training.experiments.record import Record, compact
from training.experiments.rescue_spec import RescueRun, RescueSpec
from training.loop import conclude, drive, usual
from training.ranks import Ranks
from training.run import Run, build_run
from training.run_folder import open_folder
from training.step import Record as StepRecord

SCHEMA = "rksp.rescue_record/1"
LOSS_STEPS = 50
PATIENCE = 300.0  # seconds until a watcher that does not judge a profile counts as gone
POLL = 0.02
JUDGED, PROCESSED = "rksp_checkpoint_last_processed_step", "rksp_checkpoints_processed_total"


class Watcher:
    """What a watcher says about one run, at its metrics endpoint."""

    def __init__(self, port_file: Path, run_id: str) -> None:
        names = urlencode([("name[]", JUDGED), ("name[]", PROCESSED)])
        self._url = f"http://{port_file.read_text(encoding='utf-8').strip()}/metrics?{names}"
        self._run_id = run_id

    def figures(self) -> dict[str, float]:
        """Return the metrics of the run, by name; none before the watcher has found it."""
        with urllib.request.urlopen(self._url, timeout=60) as response:  # noqa: S310 - an address of our own
            text = response.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name: sample.value for sample in samples if sample.labels.get("run") == self._run_id}

    def wait(self, name: str, value: float) -> None:
        """Wait until a metric has this value.

        Raises
        ------
        RkspError
            When it has not after `PATIENCE`.
        """
        end = time.monotonic() + PATIENCE
        while self.figures().get(name) != value:
            if time.monotonic() > end:
                raise RkspError(f"the watcher's {name} of {self._run_id} is not {value:g} after {PATIENCE:g} s")
            time.sleep(POLL)


class Companion:
    """Stands between a run and its follower: paces it, and notes what it obeys; an observer of its steps, too."""

    def __init__(self, run: Run, watcher: Watcher | None, lag: int) -> None:
        self._watcher, self._lag, self._every = watcher, lag, run.config.profile.every
        self._run, self._obey = run, run.follower.follow
        run.follower.follow = self.follow
        self.orders: list[dict[str, Any]] = []
        self.losses: dict[int, float] = {}
        self.records: list[tuple[float, bool]] = []  # seconds of a step, and whether it had a KSS term
        self.waiting = 0.0
        self.hopeless = False

    def follow(self, step: int) -> Levers | None:
        """Follow an order, in lockstep only where there is one to be expected."""
        if self._watcher is not None and not self._await():
            return None
        diverged, levers = self._run.diverged, self._obey(step)
        if levers is not None and self._run.follower.order is not None:
            order = self._run.follower.order
            given = {"step": step, "generation": order.generation, "levers": levers.to_dict()}
            self.orders.append(given | {"reason": dataclasses.asdict(order.reason)})
        # Whoever answers has answered by now.
        self.hopeless = self._watcher is not None and diverged and self._run.diverged
        return levers

    def _await(self) -> bool:
        """Wait until the last profile is judged; False where there is none to wait for at this step."""
        run, watcher = self._run, self._watcher
        assert watcher is not None  # noqa: S101 - said by the caller
        began, profiled = time.perf_counter(), run.step - self._lag
        back = run.rollbacks[-1].reached if run.rollbacks else -1
        if run.diverged:
            watcher.wait(JUDGED, run.step + 1)
        elif profiled % self._every or profiled <= back:
            return False
        elif profiled == 0:
            watcher.wait(PROCESSED, 2)  # the checkpoint of step 0, too, which takes a worker: from then on, profiles
        else:
            watcher.wait(JUDGED, profiled)
        self.waiting += time.perf_counter() - began
        return True

    def after(self, run: Run, record: StepRecord | None) -> None:  # noqa: ARG002
        """Note a step."""
        if record is not None:
            self.losses[record.step] = record.loss
            self.records.append((record.step_seconds, record.kss_term != 0))

    def back(self, run: Run) -> None:
        """Forget the losses of what is undone."""
        self.losses = {step: loss for step, loss in self.losses.items() if step <= run.step}

    def end(self, run: Run) -> None:
        """Do nothing."""


def carry_out(spec: RescueSpec, planned: RescueRun, folder: Path, port_file: Path, *, lockstep: bool) -> Record:
    """Make a run in ``folder`` and return its record; nothing of the run is left there.

    Raises
    ------
    RkspError
        When it cannot start, or the watcher does not answer.
    """
    torch.set_num_threads(1)
    output, watched = folder / planned.arm.slug / planned.key, planned.arm.policy is not None
    settings = planned.settings
    if not watched:  # a profile changes no bit of a run; nobody would look at it, and nobody would help
        settings = {**settings, "profile.every": 0, "control.wait_at_divergence": 0.0}
    config = dataclasses.replace(planned, settings=settings).config(spec, output)
    run = build_run(config, Ranks(0, 1, choose_device("cpu")))
    companion = Companion(run, Watcher(port_file, planned.key) if watched and lockstep else None, spec.lag)
    open_folder(config, resume=False)
    began = time.perf_counter()
    drive(run, [companion, *usual(run)], stop=lambda: companion.hopeless)
    seconds = time.perf_counter() - began
    result = conclude(run, seconds=seconds)
    shutil.rmtree(output, ignore_errors=True)  # the watcher lets go of its locks there at the same time
    training = sum(length for length, _ in companion.records)
    loss, finished = result["loss"], result["status"] == "finished"
    return {
        "schema": SCHEMA,
        "experiment": spec.name,
        "key": planned.key,
        "arm": planned.arm.name,
        "point": dict(planned.point),
        "seed": planned.seed,
        "lockstep": lockstep,
        "lag": spec.lag,
        "environment": environment(run.ranks.device),
        "status": result["status"],
        "diverged_at": result["diverged_at"],
        "step": result["step"],
        "horizon": result["horizon"],
        "failed": bool(finished and (loss is None or loss > chance_loss(config) / 2)),
        "final": {"loss": compact(loss), "accuracy": compact(result["accuracy"])},
        "losses": _means(companion.losses),
        "orders": companion.orders,
        "rollbacks": result["rollbacks"],
        "overhead": overhead(companion.records, run.step + run.diverged),
        "seconds": {
            "training": round(training, 2),
            "observing": round(seconds - training - companion.waiting, 2),
            "waiting": round(companion.waiting, 2),
        },
    }


def overhead(records: list[tuple[float, bool]], steps: int) -> dict[str, float | int | None]:
    """Return what steps made again and KSS added, from (seconds, with a KSS term) of all steps made, in one run.

    ``steps`` is what a run that never went back would have made.
    """
    plain = [length for length, due in records if not due]
    if not plain or steps == 0:
        return {"steps": len(records), "step_seconds": None, "kss": None, "ratio": None}
    median = statistics.median(plain)
    kss = sum(length - median for length, due in records if due)
    ratio = (len(records) * median + kss) / (steps * median) - 1
    return {"steps": len(records), "step_seconds": compact(median), "kss": compact(kss), "ratio": compact(ratio)}


def _means(losses: dict[int, float]) -> list[float | None]:
    values = list(losses.values())
    parts = [values[start : start + LOSS_STEPS] for start in range(0, len(values), LOSS_STEPS)]
    return [compact(statistics.fmean(part)) for part in parts]
