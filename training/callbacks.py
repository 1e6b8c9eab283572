"""What happens around a step: the log, the profiles, the orders of a monitor.

Rank 0 acts. Nothing here changes the numbers of the run but an order, which is meant to.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from rksp_core import ControlListener, KSSRegularizer, KSSSettings, ProfileWriter, profile_model
from rksp_core.atomic import write_atomic
from training.ranks import Ranks

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


class MetricsLog:
    """Appends each step to ``metrics.jsonl``, and says every so many of them.

    A resumed run continues the file behind the step it resumes from: later lines, and half a line, are cut.
    """

    def __init__(self, path: Path, *, step: int, print_every: int, say: Say) -> None:
        self._print_every, self._say = print_every, say
        kept = path.read_text(encoding="utf-8").splitlines()[:step] if path.exists() else []
        write_atomic(path, "".join(f"{line}\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        """Write one line; a reader sees it at once."""
        self._stream.write(json.dumps(record.to_dict(), allow_nan=False) + "\n")
        if record.step % self._print_every == 0:
            self._say(
                f"step {record.step:6d}  loss {record.loss:9.4f}  gradient norm {record.gradient_norm:9.3f}  "
                f"rate {record.learning_rate:.2e}  kss {record.kss_weight:g}"
            )

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Profiles:
    """Profiles the model on the fixed probe every so many steps; the model and the random state stay as they are."""

    def __init__(self, folder: Path, *, every: int, samples: int, probe: Tensor, say: Say) -> None:
        self._writer = ProfileWriter(folder, every=every)
        self._samples, self._probe, self._say = samples, probe, say

    def at(self, step: int, model: nn.Module, record: Record | None) -> None:
        """Write a profile when one is due; trouble in it is said, and never stops the run."""
        if not self._writer.due(step):
            return
        loss, norm = (None, None) if record is None else (record.loss, record.gradient_norm)
        try:
            profile = profile_model(model, self._probe, samples=self._samples)
            self._writer.write(profile, step, loss=loss, gradient_norm=norm)
        except Exception as error:  # noqa: BLE001 - a run of days is worth more than a profile of it
            self._say(f"no profile at step {step}: {error}")


class Control:
    """Obeys the orders of a monitor: rank 0 reads, all processes apply at the same boundary, rank 0 acknowledges."""

    def __init__(
        self, folder: Path, run_id: str, *, every: int, ranks: Ranks, regularizer: KSSRegularizer, say: Say
    ) -> None:
        self._ranks, self._every, self._regularizer, self._say = ranks, every, regularizer, say
        self._listener = ControlListener(folder, run_id) if ranks.first else None
        if self._listener is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def obey(self, step: int, *, stop: bool) -> bool:
        """Apply an order that has come since the last boundary; return whether rank 0 wants to stop.

        ``step`` counts the updates made so far. Where there are several processes, this costs one broadcast.
        """
        desired = None
        if self._listener is not None and step % self._every == 0:
            desired = self._listener.poll(step)
        if self._ranks.size == 1 and desired is None:
            return stop
        kss = desired.kss if desired is not None else KSSSettings()
        stop_, changed, alpha, interval, layer_fraction, gamma = self._ranks.from_first(
            [stop, desired is not None, kss.alpha, kss.interval, kss.layer_fraction, kss.gamma]
        )
        if changed:
            self._regularizer.configure(KSSSettings(alpha, int(interval), layer_fraction, gamma))
        if self._listener is not None and desired is not None:
            self._listener.acknowledge(desired, step)
            self._say(f"step {step:6d}  order {desired.generation}: KSS weight {kss.alpha:g}")
        return bool(stop_)
