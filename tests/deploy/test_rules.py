"""The alerts: real promtool and amtool accept them, each fires and stays silent when it should, each has a page."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.deploy.expressions import metrics_in, rule_expressions
from tests.deploy.processes import ROOT, need, run

PROMETHEUS = ROOT / "deploy/prometheus"
ALERTMANAGER = ROOT / "deploy/alertmanager/alertmanager.yml"
RULES = yaml.safe_load((PROMETHEUS / "rules/rksp.rules.yml").read_text(encoding="utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]


def test_promtool_accepts_the_configuration_and_the_rules():
    need("promtool")
    assert "SUCCESS" in run(["promtool", "check", "rules", str(PROMETHEUS / "rules/rksp.rules.yml")])
    assert "SUCCESS" in run(["promtool", "check", "config", str(PROMETHEUS / "prometheus.yml")])


def test_each_alert_fires_and_stays_silent_when_it_should():
    need("promtool")
    assert "SUCCESS" in run(["promtool", "test", "rules", str(PROMETHEUS / "rules/rksp_test.yml")])


def test_each_alert_has_a_case_where_it_fires_and_one_where_it_does_not():
    tests = yaml.safe_load((PROMETHEUS / "rules/rksp_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_says_how_bad_what_and_where_to_read_on(alert: dict[str, Any]):
    assert re.fullmatch(r"Rksp([A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(".")
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]
    assert anchor == alert["alert"].lower()


def test_each_alert_waits_for_two_scrapes():
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))["global"]["scrape_interval"]
    for alert in ALERTS:
        assert _seconds(alert["for"]) >= 2 * _seconds(scrape), alert["alert"]


def test_a_watcher_that_is_gone_or_stuck_is_noticed():
    by_name = dict(rule_expressions(RULES))
    assert "absent(" in by_name["RkspWatcherAbsent"]
    assert "time() -" in by_name["RkspCheckpointStale"]
    assert all(metrics_in(expression) for expression in by_name.values())


def test_alertmanager_sends_each_severity_its_own_way():
    need("amtool")
    assert "SUCCESS" in run(["amtool", "check-config", str(ALERTMANAGER)])
    expected = {"critical": "page", "warning": "notify", "info": "look"}
    for severity, receiver in expected.items():
        route = ["amtool", "config", "routes", "test", "--config.file", str(ALERTMANAGER), f"severity={severity}"]
        assert run(route).strip() == receiver


def _seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]
