"""A preflight report as a table, JSON, Markdown or one HTML page; each format has its module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from rksp_monitor.preflight import PreflightReport

Format = Literal["table", "json", "markdown", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)


def render(report: PreflightReport, form: Format, *, width: int = 120, colour: bool = False) -> str:
    """Return the report as text in this format; ``width`` and ``colour`` are for the table alone."""
    if form == "json":
        from rksp_monitor.report.document import to_json

        return to_json(report)
    if form == "markdown":
        from rksp_monitor.report.markdown import to_markdown

        return to_markdown(report)
    if form == "html":
        from rksp_monitor.report.html import to_html

        return to_html(report)
    from rksp_monitor.report.table import to_table

    return to_table(report, width=width, colour=colour)
