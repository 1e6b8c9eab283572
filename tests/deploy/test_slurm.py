"""The batch script on a real Slurm of one node: what each exit code of the preflight does to the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.cluster import result, slurm, submit
from tests.deploy.processes import PATH, ROOT, need, run

SCRIPT = ROOT / "deploy/slurm/train.sbatch"

# code of the preflight, choices of the user -> whether it trains, and the exit code of the job
CASES = [
    (0, {}, True, 0),
    (1, {}, False, 1),
    (1, {"GATE_ON_ERROR": "train", "GATE_ON_INCONCLUSIVE": "train"}, False, 1),
    (2, {}, False, 2),
    (2, {"GATE_ON_ERROR": "train"}, True, 0),
    (3, {}, True, 0),
    (3, {"GATE_ON_INCONCLUSIVE": "stop"}, False, 3),
    (137, {}, False, 2),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    need("munged", "slurmctld", "slurmd", "sbatch")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs jobs for other users, so it needs root")
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def test_the_script_is_clean():
    need("shellcheck")
    run(["shellcheck", str(SCRIPT)])
    run(["bash", "-n", str(SCRIPT)])


def test_the_exit_code_of_the_preflight_decides_the_job(cluster: dict[str, str], tmp_path: Path):
    # A stand-in for `rksp` and `python` that returns a code; all jobs wait in the queue together.
    _write(tmp_path / "rksp", 'echo "preflight $*"; exit "$PREFLIGHT_CODE"')
    _write(tmp_path / "python", 'echo "trains with $*"')
    jobs = []
    for code, choices, _, _ in CASES:
        environment = cluster | choices | {"PATH": f"{tmp_path}:{PATH}", "PREFLIGHT_CODE": str(code)}
        arguments = ["--cpus-per-task=1", str(SCRIPT), "model.yaml", "--lr", "0.01"]
        jobs.append(submit(arguments, environment, tmp_path))
    for job, (code, choices, trains, expected) in zip(jobs, CASES, strict=True):
        ended, output = result(job, cluster, tmp_path)
        assert ended == expected, (code, choices, output)
        assert ("trains with -m training model.yaml --resume" in output) == trains, (code, choices, output)
        assert f"preflight model.yaml --lr 0.01 --fail-on use_kss --format json --output-file preflight-{job}" in output


@pytest.mark.slow
def test_a_real_preflight_lets_a_stable_model_train_and_stops_a_hot_one(cluster: dict[str, str], tmp_path: Path):
    _write(tmp_path / "rksp", f'exec {sys.executable} -m rksp_monitor "$@"')
    environment = cluster | {"PATH": f"{tmp_path}:{PATH}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = {}
    for name, rate in (("recall_small", "0.001"), ("recall_no_norm_hot", "0.01")):
        config = yaml.safe_load((ROOT / f"training/configs/{name}.yaml").read_text(encoding="utf-8"))
        config |= {"steps": 1, "output": str(tmp_path / "runs" / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        arguments = [str(SCRIPT), f"{name}.yaml", "--lr", rate, "--samples", "512", "--look-ahead-steps", "2"]
        jobs[name] = submit(["--cpus-per-task=1", *arguments], environment, tmp_path)
    ended, output = result(jobs["recall_small"], cluster, tmp_path)
    assert ended == 0, output
    assert (tmp_path / "runs/recall_small/result.json").exists()
    ended, output = result(jobs["recall_no_norm_hot"], cluster, tmp_path)
    assert ended == 1, output
    assert "risk at or above use_kss" in output
    assert not (tmp_path / "runs/recall_no_norm_hot").exists()


def _write(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/bash\n{command}\n", encoding="utf-8")
    path.chmod(0o755)
