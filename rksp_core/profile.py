"""What a profile holds, layer by layer and over the layers, and how it is stored (JSON and ``.npz``).

Values only: `rksp_core.profiling` computes them. A number that could not be computed is None, never NaN, so that
every document is valid JSON; `LayerProfile.status` and `LayerProfile.remedy` say why.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812 - its name says nothing alone

import numpy as np

from rksp_core.atomic import write_atomic
from rksp_core.errors import ProfileError
from rksp_core.wasserstein import QUANTILES

SCHEMA = "rksp.profile/1"

STATUSES = (
    "ok",
    "rank_deficient",
    "rank_capped",
    "interpolating",
    "degenerate_update",
    "not_finite",
)


@dataclass(frozen=True)
class ReliableMasses:
    """The four spectral masses over the modes that pass the ResDMD filter (Kim et al. 2026, Eq. 10).

    ``modes`` counts them, 0..rank; the masses are shares of that count, and None when no mode is left.
    """

    modes: int
    near_unit_mass: float | None = None
    expansive_mass: float | None = None
    contractive_mass: float | None = None
    mid_mass: float | None = None


@dataclass(frozen=True)
class LayerProfile:
    """The spectral profile of one residual block; fields are those of the profile JSON.

    ``layer`` is the module's name, ``width`` d, ``rank`` the kept dimension m, ``samples`` N. The masses are
    unfiltered shares of m (Eq. 11-13). ``henrici_departure`` lies in [0, 1], ``nonlinearity_ratio`` (Eq. 5) in
    [0, 1] or None below the update floor, ``kreiss_constant`` is K_theta at ``kreiss_theta``, at least 1,
    None above 1e75; ``kreiss_classical`` is None when infinite. ``modulus_quantiles`` are 32 quantiles of the
    eigenvalues' moduli (`rksp_core.wasserstein`). ``status`` lists one or more of `STATUSES`.
    """

    layer: str
    width: int
    rank: int
    samples: int
    distinct_samples: int
    near_unit_mass: float | None = None
    expansive_mass: float | None = None
    contractive_mass: float | None = None
    mid_mass: float | None = None
    reliable: ReliableMasses = field(default_factory=lambda: ReliableMasses(0))
    spectral_radius: float | None = None
    eigenvector_condition: float | None = None
    sigma_max: float | None = None
    henrici_departure: float | None = None
    kreiss_constant: float | None = None
    kreiss_theta: float | None = None
    kreiss_classical: float | None = None
    transient_growth: float | None = None
    growth_horizon: int | None = None
    nonlinearity_ratio: float | None = None
    update_ratio: float | None = None
    modulus_quantiles: tuple[float, ...] | None = field(default=None, repr=False)
    status: tuple[str, ...] = ("ok",)
    remedy: str = ""
    eigenvalues: tuple[complex, ...] | None = field(default=None, repr=False)

    def to_dict(self, *, eigenvalues: bool = True) -> dict[str, Any]:
        """Return the JSON form; eigenvalues as [re, im] pairs, left out when unknown or not wanted."""
        document = dataclasses.asdict(self)
        document["status"] = list(self.status)
        if self.modulus_quantiles is not None:
            document["modulus_quantiles"] = list(self.modulus_quantiles)
        del document["eigenvalues"]
        if eigenvalues and self.eigenvalues is not None:
            document["eigenvalues"] = [[value.real, value.imag] for value in self.eigenvalues]
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LayerProfile:
        """Read the JSON form; fields of a later version are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in document.items() if name in known}
        values["status"] = tuple(values.get("status", ("ok",)))
        for name in (*_COUNTS, *_NUMBERS):
            values[name] = _number(values, name, optional=name not in _COUNTS)
        values["reliable"] = ReliableMasses(**values["reliable"])
        quantiles = values.get("modulus_quantiles")
        values["modulus_quantiles"] = None if quantiles is None else tuple(_quantiles(quantiles))
        pairs = values.get("eigenvalues")
        values["eigenvalues"] = None if pairs is None else tuple(complex(re, im) for re, im in pairs)
        return cls(**values)


_COUNTS = ("width", "rank", "samples", "distinct_samples")
_NUMBERS = tuple(f.name for f in dataclasses.fields(LayerProfile) if f.type in ("float | None", "int | None"))

# Fields with one number per layer; `ModelProfile.summary` aggregates each of them.
SUMMARY_FIELDS = (
    "near_unit_mass",
    "expansive_mass",
    "contractive_mass",
    "mid_mass",
    "spectral_radius",
    "eigenvector_condition",
    "sigma_max",
    "henrici_departure",
    "kreiss_constant",
    "transient_growth",
    "nonlinearity_ratio",
    "update_ratio",
    "reliable_modes_ratio",
)


@dataclass(frozen=True)
class WeightNorms:
    """The largest spectral norms of a model's matrices; None where there is no such matrix, or it is in shards.

    ``blocks`` is over the matrices in the residual blocks, ``head`` over those of linear maps outside them (look-up
    tables are no such maps). Made by `rksp_core.weight_norms`.
    """

    blocks: float | None = None
    head: float | None = None


@dataclass(frozen=True)
class ModelProfile:
    """The profile of a model: its layers in depth order, and the settings and probe they belong to.

    Two profiles can be compared only when ``settings`` and ``probe["sha256"]`` agree.
    ``step``, ``loss`` and ``gradient_norm`` are filled by a trainer that writes its own profiles; ``not_finite`` names
    those of its figures that were NaN or infinite, which is another thing than not known. ``noise`` is the standard
    error of the features by name (`rksp_core.noise`), where it was measured. ``weights`` are the largest spectral norms
    of the model's matrices, in the blocks and outside them.
    """

    layers: tuple[LayerProfile, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    not_finite: tuple[str, ...] = ()
    noise: Mapping[str, float] = field(default_factory=dict)
    weights: WeightNorms = field(default_factory=WeightNorms)

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return {field: {mean, min, max, std (ddof 0), early, middle, late}} over the layers that have a value."""
        return {name: _aggregate(self.values(name)) for name in SUMMARY_FIELDS}

    def values(self, name: str) -> list[float | None]:
        """Return one value a layer, in depth order, of a field in `SUMMARY_FIELDS`."""
        if name == "reliable_modes_ratio":
            return [layer.reliable.modes / layer.rank if layer.rank else None for layer in self.layers]
        return [getattr(layer, name) for layer in self.layers]

    def to_dict(self, *, eigenvalues: bool = True) -> dict[str, Any]:
        """Return the profile JSON (schema "rksp.profile/1"): strict JSON, no NaN and no infinity."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "layers": [layer.to_dict(eigenvalues=eigenvalues) for layer in self.layers],
            "summary": self.summary,
            "settings": dict(self.settings),
            "probe": dict(self.probe),
        }
        if self.step is not None:
            document |= {"step": self.step, "loss": self.loss, "gradient_norm": self.gradient_norm}
            document["not_finite"] = list(self.not_finite)
        if self.noise:
            document["noise"] = dict(self.noise)
        norms = {name: finite_or_none(value) for name, value in dataclasses.asdict(self.weights).items()}
        if any(value is not None for value in norms.values()):
            document["weight_norms"] = norms
        return document

    @classmethod
    def from_dict(cls, document: Any) -> ModelProfile:
        """Read the profile JSON.

        Raises
        ------
        ProfileError
            When the schema is another one or a field is missing.
        """
        # A preflight document carries the same layers, settings and probe, so it serves as a baseline too.
        schema = document.get("schema") if isinstance(document, Mapping) else None
        if schema not in (SCHEMA, "rksp.preflight/1"):
            raise ProfileError(f"a profile has schema {SCHEMA!r}, got {schema!r}; write one with `rksp profile`")
        try:
            if not document["layers"]:
                raise ValueError("it holds no layers")
            noise, norms = document.get("noise", {}), document.get("weight_norms", {})
            return cls(
                layers=tuple(LayerProfile.from_dict(layer) for layer in document["layers"]),
                settings=dict(document.get("settings", {})),
                probe=dict(document.get("probe", {})),
                step=document.get("step"),
                loss=_number(document, "loss"),
                gradient_norm=_number(document, "gradient_norm"),
                not_finite=tuple(document.get("not_finite", ())),
                noise={name: _number(noise, name, optional=False) for name in noise},
                weights=WeightNorms(_number(norms, "blocks"), _number(norms, "head")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"the profile document is damaged ({error!r}); write it again") from error

    def save(self, path: str | os.PathLike[str], *, eigenvalues: bool = True, mode: int = 0o644) -> None:
        """Write the profile atomically: JSON, or compressed NumPy arrays when ``path`` ends in ``.npz``."""
        if Path(path).suffix == ".npz":
            write_atomic(path, self._to_npz(eigenvalues=eigenvalues), mode=mode)
        else:
            write_atomic(path, json.dumps(self.to_dict(eigenvalues=eigenvalues), allow_nan=False) + "\n", mode=mode)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelProfile:
        """Read what `save` wrote.

        Raises
        ------
        ProfileError
            When the file cannot be read or is no profile.
        """
        try:
            if Path(path).suffix == ".npz":
                return cls._from_npz(path)
            return cls.from_dict(_strict_json(Path(path).read_text(encoding="utf-8")))
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error
        except (OSError, EOFError, ValueError, KeyError, RecursionError, BadZipFile, ZlibError) as error:
            raise ProfileError(f"{path} cannot be read as a profile ({error}); write it again") from error

    def _to_npz(self, *, eigenvalues: bool) -> bytes:
        """Eigenvalues as one complex array a layer; everything else as the JSON text beside them."""
        arrays: dict[str, Any] = {"document": np.array(json.dumps(self.to_dict(eigenvalues=False), allow_nan=False))}
        for index, layer in enumerate(self.layers):
            if eigenvalues and layer.eigenvalues is not None:
                arrays[f"eigenvalues_{index}"] = np.asarray(layer.eigenvalues, dtype=np.complex128)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def _from_npz(cls, path: str | os.PathLike[str]) -> ModelProfile:
        # From bytes: NumPy leaves a file open that turns out to be no archive.
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as arrays:
            profile = cls.from_dict(_strict_json(str(arrays["document"])))
            layers = [
                dataclasses.replace(layer, eigenvalues=tuple(arrays[f"eigenvalues_{index}"].tolist()))
                if f"eigenvalues_{index}" in arrays
                else layer
                for index, layer in enumerate(profile.layers)
            ]
        return dataclasses.replace(profile, layers=tuple(layers))


def _strict_json(text: str) -> Any:
    """Parse JSON; Python's own extensions NaN and Infinity are refused, as they are never written."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON, which has null for it")

    return json.loads(text, parse_constant=refuse)


def finite_or_none(value: float | None) -> float | None:
    """Return the value where it is a finite number, else None: how a profile writes what is not known."""
    return value if value is not None and math.isfinite(value) else None


def _number(document: Mapping[str, Any], name: str, *, optional: bool = True) -> Any:
    value = document.get(name)
    if (value is None and optional) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be a number{' or null' if optional else ''}, got {value!r}")


def _quantiles(values: Any) -> Iterable[float]:
    """Yield the quantiles; as many as every profile has, or distances could not be taken."""
    if not isinstance(values, list | tuple) or len(values) != QUANTILES:
        raise ValueError(f"modulus_quantiles must be {QUANTILES} numbers or null, got {values!r:.60}")
    for value in values:
        yield _number({"modulus_quantiles": value}, "modulus_quantiles", optional=False)


def _aggregate(values: Iterable[float | None]) -> dict[str, float | None]:
    """Aggregate one field over the layers; depth thirds by `numpy.array_split`, None where there is no value."""
    column = np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    def over(part: np.ndarray[Any, Any], function: Any) -> float | None:
        known = part[~np.isnan(part)]
        return float(function(known)) if known.size else None

    thirds = np.array_split(column, 3)
    return {
        "mean": over(column, np.mean),
        "min": over(column, np.min),
        "max": over(column, np.max),
        "std": over(column, np.std),
        "early": over(thirds[0], np.mean),
        "middle": over(thirds[1], np.mean),
        "late": over(thirds[2], np.mean),
    }
