"""What happens around a step: the log, the profiles, the checkpoints, and the orders of a monitor.

Rank 0 acts. Nothing here changes the numbers of the run but an order, which is meant to.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rksp_core import ControlListener, KSSRegularizer, KSSSettings, ProfileWriter, profile_model
from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from rksp_core.orders import Desired
from training.checkpoint import keep_newest, save_checkpoint
from training.config import Config
from training.ranks import Ranks
from training.run import Run

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Record:
    """One step: the task loss, the gradient norm before clipping, the rate, and KSS (weight, weighted term)."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    kss_weight: float
    kss_term: float
    kss_skipped_layers: int

    def to_dict(self) -> dict[str, float | None]:
        """Return strict JSON; a number that is not finite becomes null."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}


class Observer(Protocol):
    """Sees each step after it was made, and the end of the run."""

    def after(self, run: Run, record: Record | None) -> None:
        """Observe a step; None: the state before the first."""
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
        kept = self._path.read_text(encoding="utf-8").splitlines()[: run.step] if self._path.exists() else []
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))

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

    def end(self, run: Run) -> None:
        """Do nothing: each line is on its way already."""


class Profiles:
    """Profiles the model on the fixed probe every so many steps; the model and the random state stay as they are."""

    def __init__(self, run: Run, probe: Tensor, say: Say) -> None:
        self._writer = ProfileWriter(run.config.output, every=run.config.profile.every)
        self._probe, self._say = probe, say

    def after(self, run: Run, record: Record | None) -> None:
        """Write a profile when one is due; trouble in it is said, and never stops the run."""
        if run.diverged or not self._writer.due(run.step):
            return
        loss, norm = (None, None) if record is None else (record.loss, record.gradient_norm)
        try:
            profile = profile_model(run.model, self._probe, samples=run.config.profile.samples)
            self._writer.write(profile, run.step, loss=loss, gradient_norm=norm)
        except Exception as error:  # noqa: BLE001 - a run of days is worth more than a profile of it
            self._say(f"no profile at step {run.step}: {error}")

    def end(self, run: Run) -> None:
        """Do nothing: profiles are taken at their steps only."""


class Checkpoints:
    """Writes a checkpoint before the first step, every so many steps, and at the end of a run that did not diverge."""

    def __init__(self, run: Run) -> None:
        self._folder, self._settings = Path(run.config.output) / "checkpoints", run.config.checkpoint
        self._record: Record | None = None

    def after(self, run: Run, record: Record | None) -> None:
        """Write one when it is due."""
        self._record = record
        if self._settings.every and run.step % self._settings.every == 0:
            self.end(run)

    def end(self, run: Run) -> None:
        """Write the last one; the state of a diverged run is not worth going on with."""
        if run.diverged or not self._settings.every:
            return
        description = {
            "run_id": run.config.run_id,
            "metrics": None if self._record is None else self._record.to_dict(),
            "config": run.config.model_dump(mode="json"),
        }
        save_checkpoint(self._folder, run.step, run.model.state_dict(), run.state(), description)
        if self._settings.keep_last is not None:
            keep_newest(self._folder, self._settings.keep_last)


class Control:
    """Obeys the orders of a monitor: rank 0 reads, all processes apply at the same boundary, rank 0 acknowledges.

    An answer that cannot be written is said, and never stops the run; only a folder that cannot be made is an error.
    """

    def __init__(self, config: Config, ranks: Ranks, regularizer: KSSRegularizer, say: Say) -> None:
        self._ranks, self._every, self._regularizer, self._say = ranks, config.control.every, regularizer, say
        self._listener = None
        if ranks.first:
            folder = config.control_folder
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"cannot make the control folder {folder} ({error.strerror}); change control.folder"
                ) from error
            self._listener = ControlListener(folder, config.run_id)

    def obey(self, step: int, *, stop: bool) -> bool:
        """Apply an order that has come since the last boundary; return whether rank 0 wants to stop.

        ``step`` counts the updates made so far. Where there are several processes, this costs one broadcast.
        """
        desired = self._poll(step) if step % self._every == 0 else None
        if self._ranks.size == 1 and desired is None:
            return stop
        kss = desired.kss if desired is not None else KSSSettings()
        agreed_stop, changed, alpha, interval, layer_fraction, gamma = self._ranks.from_first(
            [stop, desired is not None, kss.alpha, kss.interval, kss.layer_fraction, kss.gamma]
        )
        if changed:
            self._regularizer.configure(KSSSettings(alpha, int(interval), layer_fraction, gamma))
        if desired is not None:
            self._acknowledge(desired, step)
        return bool(agreed_stop)

    def _poll(self, step: int) -> Desired | None:
        try:
            return None if self._listener is None else self._listener.poll(step)
        except OSError as error:
            self._say(f"step {step:6d}  an order was refused, and the answer cannot be written: {error}")
            return None

    def _acknowledge(self, desired: Desired, step: int) -> None:
        self._say(f"step {step:6d}  order {desired.generation}: KSS weight {desired.kss.alpha:g}")
        try:
            if self._listener is not None:
                self._listener.acknowledge(desired, step)
        except OSError as error:
            self._say(f"step {step:6d}  the answer cannot be written: {error}")
