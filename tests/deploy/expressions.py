"""Every PromQL expression of the dashboard and of the alert rules, and the metrics they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# What Prometheus itself writes for every target and rule.
OWN_SERIES = {"up", "ALERTS"}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every panel and row, those inside collapsed rows too."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def dashboard_expressions(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (where, expression) of every panel and annotation."""
    shown = [
        (f"{panel['title']} {target['refId']}", target["expr"])
        for panel in panels(dashboard)
        for target in panel.get("targets", [])
    ]
    return shown + [(mark["name"], mark["expr"]) for mark in dashboard["annotations"]["list"]]


def rule_expressions(rules: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (alert, expression) of every rule."""
    return [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]


def selectors_in(expression: str) -> list[str]:
    """Return the instant selectors: the metric's name, with its braces where it has them."""
    return re.findall(r"\b(?:rksp_\w+|up|ALERTS)(?:\{[^}]*\})?", expression)


def metrics_in(expression: str) -> set[str]:
    """Return the names of the metrics; of a histogram, the name without its suffix."""
    names = {selector.partition("{")[0] for selector in selectors_in(expression)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def filled_in(expression: str, job: str = "rksp", window: str = "2m") -> str:
    """Put values in place of Grafana's variables, as Grafana does."""
    for name, value in (("$__rate_interval", window), ("$job", job), ("$instance", ".+"), ("$run", ".*")):
        expression = expression.replace(name, value)
    return expression
