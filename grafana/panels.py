"""The three kinds of panel of the dashboard: a large number, bands of states, lines over time."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as model

SOURCE = model.DataSourceRef(type_val="prometheus", uid="$datasource")

Query = tuple[str, str]  # PromQL, legend
Steps = tuple[tuple[float | None, str], ...]  # from this value on (None: from below), this colour
Words = dict[int, tuple[str, str]]  # value: the word shown for it, colour

RISK_WORDS: Words = {0: ("ok", "green"), 1: ("elevated", "yellow"), 2: ("high", "orange"), 3: ("CRITICAL", "red")}
RISK_STEPS: Steps = ((None, "green"), (1.0, "yellow"), (2.0, "orange"), (3.0, "red"))


def number(
    title: str,
    text: str,
    expr: str,
    *,
    legend: str = "{{run}}",
    unit: str = "none",
    steps: Steps = ((None, "blue"),),
    words: Words | None = None,
    empty: str = "no data",
    width: int = 3,
) -> Any:
    """One large number a series, coloured by ``steps``; ``words`` replace values."""
    panel = (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .no_value(empty)
        .thresholds(_thresholds(steps))
        .color_mode(looks.BigValueColorMode.BACKGROUND)
        .graph_mode(looks.BigValueGraphMode.NONE)
        .text_mode(looks.BigValueTextMode.VALUE_AND_NAME)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .height(5)
        .span(width)
        .with_target(_query(expr, legend, "A").instant())
    )
    return panel.mappings(_mappings(words)) if words else panel


def timeline(title: str, text: str, words: Words, *queries: Query, width: int = 12) -> Any:
    """One band a series, coloured by the words that its values stand for."""
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit("none")
        .thresholds(_thresholds(tuple((float(value) or None, colour) for value, (_, colour) in words.items())))
        .mappings(_mappings(words))
        .show_value(looks.VisibilityMode.AUTO)
        .height(7)
        .span(width)
    )
    for name, (expr, legend) in zip("ABCDEF", queries, strict=False):
        panel.with_target(_query(expr, legend, name).range())
    return panel


def lines(title: str, text: str, unit: str, *queries: Query) -> Any:
    """Lines over time, one a query and series."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .line_width(1)
        .show_points(looks.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(looks.LegendDisplayMode.LIST)
            .placement(looks.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
        .height(7)
        .span(12)
    )
    for name, (expr, legend) in zip("ABCDEF", queries, strict=False):
        panel.with_target(_query(expr, legend, name).range())
    return panel


def _query(expr: str, legend: str, name: str) -> Any:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(name).datasource(SOURCE)


def _thresholds(steps: Steps) -> Any:
    marks = [model.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(marks)


def _mappings(words: Words) -> list[Any]:
    options = {
        str(value): model.ValueMappingResult(text=word, color=colour, index=index)
        for index, (value, (word, colour)) in enumerate(words.items())
    }
    return [model.ValueMap(options=options)]
