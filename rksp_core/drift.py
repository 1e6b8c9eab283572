"""How far a run has moved: from its own first profile (the baseline) and from its own trailing average.

Absolute levels say little about a coming divergence; movement within one run carries what information there is. So
each profile becomes a few plain numbers (`features`), and `measure` sets them against a `DriftState`, a value that the
caller stores between events. Nothing here reads a clock or a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rksp_core.errors import ProfileError
from rksp_core.profile import ModelProfile

# The trailing average forgets a tenth in this many steps, whatever the interval between two profiles is.
MEMORY_STEPS = 10
MEMORY_KEPT = 0.9


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _log(value: float) -> float:
    # A departure of exactly 0 (a normal operator) is below what float64 resolves: give it that resolution.
    return math.log(max(value, 1e-16))


# Name of the number -> the profile field, its aggregate over the layers, and the scale it is compared on.
_SPECTRAL: dict[str, tuple[str, Callable[[Sequence[float]], float], bool]] = {
    "near_unit_mass_mean": ("near_unit_mass", _mean, False),
    "near_unit_mass_min": ("near_unit_mass", min, False),
    "expansive_mass_mean": ("expansive_mass", _mean, False),
    "contractive_mass_mean": ("contractive_mass", _mean, False),
    "spectral_radius_max": ("spectral_radius", max, False),
    "log_kreiss_max": ("kreiss_constant", max, True),
    "log_kreiss_mean": ("kreiss_constant", _mean, True),
    "log_sigma_max": ("sigma_max", max, True),
    "log_henrici_max": ("henrici_departure", max, True),
}

FEATURES = (*_SPECTRAL, "not_finite_layers", "not_finite_figures", "loss", "gradient_norm")


def features(profile: ModelProfile) -> dict[str, float]:
    """Return the numbers of a profile that drift is measured in; one that is unknown is left out.

    Names are those of `FEATURES`: masses in [0, 1], logarithms natural (of the mean or the maximum over the layers),
    ``not_finite_layers`` a count; ``loss`` and ``gradient_norm`` as the trainer wrote them into its own profile, and
    ``not_finite_figures`` the number of those that were NaN or infinite.
    """
    numbers: dict[str, float] = {}
    for name, (source, over_layers, logarithm) in _SPECTRAL.items():
        known = [value for value in profile.values(source) if value is not None and math.isfinite(value)]
        if known:
            value = over_layers(known)
            numbers[name] = _log(value) if logarithm else value
    numbers["not_finite_layers"] = float(sum("not_finite" in layer.status for layer in profile.layers))
    numbers["not_finite_figures"] = float(len(profile.not_finite))
    for name in ("loss", "gradient_norm"):
        value = getattr(profile, name)
        if value is not None:
            numbers[name] = value
    return numbers


def identity(profile: ModelProfile) -> str:
    """Return a short hash of what two comparable profiles share: the probe and the numerical settings."""
    document = {"probe": profile.probe.get("sha256"), "settings": dict(profile.settings)}
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DriftState:
    """What a run is compared with: its first profile, and the trailing average (and variance) of what followed."""

    identity: str
    baseline_step: int
    baseline: Mapping[str, float]
    step: int
    trailing: Mapping[str, float]
    variance: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> DriftState:
        """Read the JSON form."""
        return cls(**document)


@dataclass(frozen=True)
class Drift:
    """One event, measured: the numbers, what they are compared with, and the deviations in units of their noise.

    ``sigmas`` is the deviation from the trailing average over the trailing standard deviation, for the numbers that
    have one yet. ``late`` marks an event at or before a step that was already judged: it moves no average.
    """

    step: int
    values: Mapping[str, float]
    baseline: Mapping[str, float] = field(default_factory=dict)
    trailing: Mapping[str, float] = field(default_factory=dict)
    sigmas: Mapping[str, float] = field(default_factory=dict)
    late: bool = False

    def from_baseline(self, name: str) -> float | None:
        """Return the value minus the baseline's, or None when either is unknown."""
        return _difference(self.values.get(name), self.baseline.get(name))

    def from_trailing(self, name: str) -> float | None:
        """Return the value minus the trailing average before this event, or None when either is unknown."""
        return _difference(self.values.get(name), self.trailing.get(name))


def measure(state: DriftState | None, profile: ModelProfile, step: int) -> tuple[DriftState | None, Drift]:
    """Measure a profile against the state, and return the state that the next event is measured against.

    Parameters
    ----------
    state
        None before the first usable profile, which becomes the baseline.
    profile
        The profile of ``step``. One with no finite layer starts no baseline.
    step
        Training step, at least 0.

    Returns
    -------
    (state, drift)
        The trailing average is ``e + a (x - e)`` with ``a = 1 - 0.9^(steps since the last event / 10)``, so runs that
        are profiled at different intervals have the same memory in steps.

    Raises
    ------
    ProfileError
        When the profile's probe or settings are not those of the baseline.
    """
    numbers = features(profile)
    name = identity(profile)
    if state is None:
        if "near_unit_mass_mean" not in numbers:
            return None, Drift(step, numbers)
        trailing = {key: value for key, value in numbers.items() if math.isfinite(value)}
        return DriftState(name, step, numbers, step, trailing), Drift(step, numbers, baseline=numbers)
    if name != state.identity:
        raise ProfileError(
            f"the profile of step {step} has another probe or other settings ({name}) than the baseline of step "
            f"{state.baseline_step} ({state.identity}); use the same ones, or start again with --new-baseline"
        )
    if step <= state.step:
        return state, Drift(step, numbers, state.baseline, late=True)
    drift = Drift(step, numbers, state.baseline, state.trailing, _sigmas(state, numbers))
    return _advance(state, numbers, step), drift


def rewind(state: DriftState, step: int) -> DriftState:
    """Return the state for a run that went back to before ``step``: the baseline stays, the average starts anew."""
    return dataclasses.replace(state, step=step - 1, trailing={}, variance={})


def _advance(state: DriftState, numbers: Mapping[str, float], step: int) -> DriftState:
    weight = 1.0 - MEMORY_KEPT ** ((step - state.step) / MEMORY_STEPS)
    trailing, variance = dict(state.trailing), dict(state.variance)
    for name, value in numbers.items():
        if not math.isfinite(value):
            continue
        if name not in trailing:
            trailing[name] = value
            continue
        deviation = value - trailing[name]
        trailing[name] += weight * deviation
        # Exponentially weighted variance: West 1979, with the same memory as the average.
        variance[name] = (1.0 - weight) * (variance.get(name, 0.0) + weight * deviation**2)
    return dataclasses.replace(state, step=step, trailing=trailing, variance=variance)


def _sigmas(state: DriftState, numbers: Mapping[str, float]) -> dict[str, float]:
    return {
        name: (value - state.trailing[name]) / math.sqrt(state.variance[name])
        for name, value in numbers.items()
        if state.variance.get(name, 0.0) > 0.0
    }


def _difference(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value - reference
