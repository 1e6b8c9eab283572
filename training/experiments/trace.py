"""What is written down along a run: an observer of the trainer that keeps everything in memory.

Everything is measured on the CPU. A measurement is hundreds of small figures; on a GPU that many processes share, each
of them waits for its turn, and measuring took five times as long as training.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from rksp_core import profile_model
from rksp_core.features import figures
from rksp_core.profile import ModelProfile
from rksp_core.wasserstein import Curves, distances
from training import step as steps
from training.experiments.indicators import Before, indicators
from training.experiments.record import compact, compact_all
from training.experiments.sharpness import sharpness
from training.experiments.spec import Measure
from training.ranks import Ranks
from training.run import Run, build_run
from training.tasks import PROBE


class Trace:
    """Profiles, indicators and sharpness at their steps, loss and gradient norm at all of them.

    Attributes
    ----------
    twin
        The run on the CPU: itself, or a copy that follows it whenever something is due.
    first
        The profile before the first step.
    losses, gradient_norms
        One a step.
    seconds
        What measuring took.
    """

    def __init__(self, run: Run, measure: Measure) -> None:
        self.twin = run if run.ranks.device.type == "cpu" else _twin(run)
        self._measure = measure
        self._probe = run.task.batch(PROBE, 0, measure.profile.sequences)
        self._before: Before | None = None
        self._curves: list[Curves] = []  # of the first profile and of the last one
        self._profiles: list[tuple[int, dict[str, dict[str, Any]]]] = []
        self._sharpness: list[tuple[int, float | None, float | None]] = []
        self.first: ModelProfile | None = None
        self.losses: list[float | None] = []
        self.gradient_norms: list[float | None] = []
        self.seconds = 0.0

    def after(self, run: Run, record: steps.Record | None) -> None:
        """Measure what is due; the step in which a run diverges changed no weight, and is not measured again."""
        if record is not None:
            self.losses.append(compact(record.loss))
            self.gradient_norms.append(compact(record.gradient_norm))
        if run.diverged:
            return
        began = time.perf_counter()
        every, sharpened = self._measure.profile.every, self._measure.sharpness.every
        profiled, next_profiled = run.step % every == 0, (run.step + 1) % every == 0
        sharpen = bool(sharpened) and record is not None and run.step % sharpened == 0
        if self.twin is not run and (profiled or next_profiled or sharpen):
            _follow(self.twin, run)
        if profiled:
            self._profile(self.twin)
        if sharpen and record is not None:
            self._sharpen(self.twin, record.learning_rate)
        self._before = Before(self.twin) if next_profiled else None
        self.seconds += time.perf_counter() - began

    def end(self, run: Run) -> None:
        """Do nothing: what is due was measured."""

    def profile(self, model: Any, probe: Any = None) -> ModelProfile:
        """Profile a model as along the run."""
        inputs = self._probe.inputs if probe is None else probe
        return profile_model(model, inputs, samples=self._measure.profile.samples)

    def document(self) -> dict[str, Any]:
        """Return the sections ``steps``, ``profiles`` and ``sharpness`` of the record."""
        columns: dict[str, Any] = {"step": [step for step, _ in self._profiles]}
        for section in ("features", "distances", "indicators"):
            names = {name: None for _, found in self._profiles for name in found[section]}  # in order of appearance
            columns[section] = {name: [found[section].get(name) for _, found in self._profiles] for name in names}
        found = {
            name: [each[place] for each in self._sharpness]
            for place, name in enumerate(("step", "largest", "smallest"))
        }
        return {
            "steps": {"loss": self.losses, "gradient_norm": self.gradient_norms},
            "profiles": columns,
            "sharpness": found,
        }

    def _profile(self, run: Run) -> None:
        with steps.autocast(run):
            profile = self.profile(run.model, run.to_model(self._probe.inputs))
        found = figures(profile)
        apart: dict[str, float] = {}
        if self.first is None:
            self.first = profile
            self._curves = [found.curves, found.curves]
        else:
            for name, curves in zip(("first", "previous"), self._curves, strict=True):
                apart |= {f"{kind}_from_{name}": value for kind, value in distances(found.curves, curves).items()}
            self._curves[1] = found.curves
        self._profiles.append(
            (
                run.step,
                {
                    "features": compact_all(found.numbers),
                    "distances": compact_all(apart),
                    "indicators": compact_all(indicators(run, self._probe, self._before)),
                },
            )
        )

    def _sharpen(self, run: Run, rate: float) -> None:
        settings = self._measure.sharpness
        found = sharpness(run, rate, sequences=settings.sequences, iterations=settings.iterations)
        if found is not None:
            self._sharpness.append((run.step, compact(found[0]), compact(found[1])))


def _twin(run: Run) -> Run:
    return build_run(run.config.model_copy(update={"device": "cpu"}), Ranks(0, 1, torch.device("cpu")))


def _follow(twin: Run, run: Run) -> None:
    """Bring weights, gradients and the optimizer's state over, all in one transfer."""
    twin.step = run.step
    there: list[Tensor] = []
    for parameter in run.model.parameters():
        state = run.optimizer.state.get(parameter, {})
        there += [parameter, *([] if parameter.grad is None else [parameter.grad])]
        there += [value for value in state.values() if isinstance(value, Tensor)]
    there += list(run.model.buffers())
    flat = torch.cat([tensor.detach().flatten().float() for tensor in there]).cpu()
    here = iter(
        part.view(tensor.shape) for part, tensor in zip(flat.split([t.numel() for t in there]), there, strict=True)
    )
    for mine, theirs in zip(twin.model.parameters(), run.model.parameters(), strict=True):
        mine.data = next(here)
        mine.grad = None if theirs.grad is None else next(here)
        state = run.optimizer.state.get(theirs, {})
        twin.optimizer.state[mine] = {
            name: next(here) if isinstance(value, Tensor) else value for name, value in state.items()
        }
    for buffer in twin.model.buffers():
        buffer.copy_(next(here))
