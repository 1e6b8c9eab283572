"""The command as real processes: exit codes, SIGTERM, and two processes that obey one order at one step."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def written(configure, tmp_path):
    """Return a function: sections -> (configuration, path of its YAML)."""

    def write(**sections):
        config = configure(**sections)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return config, path

    return write


def training(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "training", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def metrics(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint_to_resume_from(written, number):
    config, path = written(steps=1_000_000, checkpoint={"every": 1_000_000})
    process = training(path)
    log = Path(config.output) / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "stopped at step" in out
    result = json.loads((Path(config.output) / "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["step"] == metrics(config)[-1]["step"]
    assert (Path(config.output) / "checkpoints" / f"step-{result['step']:08d}").is_dir()
    process = training(path, "--resume", "--until", result["step"] + 2)
    process.communicate(timeout=60)
    assert [record["step"] for record in metrics(config)] == list(range(1, result["step"] + 3))


def test_a_run_that_diverges_exits_4_without_a_traceback(written):
    _, path = written(optimizer={"learning_rate": 5.0}, arguments={"norm": "no_norm"}, steps=100)
    process = training(path)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (4, "")
    assert "diverged at step" in out
