"""How far a run has moved: from its own first profile (the baseline), from its own trailing average, from another run.

Absolute levels say little about a coming divergence; movement within one run carries what information there is. So
each profile becomes a few plain numbers (`rksp_core.features`), and `measure` sets them against a `DriftState`, a value
that the caller stores between events, and against a healthy run at the same step (`rksp_core.reference`), if there is
one. Nothing here reads a clock or a file.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rksp_core.errors import ProfileError
from rksp_core.features import DISTANCES, Figures, figures, identity
from rksp_core.profile import ModelProfile
from rksp_core.reference import Reference
from rksp_core.wasserstein import Curves, between, distances

# The trailing average forgets a tenth in this many steps, whatever the interval between two profiles is.
MEMORY_STEPS = 10
MEMORY_KEPT = 0.9
# How far a run wanders is averaged over this many events at least: one of them alone would say nothing.
LEAST_EVENTS = 10

Against = Literal["baseline", "trailing", "reference"]
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class DriftState:
    """What a run is compared with: its first profile, and the trailing average of what followed.

    ``variance`` is the mean square of the deviations of the last events, each from the trailing average before it, and
    ``events`` their number. ``baseline_curves`` and ``trailing_curves`` are quantiles of the eigenvalue moduli by
    layer, the second averaged as spectra are (`rksp_core.wasserstein.between`). ``noise`` is the last measured,
    ``baseline_noise`` the first.
    """

    identity: str
    baseline_step: int
    baseline: Numbers
    step: int
    trailing: Numbers
    variance: Numbers = field(default_factory=dict)
    baseline_curves: Curves = field(default_factory=dict)
    trailing_curves: Curves = field(default_factory=dict)
    baseline_noise: Numbers = field(default_factory=dict)
    noise: Numbers = field(default_factory=dict)
    events: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        document = dataclasses.asdict(self)
        for name in ("baseline_curves", "trailing_curves"):
            document[name] = {layer: list(curve) for layer, curve in document[name].items()}
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> DriftState:
        """Read the JSON form; one of a time before spectra and noise were kept goes on without them."""
        values = dict(document)
        for name in ("baseline_curves", "trailing_curves"):
            values[name] = {layer: tuple(curve) for layer, curve in values.get(name, {}).items()}
        return cls(**values)


@dataclass(frozen=True)
class Drift:
    """One event, measured: the numbers, what they are compared with, and the deviations in units of their noise.

    ``values``, ``baseline``, ``trailing`` (the average before this event) and ``reference`` (the healthy run at this
    step) are by the names of `rksp_core.features.FEATURES`; ``distances`` are {name of `DISTANCES`: {baseline |
    trailing | reference: distance}}; ``noise`` is the standard error of the values, where it is known. The sigmas are
    deviations over their noise, by name, of features and distances; `measure` says which noise. ``late`` marks an event
    at or before a step that was already judged: it moves no average.
    """

    step: int
    values: Numbers
    baseline: Numbers = field(default_factory=dict)
    trailing: Numbers = field(default_factory=dict)
    reference: Numbers = field(default_factory=dict)
    distances: Mapping[str, Numbers] = field(default_factory=dict)
    noise: Numbers = field(default_factory=dict)
    sigmas_from_baseline: Numbers = field(default_factory=dict)
    sigmas_from_trailing: Numbers = field(default_factory=dict)
    sigmas_from_reference: Numbers = field(default_factory=dict)
    late: bool = False

    def compared(self, against: Against) -> Numbers:
        """Return the numbers that the values are compared with."""
        return {"baseline": self.baseline, "trailing": self.trailing, "reference": self.reference}[against]

    def moved(self, name: str, against: Against) -> float | None:
        """Return a value minus what it is compared with, or a distance; None when either is unknown."""
        if name in self.distances:
            return self.distances[name].get(against)
        value, other = self.values.get(name), self.compared(against).get(name)
        return None if value is None or other is None else value - other

    def sigmas(self, name: str, against: Against) -> float | None:
        """Return what `moved` returns in units of its noise; None where either is unknown."""
        return {
            "baseline": self.sigmas_from_baseline,
            "trailing": self.sigmas_from_trailing,
            "reference": self.sigmas_from_reference,
        }[against].get(name)

    def from_baseline(self, name: str) -> float | None:
        """Return the value minus the baseline's, or None when either is unknown."""
        return self.moved(name, "baseline")

    def from_trailing(self, name: str) -> float | None:
        """Return the value minus the trailing average before this event, or None when either is unknown."""
        return self.moved(name, "trailing")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: what is not known is left out."""
        document = dataclasses.asdict(self)
        return {name: value for name, value in document.items() if value or name in ("step", "values")}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Drift:
        """Read the JSON form; fields of a later version are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


def measure(
    state: DriftState | None, profile: ModelProfile, step: int, reference: Reference | None = None
) -> tuple[DriftState | None, Drift]:
    """Measure a profile against the state, and return the state that the next event is measured against.

    Parameters
    ----------
    state
        None before the first usable profile, which becomes the baseline.
    profile
        The profile of ``step``. One with no finite layer starts no baseline.
    step
        Training step, at least 0.
    reference
        A healthy run to compare with at the same step.

    Returns
    -------
    (state, drift)
        The trailing average is ``e + a (x - e)`` with ``a = 1 - 0.9^(steps since the last event / 10)``, so runs that
        are profiled at different intervals have the same memory in steps. Deviations are in sigmas of

        * against the baseline and the reference, the noise of both profiles, ``sqrt(noise^2 + noise_now^2)``; a profile
          whose noise was not measured has that of the last one before it that was. Both are on one probe, so part of
          their noise is the same and cancels: these sigmas are rather too small than too large.
        * against the trailing average, ``sqrt(variance + noise_now^2)``: how far the run wanders anyway from one event
          to the next, and never less than what another probe would have said, or a run that rests would make an alarm
          of nothing. Without a measured noise it is the first alone. It is ``v + b (d^2 - v)``, d the deviation and
          ``b = max(min(a, 1/10), 1/n)`` at the n-th: the mean square at first, then with the average's memory, but of
          ten events at least. (West 1979, ``(1 - a)(v + a d^2)``, is the variance about the average, which follows a
          run that is profiled every 500 steps so closely that an ordinary step was 20 sigmas.)

    Raises
    ------
    ProfileError
        When the profile's probe or settings are not those of the baseline, or of the reference.
    """
    name, now = identity(profile), figures(profile)
    others: dict[Against, Figures] = {}
    if reference is not None:
        reference.check(profile, f"the profile of step {step}")
        point = reference.at(step)
        if point is not None:
            others["reference"] = point
    if state is None:
        if "near_unit_mass_mean" not in now.numbers:
            return None, _compare(step, now, others)
        state = DriftState(name, step, now.numbers, step, now.numbers, {}, now.curves, now.curves, now.noise, now.noise)
        return state, _compare(step, now, {"baseline": now, **others})
    if name != state.identity:
        raise ProfileError(
            f"the profile of step {step} has another probe or other settings ({name}) than the baseline of step "
            f"{state.baseline_step} ({state.identity}); use the same ones, or start again with --new-baseline"
        )
    # Noise is measured now and then; until it is again, the last one holds.
    now = dataclasses.replace(now, noise=now.noise or state.noise)
    others["baseline"] = Figures(state.baseline, state.baseline_curves, state.baseline_noise or now.noise)
    if step <= state.step:
        return state, _compare(step, now, others, late=True)
    spread = {name: math.sqrt(value) for name, value in state.variance.items()}
    drift = _compare(step, now, {**others, "trailing": Figures(state.trailing, state.trailing_curves, spread)})
    return _advance(state, drift, now), drift


def rewind(state: DriftState, step: int, kept: Iterable[Drift] = ()) -> DriftState:
    """Return the state for a run that went back to before ``step``: the baseline stays.

    ``kept`` are the drifts of this series before ``step``, from the baseline on, without those of an earlier excursion
    that was undone: with them the trailing average is exactly what it was then, without them it starts anew. That of
    the spectra always does: a drift does not hold them.
    """
    fresh = dataclasses.replace(state, step=step - 1, trailing={}, variance={}, trailing_curves={}, events=0)
    again = None
    for drift in kept:
        if drift.late or not state.baseline_step <= drift.step < step:
            continue
        again = again or dataclasses.replace(fresh, step=state.baseline_step, trailing=state.baseline)
        if drift.step > again.step:
            again = _advance(again, drift, Figures(drift.values, noise=state.noise))
    return again or fresh


def _compare(step: int, now: Figures, others: Mapping[Against, Figures], *, late: bool = False) -> Drift:
    apart = {against: distances(now.curves, other.curves) for against, other in others.items()}
    drift = Drift(
        step,
        now.numbers,
        **{against: other.numbers for against, other in others.items()},
        distances={
            name: {against: each[name] for against, each in apart.items() if name in each}
            for name in DISTANCES
            if any(name in each for each in apart.values())
        },
        noise=now.noise,
        late=late,
    )
    nothing = Figures({})
    return dataclasses.replace(
        drift,
        sigmas_from_baseline=_sigmas(drift, "baseline", others.get("baseline", nothing)),
        sigmas_from_trailing=_sigmas(drift, "trailing", others.get("trailing", nothing)),
        sigmas_from_reference=_sigmas(drift, "reference", others.get("reference", nothing)),
    )


def _sigmas(drift: Drift, against: Against, other: Figures) -> Numbers:
    sigmas = {}
    for name in (*drift.values, *drift.distances):
        moved = drift.moved(name, against)
        noise = math.hypot(other.noise.get(name, 0.0), drift.noise.get(name, 0.0))
        if moved is not None and noise > 0.0 and math.isfinite(moved / noise):
            sigmas[name] = moved / noise
    return sigmas


def _advance(state: DriftState, drift: Drift, now: Figures) -> DriftState:
    weight = 1.0 - MEMORY_KEPT ** ((drift.step - state.step) / MEMORY_STEPS)
    trailing, variance, events = dict(state.trailing), dict(state.variance), state.events + 1
    share = max(min(weight, 1.0 / LEAST_EVENTS), 1.0 / events)
    # That of a spectrum is its distance, which makes its variance the Frechet variance about the barycenter.
    deviations = {name: apart["trailing"] for name, apart in drift.distances.items() if "trailing" in apart}
    for name, value in drift.values.items():
        if name in trailing:
            deviations[name] = value - trailing[name]
            trailing[name] += weight * deviations[name]
        else:
            trailing[name] = value
    for name, deviation in deviations.items():
        square = min(deviation * deviation, sys.float_info.max)  # a loss that blows up may be 1e200
        before = variance.get(name, square)
        variance[name] = before + share * (square - before)
    return dataclasses.replace(
        state,
        step=drift.step,
        trailing=trailing,
        variance=variance,
        trailing_curves=between(state.trailing_curves, now.curves, weight),
        baseline_noise=state.baseline_noise or now.noise,
        noise=now.noise,
        events=events,
    )
