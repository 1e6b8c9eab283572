"""The batch script on a real Slurm of one node: what each exit code of the preflight does to the job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        assert ("trains with -m training model.yaml" in output) == trains, (code, choices, output)
        assert f"preflight model.yaml --lr 0.01 --fail-on use_kss --format json --output-file preflight-{job}" in output


def _write(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/bash\n{command}\n", encoding="utf-8")
    path.chmod(0o755)
