"""Profiles with chosen figures, for tests of what is done with profiles."""

from __future__ import annotations

from rksp_core.profile import LayerProfile, ModelProfile
from rksp_core.wasserstein import QUANTILES


def layer(name: str = "h.0", **figures: object) -> LayerProfile:
    values: dict[str, object] = {
        "width": 8,
        "rank": 8,
        "samples": 64,
        "distinct_samples": 64,
        "near_unit_mass": 0.8,
        "expansive_mass": 0.1,
        "contractive_mass": 0.05,
        "mid_mass": 0.05,
        "spectral_radius": 1.1,
        "sigma_max": 2.0,
        "henrici_departure": 0.1,
        "kreiss_constant": 1.5,
        "transient_growth": 1.7,
    }
    return LayerProfile(layer=name, **(values | figures))  # type: ignore[arg-type]


def spectrum(modulus: float, *, spread: float = 0.0) -> tuple[float, ...]:
    """Return the quantiles of moduli that lie evenly around one."""
    return tuple(modulus + spread * (k - 15.5) / 15.5 for k in range(QUANTILES))


def profile(*, probe: str = "aa", settings: dict[str, object] | None = None, layers: int = 3, **figures: object):
    own = {name: figures.pop(name) for name in ("step", "loss", "gradient_norm", "noise") if name in figures}
    return ModelProfile(
        tuple(layer(f"h.{index}", **figures) for index in range(layers)),
        settings={"eps": 1e-5} if settings is None else settings,
        probe={"sha256": probe},
        **own,
    )
