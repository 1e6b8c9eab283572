"""The image and the compose file, as far as they can be checked without a container engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.deploy.processes import PATH, ROOT, need, run

DOCKERFILE = ROOT / "deploy/container/Dockerfile"
COMPOSE = ROOT / "deploy/compose/compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def test_hadolint_accepts_the_dockerfile():
    need("hadolint")
    run(["hadolint", str(DOCKERFILE)])


def test_the_image_runs_as_nobody_special_and_reports_its_health():
    text = DOCKERFILE.read_text(encoding="utf-8")
    last_stage = text[text.rindex("FROM ") :]
    assert "USER 10001" in last_stage
    assert "HEALTHCHECK" in last_stage
    assert "/healthz" in last_stage


def test_what_the_dockerfile_copies_exists_and_is_sent_to_the_builder():
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for line in DOCKERFILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


def test_docker_compose_accepts_the_file(tmp_path: Path):
    need("docker-compose")
    command = ["docker-compose", "-f", str(COMPOSE), "config"]
    shown = yaml.safe_load(run(command, os.environ | {"PATH": PATH, "RUN_FOLDER": str(tmp_path)}))
    mounts = shown["services"]["rksp"]["volumes"]
    assert f"{tmp_path}:/run-folder:ro" in mounts
    assert f"{tmp_path}/control:/run-folder/control:rw" in mounts


def test_every_path_that_is_mounted_from_the_repository_exists():
    for service in SERVICES.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith(".."):
                assert (COMPOSE.parent / source).exists()


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_reachable_from_this_machine_only_and_gain_no_rights(name: str):
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert ":" in service["image"]
    assert "@" in service["image"] or not service["image"].endswith(":latest") or "build" in service
