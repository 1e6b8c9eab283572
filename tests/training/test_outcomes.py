"""What a sweep's records say to `rksp calibrate`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rksp_core.outcomes import read_outcomes
from training.experiments import outcomes
from training.experiments.record import SCHEMA

RECORD = {
    "schema": SCHEMA,
    "key": "tuning-abc-1",
    "part": "tuning",
    "configuration": {
        "optimizer.learning_rate": 0.01,
        "optimizer.name": "adamw",
        "model.arguments.depth": 4,
        "model.arguments.width": 64,
        "model.arguments.norm": "no_norm",
        "stabilizers.clip": 1.0,
    },
    "look_ahead": [
        {
            "steps": 5,
            "finite": True,
            "losses": [5.5, 5.4, 5.0, 4.9, 4.8],
            "gradient_norms": [1.0, 1.1, 1.2, 1.0, 0.9],
            "hidden_rms_before": 1.0,
            "hidden_rms_after": 2.0,
        }
    ],
    "labels": {"paper": 40, "rksp": 45},
    "learned": False,
    "horizon": 800,
}


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl.gz"
    other = RECORD | {"key": "untouched-abc-1", "part": "untouched", "labels": {"paper": 40, "rksp": None}}
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in (RECORD, other))
    return path


def test_records_become_outcomes(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcomes.main([str(records), "--look-ahead", "5"]) == 0
    (tmp_path / "outcomes.jsonl").write_text(capsys.readouterr().out)
    first, second = read_outcomes([tmp_path / "outcomes.jsonl"])
    assert (first.name, first.diverged, first.horizon) == ("tuning-abc-1", True, 800)
    assert (second.name, second.diverged) == ("untouched-abc-1", False)  # the label is rksp's
    features = first.launch.features()
    assert features["hidden_rise"] == pytest.approx(0.6931, abs=1e-4)
    assert (features["without_norm"], features["unclipped"]) == (1.0, 0.0)


def test_a_run_that_did_not_learn_failed(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcomes.main([str(records), "--look-ahead", "5", "--label", "failed"]) == 0
    assert [json.loads(line)["diverged"] for line in capsys.readouterr().out.splitlines()] == [True, True]


def test_a_part_is_chosen(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcomes.main([str(records), "--look-ahead", "5", "--part", "tuning"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_another_look_ahead_is_one_sentence(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcomes.main([str(records)]) == 2
    assert "tuning-abc-1 has no look-ahead of 20 steps; it has 5\n" in capsys.readouterr().err
