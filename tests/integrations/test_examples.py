"""Each example as a real process, beside a real ``rksp watch`` whose only rule fires from step 20 on."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.monitor.test_watch_e2e import Watcher, until

ROOT = Path(__file__).parents[2]
LONG = 120.0  # seconds; ends only a test that would fail anyway
POLICY = """
policy:
  ladder: {2: {alpha: 0.15}}
  rules:
    - name: always
      level: 2
      arm_after_step: 20  # the first log comes before
      all:
        - {metric: loss, against: absolute, direction: rises, by: 0.0}
"""


def printed(run: Path) -> list[dict[str, float]]:
    """The records that the example printed, one dict a line."""
    lines = (run.parent / "out").read_text().splitlines()
    found = [ast.literal_eval(line) for line in lines if re.match(r"\{.*kss_weight.*\}$", line)]
    return [{name: float(value) for name, value in record.items()} for record in found]


def csv_log(run: Path) -> list[dict[str, float]]:
    with (run / "log" / "version_0" / "metrics.csv").open() as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


ALONE = [sys.executable]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(launcher: list[str], script: str, run: Path) -> subprocess.Popen[bytes]:
        command = [*launcher, str(ROOT / "examples" / script), str(run), "--steps", "1000000", "--profile-every", "5"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (tmp_path / "out").open("wb") as out:
            started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "script", "log"),
    [
        (ALONE, "hf_trainer.py", printed),
        (ALONE, "lightning_module.py", csv_log),
        (TOGETHER, "accelerate_loop.py", printed),
    ],
)
def test_a_watcher_switches_kss_on(
    tmp_path: Path,
    example: Callable[..., subprocess.Popen[bytes]],
    launcher: list[str],
    script: str,
    log: Callable[[Path], list[dict[str, float]]],
) -> None:
    run, settings = tmp_path / "run", tmp_path / "watch.yaml"
    run.mkdir()
    settings.write_text(POLICY)
    watcher = Watcher(run, "--enforce", "--config", str(settings))
    try:
        process = example(launcher, script, run)

        def on() -> bool:
            assert process.poll() is None, (tmp_path / "out").read_text()
            return any(record["kss_weight"] == pytest.approx(0.15) for record in log(run))

        until(on, LONG)
        assert log(run)[0]["kss_weight"] == 0.0
        until(lambda: any(record["kss_term"] > 0 for record in log(run)), LONG)
        answer = json.loads((run / "control" / "applied.json").read_text())
        assert answer["status"] == "applied"
        assert answer["active"]["kss"]["alpha"] == 0.15
        assert answer["step"] > 0
        until(lambda: watcher.metric("rksp_kss_applied_weight") == 0.15, LONG)
    finally:
        assert watcher.end() == 0
