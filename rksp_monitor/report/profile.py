"""One profile, and two compared, for a terminal."""

# ruff: noqa: RUF001 - the Greek letters are the paper's symbols

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text

from rksp_core.compare import Comparison
from rksp_core.profile import ModelProfile, WeightNorms
from rksp_monitor.report.columns import AGGREGATES, COLUMNS, MISSING, depth_rows, fixed, number, share
from rksp_monitor.report.drawing import draw, fitting, table

# Heading, field, what it means, how it reads, and how soon it goes where there is no room, of the comparison's table.
COMPARED: tuple[tuple[str, str, str, Callable[[float | None], str], int], ...] = (
    ("near", "near_unit_mass", "near-unit mass", share, 1),
    ("expan", "expansive_mass", "expansive mass", share, 4),
    ("contr", "contractive_mass", "contractive mass", share, 7),
    ("ρ", "spectral_radius", "spectral radius", fixed, 5),
    ("σmax", "sigma_max", "largest singular value", fixed, 6),
    ("Henr", "henrici_departure", "Henrici departure from normality, 0..1", share, 2),
    ("K", "kreiss_constant", "Kreiss constant", fixed, 3),
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
    notes = [*([_weights_line(profile)] if profile.weights != WeightNorms() else []), *sorted(remedies)]
    return draw([Text(title), layers, Text("\nBy depth"), depth, *map(Text, notes)], layers, width, colour)


def comparison_table(comparison: Comparison, title: str, *, width: int = 120, colour: bool = False) -> str:
    """Return the change of every layer, as ``value (change)``, and what it means in sentences.

    Columns that do not fit ``width`` letters are left out.
    """
    rows = []
    for index, layer in enumerate(comparison.profile.layers):
        changes = comparison.changes(index)
        cells = (_cell(getattr(layer, field), changes[field], form) for _, field, _, form, _ in COMPARED)
        rows.append([layer.layer, *cells])
    headings = ["layer", *(heading for heading, *_ in COMPARED)]
    shown = fitting(headings, [0, *(rank for *_, rank in COMPARED)], rows, width)
    layers = table([(headings[index], index > 0) for index in shown])
    for row in rows:
        layers.add_row(*(Text(row[index]) for index in shown))
    meanings = "; ".join(f"{heading}: {meaning}" for heading, _, meaning, *_ in (COMPARED[i - 1] for i in shown[1:]))
    left_out = ", ".join(heading for index, heading in enumerate(headings) if index not in shown)
    legend = Text(f"{meanings}{f'; left out for want of room: {left_out}' if left_out else ''}", style="dim")
    sentences = [Text(f"- {sentence}") for sentence in comparison.explanation]
    return draw([Text(title), layers, legend, Text(""), *sentences], layers, width, colour)


def _weights_line(profile: ModelProfile) -> str:
    """Return one line on the spectral norms of the weights."""
    blocks, head = number(profile.weights.blocks), number(profile.weights.head)
    return f"largest spectral norm of a weight matrix: {blocks} in the blocks, {head} outside them"


def _cell(value: float | None, change: float | None, form: Callable[[float | None], str]) -> str:
    if value is None or change is None:
        return f"{form(value)} ({MISSING})"
    sign = "-" if change < 0 else "+"
    return f"{form(value)} ({sign}{form(abs(change))})"
