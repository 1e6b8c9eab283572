"""What is written down along a run: an observer of the trainer that keeps everything in memory."""

from __future__ import annotations

import time
from typing import Any

from rksp_core import profile_model
from rksp_core.features import figures
from rksp_core.profile import ModelProfile
from rksp_core.wasserstein import Curves, distances
from training import step as steps
from training.experiments.indicators import Before, indicators
from training.experiments.record import compact, compact_all
from training.experiments.sharpness import sharpness
from training.experiments.spec import Measure
from training.run import Run
from training.tasks import PROBE


class Trace:
    """Profiles, indicators and sharpness at their steps, loss and gradient norm at all of them.

    Attributes
    ----------
    first
        The profile before the first step.
    losses, gradient_norms
        One a step.
    seconds
        What measuring took.
    """

    def __init__(self, run: Run, measure: Measure) -> None:
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
        if run.step % self._measure.profile.every == 0:
            self._profile(run)
        every = self._measure.sharpness.every
        if every and record is not None and run.step % every == 0:
            self._sharpen(run, record.learning_rate)
        self._before = Before(run) if (run.step + 1) % self._measure.profile.every == 0 else None
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
