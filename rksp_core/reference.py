"""A healthy run to compare with: what its profiles said at each step, and between two of them what lies between.

Healthy learning moves every statistic too, so "it moved since its own beginning" says less than "it moved otherwise
than a run that went well". Both runs have to look through the same glass: one probe, one set of settings, one model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rksp_core.errors import ProfileError
from rksp_core.features import Figures, figures, identity
from rksp_core.profile import ModelProfile
from rksp_core.wasserstein import between


@dataclass(frozen=True)
class Reference:
    """One series of a healthy run.

    ``steps`` ascend strictly and have one of ``points`` each; ``identity`` and ``layers`` are those of its profiles.
    Between two points more than ``gap`` steps apart it says nothing; None is no limit.
    """

    name: str
    identity: str
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    points: tuple[Figures, ...]
    gap: int | None = None

    @classmethod
    def of(cls, name: str, profiles: Iterable[tuple[int, ModelProfile]], *, gap: int | None = None) -> Reference:
        """Take the profiles of one series, each with its step; of two at one step the later in the iteration counts.

        Raises
        ------
        ProfileError
            When there is no profile, or they differ in their probe, settings or layers.
        """
        by_step = dict(profiles)
        if not by_step:
            raise ProfileError(f"the reference run {name} has no profile; give a run that was watched or profiled")
        steps = sorted(by_step)
        first = by_step[steps[0]]
        points: list[Figures] = []
        for step in steps:
            point = figures(by_step[step])
            # Noise is measured now and then; until it is again, the last one holds.
            points.append(point if point.noise or not points else replace(point, noise=points[-1].noise))
        reference = cls(name, identity(first), _layers(first), tuple(steps), tuple(points), gap)
        for step in steps:
            reference.check(by_step[step], f"step {step} of the reference run")
        return reference

    def check(self, profile: ModelProfile, what: str = "this run") -> None:
        """Refuse a profile that must not be set beside this reference.

        Raises
        ------
        ProfileError
            When its probe, settings or layers are not those of the reference.
        """
        if identity(profile) != self.identity:
            raise ProfileError(
                f"{what} has another probe or other settings ({identity(profile)}) than the reference run {self.name} "
                f"({self.identity}); profile both with the same ones"
            )
        if _layers(profile) != self.layers:
            raise ProfileError(
                f"{what} has {len(profile.layers)} layers ({profile.layers[0].layer} ...), the reference run "
                f"{self.name} {len(self.layers)} ({self.layers[0]} ...); give a reference of the same model"
            )

    def at(self, step: int) -> Figures | None:
        """Return what the reference says of this step, linear between its neighbours; None where it says nothing.

        It says nothing before its first and after its last step, nor between two that are too far apart. What one of
        the neighbours does not know is left out; spectra are moved, not mixed (`rksp_core.wasserstein.between`).
        """
        index = bisect_left(self.steps, step)
        if index < len(self.steps) and self.steps[index] == step:
            return self.points[index]
        if not 0 < index < len(self.steps):
            return None
        low, high = self.steps[index - 1], self.steps[index]
        if self.gap is not None and high - low > self.gap:
            return None
        before, after = self.points[index - 1], self.points[index]
        weight = (step - low) / (high - low)
        shared = before.numbers.keys() & after.numbers.keys()
        numbers = {name: (1 - weight) * before.numbers[name] + weight * after.numbers[name] for name in sorted(shared)}
        known = {layer: curve for layer, curve in before.curves.items() if layer in after.curves}
        moved = between(known, {layer: after.curves[layer] for layer in known}, weight)
        return Figures(numbers, moved, before.noise)


def _layers(profile: ModelProfile) -> tuple[str, ...]:
    return tuple(layer.layer for layer in profile.layers)
