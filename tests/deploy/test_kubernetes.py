"""The Kubernetes manifests, as far as they can be checked without a cluster: real kustomize, the schemas of 1.30."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rksp_monitor.config import read_settings
from tests.deploy.processes import ROOT, need, run

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = ["base", "enforce"]


def _built(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what kustomize makes of a folder, by kind."""
    need("kubectl")
    documents = list(yaml.safe_load_all(run(["kubectl", "kustomize", str(folder)])))
    return {document["kind"]: document for document in documents}


def _pod(built: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pod's specification and its only container's."""
    pod = built["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_accepts_every_object(name: str, tmp_path: Path):
    need("kubectl", "kubernetes-validate")
    target = tmp_path / "all.yaml"
    target.write_text(run(["kubectl", "kustomize", str(FOLDER / name)]), encoding="utf-8")
    shown = run(["kubernetes-validate", "-k", "1.30", "--strict", str(target)])
    assert shown.count(" passed ") == 4


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pod_may_do_nothing_but_read_the_runs_and_write_its_ledgers(name: str):
    built = _built(FOLDER / name)
    pod, container = _pod(built)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["readOnly"]
    writable = {name for name, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {"state", "scratch"} | ({"control"} if name == "enforce" else set())


def test_there_is_one_watcher_at_a_time():
    deployment = _built(FOLDER / "base")["Deployment"]["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}


def test_no_variable_of_a_service_is_taken_for_a_setting():
    pod, _ = _pod(_built(FOLDER / "base"))
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_settings_fit_the_pod(name: str, tmp_path: Path):
    built = _built(FOLDER / name)
    pod, container = _pod(built)
    path = tmp_path / "watch.yaml"
    path.write_text(built["ConfigMap"]["data"]["watch.yaml"], encoding="utf-8")
    settings = read_settings(path)
    places = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(settings.state_dir) in places
    assert all(str(Path(entry.folder).parent) in places for entry in settings.runs)
    assert any(entry.enforce for entry in settings.runs) == (name == "enforce")
    assert all(str(entry.control.folder.parent) in places for entry in settings.runs if entry.control.folder)
    assert settings.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert container["args"] == ["watch", "--config", "/etc/rksp/watch.yaml"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "settings"]
    assert volume["configMap"]["name"] == built["ConfigMap"]["metadata"]["name"]


def test_the_user_is_the_one_of_the_image():
    pod, _ = _pod(_built(FOLDER / "base"))
    dockerfile = (ROOT / "deploy/container/Dockerfile").read_text(encoding="utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}\n" in dockerfile


def test_probes_ask_the_port_that_is_scraped():
    built = _built(FOLDER / "base")
    _, container = _pod(built)
    (port,), (service,) = container["ports"], built["Service"]["spec"]["ports"]
    assert (port["name"], port["containerPort"]) == (service["targetPort"], service["port"])
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz"), ("startupProbe", "/healthz")):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = scrape["scrape_configs"]
    name = built["Service"]["metadata"]["name"]
    assert job["static_configs"] == [{"targets": [f"{name}:{service['port']}"]}]


def test_the_operators_monitor_finds_the_service_and_gives_the_job_its_name(tmp_path: Path):
    (tmp_path / "kubernetes").symlink_to(FOLDER)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    overlay.joinpath("kustomization.yaml").write_text(
        "resources: [../kubernetes/base]\ncomponents: [../kubernetes/prometheus-operator]\n", encoding="utf-8"
    )
    built = _built(overlay)
    monitor, service = built["ServiceMonitor"]["spec"], built["Service"]
    labels = service["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "rksp"
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
