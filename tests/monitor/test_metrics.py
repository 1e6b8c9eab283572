"""The table of metrics, the collector in a registry of its own, and the endpoint over real HTTP."""

from __future__ import annotations

import dataclasses
import math
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rksp_core.drift import measure
from rksp_core.errors import ConfigError
from rksp_core.profile import ModelProfile, WeightNorms
from rksp_monitor.endpoint import parse_address, serve
from rksp_monitor.metrics import METRICS, Board, registry_of
from tests.core.profiles import profile

# The names that dashboards and alerts rely on, as the project's contract lists them.
CONTRACT = (
    "rksp_build_info",
    "rksp_run_info",
    "rksp_near_unit_mass_ratio",
    "rksp_near_unit_mass_min_ratio",
    "rksp_sigma_max",
    "rksp_henrici_departure_ratio",
    "rksp_expansive_mass_ratio",
    "rksp_spectral_radius_max",
    "rksp_kreiss_constant_max",
    "rksp_kreiss_constant_mean",
    "rksp_nonlinearity_ratio",
    "rksp_reliable_modes_ratio",
    "rksp_near_unit_mass_drift",
    "rksp_kreiss_constant_drift",
    "rksp_drift_sigmas",
    "rksp_divergence_probability_ratio",
    "rksp_risk_level",
    "rksp_kss_desired_weight",
    "rksp_kss_applied_weight",
    "rksp_control_desired_generation",
    "rksp_control_applied_generation",
    "rksp_checkpoint_last_processed_step",
    "rksp_checkpoint_last_processed_timestamp_seconds",
    "rksp_checkpoint_last_seen_timestamp_seconds",
    "rksp_checkpoint_backlog",
    "rksp_checkpoints_processed_total",
    "rksp_checkpoints_failed_total",
    "rksp_checkpoints_skipped_total",
    "rksp_checkpoints_expired_total",
    "rksp_replay_duration_seconds",
    "rksp_replay_worker_restarts_total",
    "rksp_layer_near_unit_mass_ratio",
    "rksp_layer_spectral_radius",
    "rksp_layer_kreiss_constant",
)

# What the watcher exports beside the contract.
BESIDE = (
    "rksp_weight_norm_max",
    "rksp_weight_norm_head",
    "rksp_wasserstein_drift",
    "rksp_learning_rate_desired_ratio",
    "rksp_learning_rate_applied_ratio",
    "rksp_surprise_desired_limit",
    "rksp_surprise_applied_limit",
    "rksp_control_acknowledgement_overdue",
    "rksp_control_rollbacks_total",
    "rksp_control_held",
    "rksp_run_suspended",
    "rksp_run_last_scan_timestamp_seconds",
    "rksp_notifications_sent_total",
    "rksp_notifications_failed_total",
    "rksp_notifications_dropped_total",
)


def board(*, per_layer: bool = False) -> Board:
    made = Board({"version": "1"}, per_layer=per_layer)
    made.add_run("r", {"model": "m"})
    return made


def samples(of: Board) -> dict[str, float]:
    """Return {series: value} of the exposition, the parser's view of it."""
    text = generate_latest(registry_of(of)).decode()
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_table_is_the_contract():
    names = [metric.name for metric in METRICS]
    assert [name for name in names if name in CONTRACT] == list(CONTRACT)
    assert set(names) - set(CONTRACT) == set(BESIDE)


def test_every_gauge_of_a_run_carries_run_and_layers_are_apart():
    for metric in METRICS:
        if metric.name == "rksp_build_info":
            assert metric.labels == ()
        elif metric.name.startswith("rksp_layer_"):
            assert metric.labels == ("run", "layer")
        else:
            assert metric.labels == ("run",)


def test_counters_start_at_zero_and_unknown_gauges_have_no_series():
    found = samples(board())
    assert found["rksp_checkpoints_processed_total{run=r}"] == 0.0
    assert found["rksp_checkpoints_failed_total{run=r}"] == 0.0
    assert found["rksp_replay_duration_seconds_count{run=r}"] == 0.0
    assert not [name for name in found if "near_unit" in name or "probability" in name]


def test_a_judged_event_sets_its_gauges():
    shown = board()
    state, _ = measure(None, profile(near_unit_mass=0.9), 10)
    after = profile(near_unit_mass=0.7, kreiss_constant=3.0)
    _, drift = measure(state, after, 20)
    shown.show("r", after, drift)
    found = samples(shown)
    assert found["rksp_near_unit_mass_ratio{run=r}"] == pytest.approx(0.7)
    assert found["rksp_near_unit_mass_drift{run=r}"] == pytest.approx(-0.2)
    assert found["rksp_kreiss_constant_drift{run=r}"] == pytest.approx(0.6931, abs=1e-4)
    assert not [name for name in found if name.startswith("rksp_layer_")]


def test_a_gauge_that_is_no_longer_known_ends():
    shown = board()
    state, drift = measure(None, profile(), 10)
    shown.show("r", profile(), drift)
    blank = profile(near_unit_mass=None, status=("not_finite",))
    _, drift = measure(state, blank, 20)
    shown.show("r", blank, drift)
    assert "rksp_near_unit_mass_ratio{run=r}" not in samples(shown)


def test_spectral_norms_of_the_weights_are_shown_where_a_profile_holds_them():
    """One of an older version, or of a trainer that leaves them out, has no sample: 0 would be a norm."""
    shown = board()
    names = ["rksp_weight_norm_max{run=r}", "rksp_weight_norm_head{run=r}"]
    for weights, expected in (
        (WeightNorms(3.5, 1.25), [3.5, 1.25]),
        (WeightNorms(3.5, None), [3.5, None]),
        (WeightNorms(math.inf, 0.0), [None, 0.0]),  # a matrix that is not finite; one of zeros
        (WeightNorms(), [None, None]),
    ):
        judged = dataclasses.replace(profile(), weights=weights)
        shown.show("r", judged, measure(None, judged, 10)[1])
        assert [samples(shown).get(name) for name in names] == expected
    old = ModelProfile.from_dict({k: v for k, v in profile().to_dict().items() if k != "weight_norms"})
    shown.show("r", old, measure(None, old, 10)[1])
    assert not [name for name in samples(shown) if "weight_norm" in name]


def test_layers_are_opt_in():
    shown = board(per_layer=True)
    shown.show("r", profile(layers=2), measure(None, profile(layers=2), 1)[1])
    found = samples(shown)
    assert found["rksp_layer_kreiss_constant{layer=h.1}{run=r}"] == 1.5


def test_a_client_may_ask_for_some_by_name():
    board = Board({"version": "1"})
    board.add_run("a", {})
    asked = ["rksp_build_info", "rksp_checkpoints_failed_total"]
    (build, failed) = registry_of(board).restricted_registry(asked).collect()
    assert [sample.name for sample in (*build.samples, *failed.samples)] == asked


def test_the_series_of_a_removed_run_end():
    shown = board()
    shown.remove_run("r")
    assert list(samples(shown)) == ["rksp_build_info{version=1}"]


def test_the_histogram_is_cumulative():
    shown = board()
    for seconds in (0.05, 0.3, 4000.0):
        shown.observe_replay("r", seconds)
    found = samples(shown)
    assert found["rksp_replay_duration_seconds_bucket{le=0.1}{run=r}"] == 1
    assert found["rksp_replay_duration_seconds_bucket{le=0.5}{run=r}"] == 2
    assert found["rksp_replay_duration_seconds_bucket{le=600.0}{run=r}"] == 2
    assert found["rksp_replay_duration_seconds_bucket{le=+Inf}{run=r}"] == 3
    assert found["rksp_replay_duration_seconds_sum{run=r}"] == pytest.approx(4000.35)


@pytest.mark.real
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)")
def test_promtool_finds_nothing_to_say():
    shown = board(per_layer=True)
    shown.show("r", profile(), measure(None, profile(), 1)[1])
    for metric in METRICS:
        if metric.kind == "gauge" and metric.layer is None:
            shown.set("r", metric.name, 1.0)
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry_of(shown)), capture_output=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def test_the_endpoint_serves_metrics_and_the_two_probes():
    healthy = [True]
    registry = registry_of(board())
    with serve("127.0.0.1:0", registry, healthy=lambda: healthy[0], ready=lambda: True) as address:
        status, kind, text = get(f"http://{address}/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=")
        assert 'rksp_run_info{model="m",run="r"} 1.0' in text
        assert get(f"http://{address}/healthz")[0] == 200
        healthy[0] = False
        assert get(f"http://{address}/healthz")[0] == 503
        assert get(f"http://{address}/readyz")[0] == 200
        assert get(f"http://{address}/other")[0] == 404


def test_an_ipv6_address_is_served():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serve("[::1]:0", registry_of(board()), healthy=lambda: True, ready=lambda: True) as address:
        assert get(f"http://{address}/healthz")[0] == 200


def test_a_taken_address_is_one_sentence():
    registry = registry_of(board())
    with (
        serve("127.0.0.1:0", registry, healthy=bool, ready=bool) as address,
        pytest.raises(ConfigError, match="cannot listen on"),
        serve(address, registry, healthy=bool, ready=bool),
    ):
        pass


@pytest.mark.parametrize("address", ["9109", ":9109", "localhost:", "localhost:x", "localhost:²", "localhost:70000"])
def test_a_malformed_address_is_refused(address: str):
    with pytest.raises(ConfigError, match="an address is host:port"):
        parse_address(address)


def test_an_ipv6_address_is_understood():
    assert parse_address("[::1]:9109") == ("::1", 9109)


def test_metrics_have_one_home():
    """Names of metrics elsewhere in the package come from the table."""
    import re

    names = {*CONTRACT, *BESIDE}
    package = Path(__file__).parents[2] / "rksp_monitor"
    for path in package.rglob("*.py"):
        for name in re.findall(r'"(rksp_[a-z_]+)"', path.read_text(encoding="utf-8")):
            if name.endswith(("_total", "_ratio", "_seconds", "_step", "_generation", "_weight", "_level")):
                assert name in names, f"{name} in {path.name}"
