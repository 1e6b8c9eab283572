"""The systemd units: real systemd accepts them, and leaves the services few rights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rksp_monitor.config import read_settings
from tests.deploy.processes import ROOT, need, run

FOLDER = ROOT / "deploy/systemd"
UNITS = [FOLDER / "rksp-watch.service", FOLDER / "rksp-watch@.service"]
EXPOSURE = 15  # tenths; the units scored 11 and 12 when they were written, 100 is no protection at all
ONE_RUN = {"Description", "Environment", "ExecStart", "StateDirectory", "WorkingDirectory", "ReadWritePaths"}


def _settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path):
    need("systemd-analyze")
    run(["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", str(unit)])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_service_has_few_rights(unit: Path):
    need("systemd-analyze")
    run(["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(unit)])


def test_a_service_writes_only_its_ledger_and_the_control_folder():
    many, one = map(_settings, UNITS)
    assert "ReadWritePaths" not in many
    assert one["ReadWritePaths"] == ["-/srv/runs/%i/control"]
    for unit in (many, one):
        assert unit["Type"] == ["notify"]
        assert unit["ProtectSystem"] == ["strict"]
        assert int(unit["WatchdogSec"][0]) > 0


def test_the_units_protect_alike():
    many, one = map(_settings, UNITS)
    differ = {name for name in many.keys() | one.keys() if many.get(name) != one.get(name)}
    assert differ - ONE_RUN == {"After", "ExecReload", "LimitNOFILE", "TasksMax"}


def test_the_settings_that_come_with_the_unit_are_valid_and_find_its_ledgers():
    unit, settings = _settings(UNITS[0]), read_settings(FOLDER / "watch.yaml")
    assert unit["ExecStart"] == ["/usr/bin/env rksp watch --config /etc/rksp/watch.yaml"]
    assert settings.state_dir == Path("/var/lib", unit["StateDirectory"][0])
    assert "RKSP_STATE_DIR=%S/rksp" in unit["Environment"]
    assert not any(entry.enforce for entry in settings.runs)
