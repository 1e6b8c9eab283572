"""The dashboard: the committed file is the generator's, and every panel says what it shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from rksp_monitor.metrics import METRICS
from tests.deploy.expressions import OWN_SERIES, dashboard_expressions, metrics_in, panels, rule_expressions
from tests.deploy.processes import ROOT

RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules/rksp.rules.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((ROOT / "grafana/rksp.json").read_text(encoding="utf-8"))
SHOWN = [panel for panel in panels(DASHBOARD) if panel["type"] != "row"]


def test_the_committed_file_is_what_the_generator_writes():
    command = [sys.executable, "-W", "error", str(ROOT / "grafana/dashboard.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("panel", SHOWN, ids=lambda panel: panel["title"])
def test_every_panel_has_a_title_a_description_a_unit_and_a_data_source(panel: dict[str, Any]):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == {"type": "prometheus", "uid": "$datasource"}


def test_panels_have_their_own_number_and_do_not_overlap():
    everything = list(panels(DASHBOARD))
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_variables_narrow_each_other():
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "run"]
    for name, expression in dashboard_expressions(DASHBOARD):
        for selector in re.findall(r"rksp_\w+\{[^}]*\}", expression):
            assert 'job=~"$job"' in selector, name
            assert 'instance=~"$instance"' in selector, name


def test_rates_use_the_rate_interval_of_the_data_source():
    windows = [re.search(r"\brate\([^\[]*\[([^]]*)]", text) for _, text in dashboard_expressions(DASHBOARD)]
    assert {window[1] for window in windows if window} == {"$__rate_interval"}


def test_dashboard_and_alerts_name_only_metrics_that_the_watcher_exports():
    exported = {definition.name for definition in METRICS}
    for name, expression in [*dashboard_expressions(DASHBOARD), *rule_expressions(RULES)]:
        assert metrics_in(expression), name
        assert metrics_in(expression) <= exported | OWN_SERIES, name


def test_what_the_watcher_exports_is_on_the_dashboard():
    shown = set[str]().union(*(metrics_in(expression) for _, expression in dashboard_expressions(DASHBOARD)))
    shown |= {name for variable in DASHBOARD["templating"]["list"] for name in metrics_in(variable["query"])}
    # There is no calibrated probability yet: a panel that is always empty teaches people to overlook empty panels.
    assert {definition.name for definition in METRICS} - shown == {"rksp_divergence_probability_ratio"}


def test_levels_orders_and_switches_of_kss_are_marked():
    marks = " ".join(mark["expr"] for mark in DASHBOARD["annotations"]["list"])
    assert "changes(rksp_risk_level" in marks
    assert "changes(rksp_control_applied_generation" in marks
    assert "changes(rksp_control_desired_generation" in marks


def test_provisioning_points_at_the_dashboard_and_keeps_it_read_only():
    folder = ROOT / "grafana/provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards/rksp.yaml").read_text(encoding="utf-8"))["providers"]
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text(encoding="utf-8"))["datasources"]
    compose = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text(encoding="utf-8"))
    mounts = compose["services"]["grafana"]["volumes"]
    assert provider["allowUiUpdates"] is False
    assert f"../../grafana/rksp.json:{provider['options']['path']}/rksp.json:ro" in mounts
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
