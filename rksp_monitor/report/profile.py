"""One profile, and two compared, for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text

from rksp_core.compare import Comparison
from rksp_core.profile import ModelProfile
from rksp_monitor.report.columns import AGGREGATES, COLUMNS, MISSING, depth_rows, number, share
from rksp_monitor.report.drawing import draw, table

# Heading, field, and how it reads, of the comparison's layer table.
COMPARED: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("near", "near_unit_mass", share),
    ("expan", "expansive_mass", share),
    ("contr", "contractive_mass", share),
    ("radius", "spectral_radius", number),
    ("sigma", "sigma_max", number),
    ("Henr", "henrici_departure", share),
    ("K", "kreiss_constant", number),
)


def profile_table(profile: ModelProfile, title: str, *, width: int = 120, colour: bool = False) -> str:
    """Return the layer table and the depth table of one profile."""
    layers = table([(column.heading, column.heading not in ("layer", "status")) for column in COLUMNS])
    for layer in profile.layers:
        layers.add_row(*(Text(column.cell(layer)) for column in COLUMNS))
    depth = table([("", False), *((name, True) for name in AGGREGATES)])
    for row in depth_rows(profile):
        depth.add_row(*row)
    remedies = {layer.remedy for layer in profile.layers if layer.remedy}
    return draw([Text(title), layers, Text("\nBy depth"), depth, *map(Text, sorted(remedies))], layers, width, colour)


def comparison_table(comparison: Comparison, title: str, *, width: int = 120, colour: bool = False) -> str:
    """Return the change of every layer, as ``value (change)``, and what it means in sentences."""
    layers = table([("layer", False), *((heading, True) for heading, _, _ in COMPARED)])
    for index, layer in enumerate(comparison.profile.layers):
        changes = comparison.changes(index)
        cells = [_cell(getattr(layer, field), changes[field], form) for _, field, form in COMPARED]
        layers.add_row(layer.layer, *cells)
    sentences = [Text(f"- {sentence}") for sentence in comparison.explanation]
    return draw([Text(title), layers, Text(""), *sentences], layers, width, colour)


def _cell(value: float | None, change: float | None, form: Callable[[float | None], str]) -> str:
    if value is None or change is None:
        return f"{form(value)} ({MISSING})"
    sign = "-" if change < 0 else "+"
    return f"{form(value)} ({sign}{form(abs(change))})"
