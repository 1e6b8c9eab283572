"""The report for a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rksp_monitor.report.columns import AGGREGATES, COLUMNS, baseline_rows, depth_rows, model_line, probe_line

if TYPE_CHECKING:
    from rksp_monitor.preflight import PreflightReport

STYLES = {"proceed": "bold green", "monitor": "bold yellow", "use_kss": "bold red", "inconclusive": "bold magenta"}


def to_table(report: PreflightReport, *, width: int = 120, colour: bool = False) -> str:
    """Return the report in plain or coloured text, at least as wide as its layer table needs."""
    layers = _layers(report)
    plain = Console(file=io.StringIO(), width=1000)
    needed = plain.measure(layers).maximum
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=max(width, needed),
        force_terminal=colour,
        no_color=not colour,
        highlight=False,
        soft_wrap=False,
    )
    console.print(Text(model_line(report)))
    console.print(Text(f"probe: {probe_line(report)}"))
    console.print(layers)
    console.print(_depth(report))
    console.print(_baselines(report))
    for warning in report.warnings:
        console.print(Text("warning: ", style="yellow").append(warning, style="default"))
    decision = report.decision
    console.print(f"\n[{STYLES[decision.verdict]}]{decision.verdict}[/]")
    for reason in decision.reasons:
        console.print(f"  - {escape(reason)}")
    console.print(Text(f"  {decision.caveat}", style="dim"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _layers(report: PreflightReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        left = column.heading in ("layer", "status")
        table.add_column(column.heading, justify="left" if left else "right", no_wrap=True)
    for layer in report.profile.layers:
        table.add_row(*(Text(column.cell(layer)) for column in COLUMNS))
    return table


def _depth(report: PreflightReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="\nBy depth", title_justify="left")
    table.add_column("")
    for name in AGGREGATES:
        table.add_column(name, justify="right")
    for row in depth_rows(report.profile):
        table.add_row(*row)
    return table


def _baselines(report: PreflightReport) -> Table:
    title = "\nBaselines (scores, not calibrated)"
    table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left")
    for name, value in baseline_rows(report):
        table.add_row(name, Text(value))
    return table
