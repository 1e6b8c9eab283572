"""What happens around a step: the log, the profiles, the checkpoints.

Nothing here changes the numbers of the run. Every process takes part, as sharded weights need all of them; rank 0
writes and speaks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rksp_core import ProfileWriter, profile_model
from rksp_core.atomic import write_atomic
from training.checkpoint import CheckpointWriter
from training.ranks import sharded
from training.run import Run
from training.step import Record, autocast

Say = Callable[[str], None]


class Observer(Protocol):
    """Sees each step after it was made, and the end of the run."""

    def after(self, run: Run, record: Record | None) -> None:
        """Observe a step; None: the state before the first."""
        ...

    def back(self, run: Run) -> None:
        """Forget what came after ``run.step``: the run, which has a folder, went back there."""
        ...

    def end(self, run: Run) -> None:
        """Observe the end: finished, diverged or stopped."""
        ...


class MetricsLog:
    """Appends each step to ``metrics.jsonl``, and says every so many of them.

    A resumed run continues the file behind the step it resumes from: later lines, and half a line, are cut.
    """

    def __init__(self, run: Run, say: Say) -> None:
        self._path, self._say = Path(run.config.output) / "metrics.jsonl", say
        self.back(run)

    def after(self, run: Run, record: Record | None) -> None:
        """Write one line; a reader sees it at once."""
        if record is None:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record.to_dict(), allow_nan=False) + "\n")
        if record.step % run.config.print_every == 0:
            self._say(
                f"step {record.step:6d}  loss {record.loss:9.4f}  gradient norm {record.gradient_norm:9.3f}  "
                f"rate {record.learning_rate:.2e}  kss {record.kss_weight:g}"
            )

    def back(self, run: Run) -> None:
        """Cut the lines after the run's step."""
        kept = self._path.read_text(encoding="utf-8").splitlines()[: run.step] if self._path.exists() else []
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))

    def end(self, run: Run) -> None:
        """Do nothing: each line is on its way already."""


class Profiles:
    """Profiles the model on the fixed probe every so many steps; the model and the random state stay as they are.

    A run that diverged and waits for help is profiled at once, with the figures of the step in which it diverged.
    """

    def __init__(self, run: Run, probe: Tensor, say: Say) -> None:
        every = run.config.profile.every
        self._writer = ProfileWriter(run.config.output, every=every if run.ranks.first else 0)
        self._every, self._probe, self._say = every, probe, say
        # A shard is no model: there all processes run the probe, and rank 0 keeps the profile.
        self._together = sharded(run.model)

    def after(self, run: Run, record: Record | None) -> None:
        """Write a profile when one is due; trouble in it is said, and never stops the run."""
        if self._every == 0:
            return
        due = bool(run.config.control.wait_at_divergence) if run.diverged else run.step % self._every == 0
        if not due or not (run.ranks.first or self._together):
            return
        step, loss, norm = (
            (run.step, None, None) if record is None else (record.step, record.loss, record.gradient_norm)
        )
        try:
            with autocast(run):
                profile = profile_model(run.model, self._probe, samples=run.config.profile.samples)
            if run.ranks.first:
                self._writer.write(profile, step, loss=loss, gradient_norm=norm)
        except Exception as error:  # noqa: BLE001 - a run of days is worth more than a profile of it
            self._say(f"no profile at step {step}: {error}")

    def back(self, run: Run) -> None:
        """Remove the profiles after the run's step: they are of weights that are no more."""
        for path in self._writer.folder.glob("step-*.json") if run.ranks.first else ():
            step = path.stem.removeprefix("step-")
            if step.isdecimal() and int(step) > run.step:
                path.unlink(missing_ok=True)

    def end(self, run: Run) -> None:
        """Do nothing: profiles are taken at their steps only."""


class Checkpoints:
    """Writes a checkpoint before the first step, every so many steps, and at the end of a run that did not diverge."""

    def __init__(self, run: Run) -> None:
        self._settings = run.config.checkpoint
        self._record: Record | None = None
        self._writer = CheckpointWriter(Path(run.config.output) / "checkpoints", run.config.checkpoint, run.ranks)

    def after(self, run: Run, record: Record | None) -> None:
        """Write one when it is due."""
        self._record = record
        self._writer.settle()
        if self._settings.every and run.step % self._settings.every == 0:
            self._write(run)

    def back(self, run: Run) -> None:
        """Set the checkpoints after the run's step aside."""
        self._writer.set_aside_after(run.step)

    def end(self, run: Run) -> None:
        """Write the last one; the state of a diverged run is not worth going on with."""
        self._write(run)
        self._writer.finish()

    def _write(self, run: Run) -> None:
        if run.diverged or not self._settings.every:
            return
        description = {
            "run_id": run.config.run_id,
            "metrics": None if self._record is None else self._record.to_dict(),
            "config": run.config.model_dump(mode="json"),
            "state": run.state(),
        }
        self._writer.write(run.step, run.model, run.optimizer, description)
