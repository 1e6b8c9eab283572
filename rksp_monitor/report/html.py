"""The report as one HTML page that needs nothing else: styles and figures lie in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rksp_monitor.report import columns, plots

if TYPE_CHECKING:
    from rksp_monitor.preflight import PreflightReport


def to_html(report: PreflightReport) -> str:
    """Return the page; every text in it is escaped, the figures are inline SVG."""
    environment = Environment(
        loader=PackageLoader("rksp_monitor.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    layers = report.profile.layers
    # The drawings are our own, made of numbers: the only markup that is not escaped.
    figures = {
        "eigenvalues": Markup(plots.eigenvalue_figure(report.profile)),  # noqa: S704
        "masses": Markup(plots.masses_figure(layers)),  # noqa: S704
        "kreiss": Markup(plots.kreiss_figure(layers)),  # noqa: S704
    }
    return environment.get_template("preflight.html.j2").render(
        report=report,
        model=columns.model_line(report),
        probe=columns.probe_line(report),
        columns=columns.COLUMNS,
        rows=[[column.cell(layer) for column in columns.COLUMNS] for layer in layers],
        aggregates=columns.AGGREGATES,
        depth=columns.depth_rows(report.profile),
        baselines=columns.baseline_rows(report),
        figures=figures,
        document=report.to_dict(),
    )
