"""Two profiles of one model, layer by layer: what moved between a baseline and a checkpoint, and where most."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rksp_core.errors import ProfileError
from rksp_core.features import figures
from rksp_core.profile import LayerProfile, ModelProfile
from rksp_core.wasserstein import distances, wasserstein

SCHEMA = "rksp.compare/1"

# What is compared, with the words that explain it; eigenvector_condition and nonlinearity_ratio are too noisy.
FIELDS = {
    "near_unit_mass": "near-unit mass",
    "expansive_mass": "expansive mass",
    "contractive_mass": "contractive mass",
    "spectral_radius": "spectral radius",
    "sigma_max": "largest singular value",
    "henrici_departure": "departure from normality",
    "kreiss_constant": "Kreiss constant",
    "transient_growth": "transient growth",
}
WEIGHTS = {"blocks": "in the blocks", "head": "outside the blocks"}
NOTABLE_SHARE = 0.02  # the spread of near-unit mass over five probe batches was .003 to .018
NOTABLE_FACTOR = 1.1
NOTABLE_DISTANCE = 0.02  # of moduli around 1, where a share of .02 of the modes crosses a threshold; not measured
NOTABLE_SIGMAS = 3.0


@dataclass(frozen=True)
class Comparison:
    """A checkpoint's profile beside its baseline."""

    baseline: ModelProfile
    profile: ModelProfile

    def changes(self, index: int) -> dict[str, float | None]:
        """Return value minus baseline of one layer, for each of `FIELDS`; None where either is unknown."""
        before, after = self.baseline.layers[index], self.profile.layers[index]
        return {name: _difference(getattr(after, name), getattr(before, name)) for name in FIELDS}

    def distance(self, index: int) -> float | None:
        """Return the Wasserstein-1 distance of one layer's eigenvalue moduli; None where either is unknown."""
        before, after = self.baseline.layers[index].modulus_quantiles, self.profile.layers[index].modulus_quantiles
        return None if before is None or after is None else wasserstein(after, before)

    @property
    def drift(self) -> dict[str, dict[str, float | None]]:
        """Return {name: {baseline, value, change, sigmas}} over the layers.

        Names are those of `rksp_core.features`; a distance has a change alone. ``sigmas`` is the change over the noise
        of both profiles, None where one of them was not measured.
        """
        before, after = figures(self.baseline), figures(self.profile)
        rows: dict[str, dict[str, float | None]] = {}
        for name in sorted(before.numbers.keys() | after.numbers.keys()):
            values = before.numbers.get(name), after.numbers.get(name)
            rows[name] = {"baseline": values[0], "value": values[1], "change": _difference(values[1], values[0])}
        for name, distance in distances(after.curves, before.curves).items():
            rows[name] = {"baseline": None, "value": None, "change": distance}
        for name, row in rows.items():
            known = name in before.noise and name in after.noise
            noise = math.hypot(before.noise[name], after.noise[name]) if known else 0.0
            row["sigmas"] = None if row["change"] is None or noise == 0.0 else row["change"] / noise
        return rows

    @property
    def explanation(self) -> list[str]:
        """Return sentences: fields that moved, in which layer most; statuses, norms of the weights, and the noise."""
        sentences = [text for name in FIELDS if (text := self._explain(name)) is not None]
        sentences += self._explain_distances()
        for before, after in zip(self.baseline.layers, self.profile.layers, strict=True):
            if before.status != after.status:
                sentences.append(f"{after.layer} was {', '.join(before.status)} and is {', '.join(after.status)}")
        sentences = sentences or ["no layer moved by more than the spread of probe batches"]
        return sentences + self._explain_weights() + self._explain_sigmas()

    def _explain_distances(self) -> list[str]:
        layers = [(layer.layer, self.distance(index)) for index, layer in enumerate(self.profile.layers)]
        known = [(name, distance) for name, distance in layers if distance is not None]
        moved = [each for each in known if each[1] > NOTABLE_DISTANCE]
        if not moved:
            return []
        layer, distance = max(moved, key=lambda each: each[1])
        sentence = (
            f"the moduli of the eigenvalues moved in {len(moved)} of {len(known)} layers, most in {layer}: "
            f"by {distance:.3g} on average (Wasserstein distance)"
        )
        return [sentence]

    def _explain_weights(self) -> list[str]:
        norms = dataclasses.asdict(self.baseline.weights), dataclasses.asdict(self.profile.weights)
        return [
            f"the largest spectral norm of a weight matrix {place} went from {before:.3g} to {after:.3g}"
            for name, place in WEIGHTS.items()
            if (before := norms[0][name]) is not None
            and (after := norms[1][name]) is not None
            and _notable(name, before, after)
        ]

    def _explain_sigmas(self) -> list[str]:
        """Return what lies beyond the noise, when both profiles know theirs."""
        known = {name: row["sigmas"] for name, row in self.drift.items() if row["sigmas"] is not None}
        if not known:
            return []
        beyond = {name: sigmas for name, sigmas in known.items() if abs(sigmas) > NOTABLE_SIGMAS}
        if not beyond:
            return [f"nothing over the layers moved by more than {NOTABLE_SIGMAS:g} sigmas of its measured noise"]
        ordered = sorted(beyond.items(), key=lambda each: -abs(each[1]))
        return [f"beyond the measured noise, in sigmas: {', '.join(f'{name} {value:+.1f}' for name, value in ordered)}"]

    def _explain(self, name: str) -> str | None:
        pairs = [
            (layer.layer, before, after)
            for layer, before, after in zip(
                self.profile.layers, self.baseline.values(name), self.profile.values(name), strict=True
            )
            if before is not None and after is not None
        ]
        moved = [pair for pair in pairs if _notable(name, pair[1], pair[2])]
        if not moved:
            return None
        layer, before, after = max(moved, key=lambda pair: abs(pair[2] - pair[1]))
        rose = sum(after > before for _, before, after in moved)
        return (
            f"{FIELDS[name]} moved in {len(moved)} of {len(pairs)} layers ({rose} up, {len(moved) - rose} down), "
            f"most in {layer}: {before:.3g} -> {after:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the checkpoint's profile, each layer with its baseline and its changes."""
        document = self.profile.to_dict(eigenvalues=False)
        document["schema"] = SCHEMA
        for index, layer in enumerate(document["layers"]):
            layer["baseline"] = _fields(self.baseline.layers[index])
            layer["change"] = self.changes(index)
            layer["distance"] = self.distance(index)
        document["step"] = self.profile.step
        document["baseline"] = {"step": self.baseline.step, "summary": self.baseline.summary}
        if self.baseline.noise:
            document["baseline"]["noise"] = dict(self.baseline.noise)
        document["drift"] = self.drift
        document["explanation"] = self.explanation
        return document


def compare(baseline: ModelProfile, profile: ModelProfile) -> Comparison:
    """Set a profile beside its baseline.

    Raises
    ------
    ProfileError
        When the probes, the numerical settings or the layers differ: the numbers would not be comparable.
    """
    probes = baseline.probe.get("sha256"), profile.probe.get("sha256")
    if probes[0] != probes[1]:
        short = [str(probe)[:12] for probe in probes]
        raise ProfileError(f"the baseline is on probe {short[0]}, the other on {short[1]}; profile both on one --probe")
    before, after = dict(baseline.settings), dict(profile.settings)
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if differing:
        name = differing[0]
        raise ProfileError(
            f"the baseline was made with {name} {before.get(name)!r}, the other with {after.get(name)!r}; "
            "profile both with the same settings"
        )
    names = [[layer.layer for layer in each.layers] for each in (baseline, profile)]
    if names[0] != names[1]:
        raise ProfileError(
            f"the baseline has {len(names[0])} layers ({names[0][0]} ...), the other {len(names[1])} "
            f"({names[1][0]} ...); compare profiles of one model"
        )
    return Comparison(baseline, profile)


def _notable(name: str, before: float, after: float) -> bool:
    if name.endswith("_mass") or name == "henrici_departure":
        return abs(after - before) > NOTABLE_SHARE
    low, high = sorted((before, after))
    return high > NOTABLE_FACTOR * low


def _fields(layer: LayerProfile) -> dict[str, float | None]:
    return {name: getattr(layer, name) for name in FIELDS}


def _difference(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value - reference
