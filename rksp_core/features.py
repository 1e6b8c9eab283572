"""A profile as a few plain numbers, and one curve a layer: what drift is measured in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rksp_core.profile import ModelProfile
from rksp_core.wasserstein import Curves


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
    "log_growth_max": ("transient_growth", max, True),
}

SPECTRAL = tuple(_SPECTRAL)
# Of the model's matrices and of the trainer, beside the spectra.
WEIGHTS = ("log_weight_norm_max", "log_weight_norm_head")
TRAINER = ("loss", "gradient_norm", "log_gradient_norm")
FEATURES = (*SPECTRAL, *WEIGHTS, "not_finite_layers", "not_finite_figures", *TRAINER)

# Of `rksp_core.wasserstein`: these have no value of their own, only one between two profiles.
DISTANCES = ("wasserstein_mean", "wasserstein_max")


@dataclass(frozen=True)
class Figures:
    """All that drift looks at: `features`, the quantiles of the eigenvalue moduli by layer, and the numbers' noise.

    ``noise`` holds standard errors by the names of `FEATURES` and `DISTANCES`; empty where it was not measured.
    """

    numbers: Mapping[str, float]
    curves: Curves = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)


def figures(profile: ModelProfile) -> Figures:
    """Return what drift looks at in a profile; a layer that does not know its quantiles has no curve."""
    known = {layer.layer: layer.modulus_quantiles for layer in profile.layers if layer.modulus_quantiles is not None}
    return Figures(features(profile), known, profile.noise)


def features(profile: ModelProfile) -> dict[str, float]:
    """Return the finite numbers of a profile that drift is measured in; one that is unknown is left out.

    Names are those of `FEATURES`: masses in [0, 1], logarithms natural (of the mean or the maximum over the layers),
    ``log_weight_norm_max`` of the largest spectral norm of a matrix in the blocks, ``log_weight_norm_head`` of one
    outside them, ``not_finite_layers`` a count; ``loss`` and ``gradient_norm`` as the trainer wrote them into its own
    profile, and ``not_finite_figures`` the number of those that were NaN or infinite.
    """
    numbers: dict[str, float] = {}
    for name, (source, over_layers, logarithm) in _SPECTRAL.items():
        known = [value for value in profile.values(source) if value is not None and math.isfinite(value)]
        if known:
            value = over_layers(known)
            numbers[name] = _log(value) if logarithm else float(value)
    numbers["not_finite_layers"] = float(sum("not_finite" in layer.status for layer in profile.layers))
    for name, norm in zip(WEIGHTS, (profile.weights.blocks, profile.weights.head), strict=True):
        if norm is not None and math.isfinite(norm):
            numbers[name] = _log(norm)
    not_finite = set(profile.not_finite)
    for name in ("loss", "gradient_norm"):
        figure = getattr(profile, name)
        if figure is None:
            continue
        if math.isfinite(figure):
            numbers[name] = float(figure)
        else:
            not_finite.add(name)
    if "gradient_norm" in numbers:
        numbers["log_gradient_norm"] = _log(numbers["gradient_norm"])
    numbers["not_finite_figures"] = float(len(not_finite))
    return numbers


def identity(profile: ModelProfile) -> str:
    """Return a short hash of what two comparable profiles share: the probe and the numerical settings."""
    document = {"probe": profile.probe.get("sha256"), "settings": dict(profile.settings)}
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
