"""The report as Markdown, for a pull request or a job summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rksp_monitor.report.columns import AGGREGATES, COLUMNS, baseline_rows, depth_rows, model_line, probe_line

if TYPE_CHECKING:
    from rksp_monitor.preflight import PreflightReport


def to_markdown(report: PreflightReport) -> str:
    """Return GitHub-flavoured Markdown."""
    decision = report.decision
    parts = [
        f"# rksp preflight: {decision.verdict}",
        "\n".join(f"- {_escape(reason)}" for reason in decision.reasons),
        f"_{decision.caveat}_",
        f"{_escape(model_line(report))}  \nProbe: {_escape(probe_line(report))}",
        "## Layers",
        _table([c.heading for c in COLUMNS], ([c.cell(layer) for c in COLUMNS] for layer in report.profile.layers)),
        "; ".join(f"**{c.heading}** {c.meaning}" for c in COLUMNS).replace("|", "\\|"),
        "## By depth",
        _table(["", *AGGREGATES], depth_rows(report.profile)),
        "## Baselines (scores, not calibrated)",
        _table(["baseline", "value"], baseline_rows(report)),
    ]
    if report.warnings:
        parts += ["## Warnings", "\n".join(f"- {_escape(warning)}" for warning in report.warnings)]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escape(cell) for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _escape(text: str) -> str:
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return text
