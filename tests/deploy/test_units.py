"""The systemd unit: real systemd accepts it, and leaves the service few rights."""

from __future__ import annotations

from tests.deploy.processes import ROOT, need, run

UNIT = ROOT / "deploy/systemd/rksp-watch@.service"
EXPOSURE = 15  # tenths; the unit scored 11 when it was written, 100 is no protection at all


def test_systemd_accepts_the_unit():
    need("systemd-analyze")
    run(["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", str(UNIT)])


def test_the_service_has_few_rights():
    need("systemd-analyze")
    run(["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(UNIT)])


def test_the_service_writes_only_its_ledger_and_the_control_folder():
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert settings["Type"] == "notify"
    assert settings["ProtectSystem"] == "strict"
    assert settings["ReadWritePaths"].endswith("/control")
    assert int(settings["WatchdogSec"]) > 0
