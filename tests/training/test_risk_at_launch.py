"""The tables on made-up records whose outcome the learning rate and the look-ahead decide."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rksp_core import risk_fit
from training.experiments import ranking, risk_at_launch
from training.experiments.record import SCHEMA


def record(number: int, random: np.random.Generator) -> dict[str, Any]:
    rate, rise = math.exp(random.normal(-4, 1)), random.normal(0, 1)
    diverged = bool(random.random() < 1 / (1 + math.exp(-3 * (math.log(rate) + 4) - 3 * rise)))
    return {
        "schema": SCHEMA,
        "key": f"run-{number}",
        "part": ("tuning", "held_out")[number % 2],
        "configuration": {
            "optimizer.learning_rate": rate,
            "optimizer.name": "adamw",
            "model.arguments.depth": 4,
            "model.arguments.width": 64,
            "model.arguments.norm": ("pre_ln", "no_norm")[number % 3 % 2],
            "stabilizers.clip": (None, 1.0)[number % 5 % 2],
        },
        "initial": {"features": {"near_unit_mass_mean": random.random(), "spectral_radius_max": 1.0}},
        "look_ahead": [
            {
                "steps": 20,
                "finite": True,
                "losses": [3.0, 3.0 * math.exp(rise)],
                "gradient_norms": [1.0, 1.0],
                "hidden_rms_before": 1.0,
                "hidden_rms_after": 1.0,
            }
        ],
        "steps": {"loss": [3.0] * 20 + [None] * diverged, "gradient_norm": [1.0] * 20 + [None] * diverged},
        "labels": {"paper": None, "rksp": 21 if diverged else None},
        "learned": not diverged,
        "horizon": 100,
    }


def test_the_tables_say_what_helped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "RESAMPLES", 40)
    monkeypatch.setattr(risk_fit, "BOOTSTRAP", 20)
    random = np.random.default_rng(0)
    path = tmp_path / "records.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(record(number, random)) + "\n" for number in range(240))
    assert risk_at_launch.main([str(path), "--plot", str(tmp_path / "reliability.png")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "reliability.png").stat().st_size > 5000
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[4:23]]
    value = {row[0]: float(row[1].split()[0]) for row in rows if row[1] != "-"}
    lead = {
        row[0]: [float(end) for end in row[4].partition("[")[2].rstrip("]").split(",")]
        for row in rows[1:]
        if row[4] != "-"
    }
    assert value["risk model"] > value["without the look-ahead"] > 0.65
    assert value["risk model"] > value["without the learning rate"] > 0.65
    assert value["without the optimizer"] == pytest.approx(value["risk model"], abs=0.01)  # all have the same one
    assert value["without the look-ahead"] == pytest.approx(value["log learning rate"], abs=0.02)
    assert abs(value["near-unit mass"] - 0.5) < 0.15
    assert value["with the spectra at the start"] == pytest.approx(value["risk model"], abs=0.03)  # they say nothing
    assert abs(value["the spectra at the start alone"] - 0.5) < 0.15
    assert "eigenvector condition" not in value  # nobody made up for it
    assert lead["near-unit mass"][0] > 0 > lead["with the spectra at the start"][0]
    assert "get no probability" in said
    assert "Calibration error: expected" in said


def test_a_part_without_runs_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write(json.dumps(record(0, np.random.default_rng(0))) + "\n")
    assert risk_at_launch.main([str(path)]) == 2
    assert "holds no runs of the part 'held_out'" in capsys.readouterr().err
