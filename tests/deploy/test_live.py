"""The dashboard and the alerts on live data: a real Prometheus scrapes a real ``rksp watch`` of a run folder.

The reference trainer starts the run, so that there is a checkpoint to replay. Then come profile files: quiet ones, and
one whose loss the shipped rules call critical, which the watcher answers by an order and the trainer's end of the
control folder acknowledges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rksp_core.control import ControlListener
from rksp_core.limits import Limits
from rksp_core.profile import LayerProfile, ModelProfile, ReliableMasses, WeightNorms
from rksp_core.profile_writer import ProfileWriter
from tests.deploy.expressions import dashboard_expressions, filled_in, rule_expressions, selectors_in
from tests.deploy.processes import PATH, ROOT, daemon, free_port, need, run, wait_until

RUN = "live"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DASHBOARD = dashboard_expressions(json.loads((ROOT / "grafana/rksp.json").read_text(encoding="utf-8")))
RULES_FILE = ROOT / "deploy/prometheus/rules/rksp.rules.yml"
ALERTS = rule_expressions(yaml.safe_load(RULES_FILE.read_text(encoding="utf-8")))
# The shipped rules, and at their highest level all that the dashboard shows of an order.
EVERY_LEVER = {"policy": {"ladder": {3: {"alpha": 0.15, "learning_rate_scale": 0.5, "surprise": 1.0, "rollback": True}}}}


@dataclasses.dataclass(frozen=True)
class Live:
    """A running Prometheus, and the watcher that it scrapes."""

    prometheus: str
    watcher: str
    watcher_process: subprocess.Popen[bytes]

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of one answer of Prometheus's API; fails when it is an error."""
        url = f"http://{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            document = json.load(answer)
        assert document["status"] == "success", document
        return document["data"]

    def query(self, expression: str) -> list[Any]:
        """Return the samples of an expression, now."""
        return self.ask("query", query=expression)["result"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    need("prometheus")
    folder = tmp_path_factory.mktemp("live")
    with contextlib.ExitStack() as stack:
        watcher_process, watcher = stack.enter_context(_watcher(folder))
        prometheus = stack.enter_context(_prometheus(folder, watcher))
        live = Live(prometheus, watcher, watcher_process)
        _train_one_step(folder)
        _play(folder, live)
        yield live


@contextlib.contextmanager
def _watcher(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port_file, settings = folder / "address", folder / "watch.yaml"
    settings.write_text(yaml.safe_dump(EVERY_LEVER), encoding="utf-8")
    command = [sys.executable, "-m", "rksp_monitor", "watch", str(folder / RUN), "--enforce", "--listen", "127.0.0.1:0"]
    command += ["--run-id", RUN, "--port-file", str(port_file), "--poll-interval", "0.1", "--config", str(settings)]
    environment = ENVIRONMENT | {"RKSP_PER_LAYER_METRICS": "true", "RKSP_REPLAY__SAMPLES": "256"}
    with daemon(command, environment, folder / "watch.log") as process:
        wait_until(port_file.exists, 30, f"the watcher does not serve, see {folder}/watch.log")
        yield process, port_file.read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def _prometheus(folder: Path, watcher: str) -> Iterator[str]:
    """Run Prometheus with the configuration of the repository: other intervals, other addresses, the same job."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    del config["alerting"]
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(RULES_FILE)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [watcher]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
        "log.level": "warn",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with daemon(command, os.environ | {"PATH": PATH}, folder / "prometheus.log"):
        wait_until(lambda: _answers(f"http://{address}/-/ready"), 30, f"not ready, see {folder}/prometheus.log")
        yield address


def _train_one_step(folder: Path) -> None:
    command = [sys.executable, "-m", "training", str(ROOT / "training/configs/recall_small.yaml")]
    for change in (f"output={folder / RUN}", "steps=1", "checkpoint.every=1"):
        command += ["--set", change]
    run(command, ENVIRONMENT, folder)


def _play(folder: Path, live: Live) -> None:
    """Play the run: wait each time until Prometheus has seen what happened."""
    _seen(live, "rksp_checkpoints_processed_total >= 2")  # before and after its step
    writer = ProfileWriter(folder / RUN, every=10)
    for step in range(10, 60, 10):
        writer.write(
            _profile(mass=0.60 + 0.001 * (step % 20), henrici=0.2, kreiss=2.0), step, loss=2.0, gradient_norm=1.0
        )
    _seen(live, "rksp_checkpoint_last_processed_step == 50")
    _seen(live, "rksp_control_applied_generation == 0")
    writer.write(_profile(mass=0.30, henrici=0.9, kreiss=9.0), 100, loss=9.0, gradient_norm=40.0)
    _seen(live, "rksp_control_desired_generation == 1")
    trainer = ControlListener(folder / RUN / "control", RUN, Limits(learning_rate_scale=(0.01, 1.0), surprise=(0.1, 10.0)))
    order = trainer.poll(101)
    assert order is not None
    trainer.acknowledge(order, 101)
    _seen(live, "rksp_control_applied_generation == 1")


def _profile(mass: float, henrici: float, kreiss: float) -> ModelProfile:
    layers = [
        LayerProfile(
            layer=f"blocks.{index}",
            width=64,
            rank=64,
            samples=2048,
            distinct_samples=2048,
            near_unit_mass=mass,
            expansive_mass=0.1,
            contractive_mass=0.2,
            mid_mass=round(0.7 - mass, 6),
            reliable=ReliableMasses(40),
            spectral_radius=1.1,
            sigma_max=3.0,
            henrici_departure=henrici,
            kreiss_constant=kreiss + index,
            nonlinearity_ratio=0.4,
            modulus_quantiles=tuple(0.4 + mass * quantile / 31 for quantile in range(32)),
        )
        for index in range(2)
    ]
    norms = WeightNorms(blocks=4.0, head=2.0)
    return ModelProfile(tuple(layers), settings={"samples": 2048}, probe={"sha256": "0" * 64}, weights=norms)


def _seen(live: Live, expression: str) -> None:
    wait_until(lambda: bool(live.query(expression)), 60, f"Prometheus never saw {expression}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.parametrize(("where", "expression"), DASHBOARD, ids=[where for where, _ in DASHBOARD])
def test_every_query_of_the_dashboard_returns_numbers(live: Live, where: str, expression: str):
    values = [float(series["value"][1]) for series in live.query(filled_in(expression))]
    assert any(math.isfinite(value) for value in values), (where, values)


def test_the_variables_of_the_dashboard_find_the_run(live: Live):
    for query in ("rksp_build_info", "rksp_run_info"):
        (series,) = live.query(query)
        assert series["metric"]["job"] == "rksp"
        assert series["metric"]["instance"] == live.watcher
    assert series["metric"]["run"] == RUN


@pytest.mark.parametrize(("alert", "expression"), ALERTS, ids=[alert for alert, _ in ALERTS])
def test_every_alert_is_evaluated_on_series_that_exist(live: Live, alert: str, expression: str):
    live.query(expression)
    for selector in selectors_in(expression):
        assert live.query(selector), f"{alert}: no series for {selector}"


def test_prometheus_evaluates_every_rule_without_error(live: Live):
    rules = [rule for group in live.ask("rules")["groups"] for rule in group["rules"]]
    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules), 5, "rules were not evaluated")
    assert {rule["name"]: rule["health"] for rule in rules} == {alert: "ok" for alert, _ in ALERTS}


def test_the_risk_raises_an_alert_and_the_order_that_was_obeyed_does_not(live: Live):
    _seen(live, f'ALERTS{{alertname="RkspRiskCritical",run="{RUN}"}}')
    _seen(live, 'absent(ALERTS{alertname="RkspControlNotAcknowledged"})')
    _seen(live, 'absent(ALERTS{alertname="RkspWatcherDown"})')


def test_promtool_finds_nothing_to_say_about_the_metrics(live: Live):
    need("promtool")
    with urllib.request.urlopen(f"http://{live.watcher}/metrics", timeout=10) as answer:
        text = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_watcher_that_ends_is_noticed(live: Live):
    # Last in this file: it ends what the others use.
    live.watcher_process.send_signal(signal.SIGTERM)
    assert live.watcher_process.wait(20) == 0
    _seen(live, 'ALERTS{alertname="RkspWatcherDown"}')
