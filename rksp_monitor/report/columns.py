"""What the layer table and the depth table show, the same in every format for people."""

# ruff: noqa: RUF001 - the Greek letters are the paper's symbols

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rksp_core.profile import LayerProfile, ModelProfile

if TYPE_CHECKING:
    from rksp_monitor.preflight import PreflightReport

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A column of the layer table: heading, what it means, how a layer's cell reads."""

    heading: str
    meaning: str
    cell: Callable[[LayerProfile], str]


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure of ``digits`` significant digits, or a dash where there is none."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else digits - 1
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def fixed(value: float | None, decimals: int = 2) -> str:
    """Return a figure with as many decimals as all of its column have."""
    if value is None:
        return MISSING
    return f"{value:.{decimals}f}" if abs(value) < 1e4 else f"{value:.2e}"


def share(value: float | None) -> str:
    """Return a share 0..1 with two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def _field(name: str, form: Callable[[Any], str]) -> Callable[[LayerProfile], str]:
    return lambda layer: form(getattr(layer, name))


def _reliable(layer: LayerProfile) -> str:
    return f"{layer.reliable.modes}" if layer.rank else MISSING


COLUMNS = (
    Column("layer", "name of the block", lambda layer: layer.layer),
    Column("d", "width", lambda layer: str(layer.width)),
    Column("m", "kept directions", lambda layer: str(layer.rank)),
    Column("near", "near-unit mass: share of modes with 0.90 <= |λ| <= 1.05", _field("near_unit_mass", share)),
    Column("expan", "expansive mass: |λ| > 1.05", _field("expansive_mass", share)),
    Column("mid", "mid mass: 0.80 <= |λ| < 0.90", _field("mid_mass", share)),
    Column("contr", "contractive mass: |λ| < 0.80", _field("contractive_mass", share)),
    Column("ρ", "spectral radius", _field("spectral_radius", number)),
    Column("σmax", "largest singular value", _field("sigma_max", number)),
    Column("K", "Kreiss constant K_θ at θ = max(1, 1.05 ρ)", _field("kreiss_constant", number)),
    Column("growth", "transient growth, max |A^n| / θ^n for n up to the depth", _field("transient_growth", number)),
    Column("κ", "eigenvector condition; noisy, shown, and never decides", _field("eigenvector_condition", number)),
    Column("Henr", "Henrici departure from normality, 0..1", _field("henrici_departure", share)),
    Column("η", "nonlinearity ratio, 0..1: what the linear operator leaves", _field("nonlinearity_ratio", share)),
    Column("upd", "update ratio |Yw - Xw| / |Xw|", _field("update_ratio", number)),
    Column("rel", "modes that pass the ResDMD filter", _reliable),
    Column("status", "what to know before reading the row", lambda layer: ", ".join(layer.status)),
)

# Fields of the depth table: (field of the summary, heading).
THIRDS = (
    ("near_unit_mass", "near-unit mass"),
    ("expansive_mass", "expansive mass"),
    ("contractive_mass", "contractive mass"),
    ("spectral_radius", "spectral radius ρ"),
    ("sigma_max", "σmax"),
    ("kreiss_constant", "Kreiss constant K"),
    ("henrici_departure", "Henrici departure"),
    ("nonlinearity_ratio", "nonlinearity ratio η"),
    ("reliable_modes_ratio", "reliable modes, share"),
)
AGGREGATES = ("early", "middle", "late", "mean", "min", "max", "std")


def depth_rows(profile: ModelProfile) -> list[list[str]]:
    """Return the rows of the depth table: heading, then one cell for each of `AGGREGATES`."""
    summary = profile.summary
    return [[heading, *(number(summary[name][key]) for key in AGGREGATES)] for name, heading in THIRDS]


def baseline_rows(report: PreflightReport) -> list[tuple[str, str]]:
    """Return what the uncalibrated baselines say, one (name, value) each."""
    scores = report.baselines
    rows = [("near-unit mass, mean", number(scores["near_unit_mass"]))]
    if scores["learning_rate"] is not None:
        standard = scores["standard_learning_rate"]
        rate = f"{scores['learning_rate']:g} ({scores['optimizer']}"
        rows.append(("learning rate", rate + (f", standard {standard:.2g})" if standard else ")")))
        product = f"{scores['learning_rate_times_depth']:.3g} ({scores['depth']} blocks)"
        rows.append(("learning rate x depth", product))
    ahead = scores["look_ahead"]
    if not ahead["available"]:
        return [*rows, ("look-ahead", f"unavailable: {ahead['reason']}")]
    losses = " ".join("not finite" if loss is None else f"{loss:.4g}" for loss in ahead["losses"])
    rows.append((f"look-ahead, loss of {ahead['steps']} full-rate steps", losses))
    before, after = number(ahead["hidden_rms_before"]), number(ahead["hidden_rms_after"])
    rows.append(
        ("look-ahead, hidden RMS before -> after", f"{before} -> {'not finite' if after == MISSING else after}")
    )
    if ahead["summary_after"]:
        summary = report.profile.summary
        for name, heading in (("near_unit_mass", "near-unit mass"), ("kreiss_constant", "Kreiss constant")):
            pair = (number(summary[name]["mean"]), number(ahead["summary_after"][name]["mean"]))
            rows.append((f"look-ahead, mean {heading} before -> after", " -> ".join(pair)))
    return rows


def model_line(report: PreflightReport) -> str:
    """Return one line on the model: class, size, weights, depth and width."""
    model, layers = report.model, report.profile.layers
    width = max(layer.width for layer in layers)
    return (
        f"{model['class']} from {model['source']}: {model['parameters'] / 1e6:.1f} M parameters, {len(layers)} blocks "
        f"of width {width}, {model['weights']} weights, {'with' if model['normalization'] else 'without'} normalization"
    )


def probe_line(report: PreflightReport) -> str:
    """Return one line on the probe: origin, size and hash."""
    probe, layer = report.profile.probe, report.profile.layers[0]
    return (
        f"{probe['origin']}: {layer.samples} token states ({layer.distinct_samples} distinct in the first block), "
        f"sha256 {probe['sha256'][:12]}"
    )
