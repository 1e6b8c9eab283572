"""The condition that the records leave out, made up for from the plan alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rksp_core.errors import ConfigError
from training.experiments import eigenvector_condition, sweep
from training.experiments.plan import plan
from training.experiments.record import Records
from training.experiments.spec import read_spec

TINY = """
base:
  steps: 1
  model: {factory: "training.models.gpt:GPT", arguments: {vocabulary: 32, length: 16, width: 16, depth: 2, heads: 2}}
  task: {batch: 4, pairs: 2}
groups: [{name: one, grid: {optimizer.learning_rate: [0.001, 0.002]}}]
measure: {profile: {every: 1, samples: 64, sequences: 4}, look_ahead: []}
"""


def test_it_is_that_of_the_run_and_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "tiny.yaml", tmp_path / "sweep"
    path.write_text(TINY)
    assert sweep.main([str(path), "--folder", str(folder), "--backend", "sequential"]) == 0
    capsys.readouterr()
    assert eigenvector_condition.main([str(path), str(folder)]) == 0
    assert "2 runs, 2 of them new" in capsys.readouterr().out
    written = json.loads((folder / eigenvector_condition.FILE).read_text())
    assert all(value > 1 for value in written.values())
    assert eigenvector_condition.main([str(path), str(folder)]) == 0
    assert "2 runs, 0 of them new" in capsys.readouterr().out

    spec, record = read_spec(path), next(iter(Records(folder)))
    (planned,) = (run for run in plan(spec) if run.key == record["key"])
    assert eigenvector_condition.condition(spec, planned, record) == pytest.approx(written[record["key"]], rel=1e-3)
    record["initial"]["features"]["near_unit_mass_mean"] += 0.1
    with pytest.raises(ConfigError, match=r"near_unit_mass_mean is .* before the first step, its record says"):
        eigenvector_condition.condition(spec, planned, record)

    other = yaml.safe_load(TINY) | {"seeds": {"tuning": [1, 9]}}
    path.write_text(yaml.safe_dump(other))
    (folder / eigenvector_condition.FILE).unlink()
    assert eigenvector_condition.main([str(path), str(folder)]) == 2
    assert "is no run of" in capsys.readouterr().err
