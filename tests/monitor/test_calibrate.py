"""From runs whose outcome is known to a probability in a preflight report, by the command line."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from rksp_core.launch import Launch
from rksp_core.outcomes import Outcome
from rksp_core.risk_model import RiskModel
from rksp_monitor.cli import run

TINY = "tests.monitor.tiny_model:build"  # width 16, three blocks
SMALL = ["--samples", "128", "--device", "cpu", "--format", "json"]


def planted(width: int = 16) -> list[Outcome]:
    """Runs of a model like `TINY` that diverge around the rate 0.1."""
    random = np.random.default_rng(0)
    runs = []
    for number in range(120):
        rate = math.exp(random.uniform(math.log(1e-3), math.log(10.0)))
        rise, growth = 0.5 * math.log(rate / 0.01) + random.normal(0, 0.7), random.normal(1.0, 1.0)
        figures = (3.5, 3.5 * math.exp(rise)), (1.0, math.exp(rise)), (1.0, math.exp(growth))
        launch = Launch(
            rate,
            "adamw",
            int(random.choice([2, 3, 4])),
            width,
            *figures,
            finite=True,
            steps=4,
            normalized=True,
            clipped=False,
        )
        diverged = bool(random.random() < 1 / (1 + (0.1 / rate) ** 2))
        runs.append(Outcome(f"run {number}", launch, diverged, 1000))
    return runs


@pytest.fixture(scope="module")
def risk_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("risk")
    lines = [json.dumps(each.to_dict()) + "\n" for each in planted()]
    for part, name in enumerate(("first.jsonl", "second.jsonl")):
        (folder / name).write_text("".join(lines[part::2]))
    path = folder / "risk.json"
    assert run(["calibrate", str(folder / "first.jsonl"), str(folder / "second.jsonl"), "-o", str(path)]) == 0
    return path


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = run(["preflight", TINY, *SMALL, *map(str, arguments)])
    document = json.loads(capsys.readouterr().out)
    schema = json.loads((files("rksp_monitor") / "schemas" / "preflight.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    return code, document


def test_calibrate_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "outcomes.jsonl"
    path.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in planted()))
    assert run(["calibrate", str(path), "--output", str(tmp_path / "risk.json")]) == 0
    said = capsys.readouterr().out
    assert "120 runs, " in said
    assert "divergence within 1000 steps in " in said
    assert "by the learning rate alone; sha256 " in said


@pytest.mark.parametrize(("rate", "verdict", "code"), [(0.002, "proceed", 0), (5.0, "use_kss", 1)])
def test_the_probability_decides(
    risk_model: Path, capsys: pytest.CaptureFixture[str], rate: float, verdict: str, code: int
):
    got, document = report(capsys, "--lr", rate, "--risk-model", risk_model)
    risk = document["risk"]
    assert (document["decision"]["verdict"], got) == (verdict, code)
    low, high = risk["interval"]
    assert low <= risk["divergence_probability"] <= high
    assert risk["reason"] is None
    assert risk["model"]["sha256"] == json.loads(risk_model.read_text())["sha256"]
    assert risk["launch"]["steps"] == len(risk["launch"]["losses"]) == 4  # the model's own look-ahead
    assert document["decision"]["reasons"][0].startswith("the probability of divergence is ")
    assert document["decision"]["reasons"][1].startswith("the paper's rule alone would say ")
    assert Launch.from_dict(risk["launch"]).learning_rate == rate


def test_a_rate_is_suggested(risk_model: Path, capsys: pytest.CaptureFixture[str]):
    _, document = report(capsys, "--lr", 0.1, "--risk-model", risk_model, "--suggest-lr", 0.2)
    found = document["risk"]["suggested_learning_rate"]
    assert found["threshold"] == 0.2
    assert 0.003 < found["rate"] < 1.0
    assert (
        f"the learning rate at which the risk of divergence reaches 20% is {found['rate']:.3g} ("
        in document["decision"]["reasons"][-1]
    )
    _, document = report(capsys, "--lr", found["rate"], "--risk-model", risk_model)
    assert document["risk"]["divergence_probability"] == pytest.approx(
        0.2, abs=0.05
    )  # between two rates that were tried


def test_a_model_unlike_the_runs_is_inconclusive(risk_model: Path, capsys: pytest.CaptureFixture[str]):
    wide = ["--arg", "width=64", "--lr", 0.01, "--risk-model", risk_model, "--suggest-lr", 0.1]
    code, document = report(capsys, *wide)
    assert (document["decision"]["verdict"], code) == ("inconclusive", 3)
    assert document["risk"]["divergence_probability"] is None
    assert document["risk"]["suggested_learning_rate"] is None
    assert "the width is 64, the runs have 16 to 16" in document["risk"]["reason"]


def test_without_a_risk_model_there_is_no_probability(capsys: pytest.CaptureFixture[str]):
    _, document = report(capsys, "--lr", 0.01, "--risk-model", "none")
    assert document["risk"]["divergence_probability"] is None
    assert document["risk"]["outcomes"] == []
    assert "no risk model was asked" in document["risk"]["reason"]
    assert document["risk"]["launch"]["width"] == 16


GPT = [
    "training.models.gpt:GPT",
    "--arg",
    "vocabulary=256",
    "--arg",
    "length=64",
    "--arg",
    "depth=2",
    "--samples",
    "512",
]


@pytest.mark.parametrize(("rate", "verdict", "code"), [(0.001, "proceed", 0), (1.0, "use_kss", 1)])
def test_the_bundled_models_answer_for_models_like_theirs(
    capsys: pytest.CaptureFixture[str], rate: float, verdict: str, code: int
):
    arguments = [*GPT, "--arg", "width=32", "--arg", "heads=4", "--arg", "norm=no_norm", "--lr", str(rate)]
    assert run(["preflight", *arguments, "--device", "cpu", "--format", "json"]) == code
    document = json.loads(capsys.readouterr().out)
    risk = document["risk"]
    assert document["decision"]["verdict"] == verdict
    assert [each["outcome"] for each in risk["outcomes"]] == ["divergence", "divergence or no learning"]
    divergence, failure = (each["probability"] for each in risk["outcomes"])
    assert risk["divergence_probability"] == divergence
    assert (divergence > 0.9) if code else (failure < 0.1)
    assert risk["model"]["sha256"] == RiskModel.bundled()[0].sha256
    assert risk["launch"]["steps"] == 20


def test_the_bundled_models_say_whom_they_do_not_know_and_cost_no_long_look_ahead(capsys: pytest.CaptureFixture[str]):
    code, document = report(capsys, "--lr", 0.01, "--beta2", 0.95, "--arg", "width=4")
    risk = document["risk"]
    assert (document["decision"]["verdict"], code) == ("inconclusive", 3)
    assert [each["probability"] for each in risk["outcomes"]] == [None, None]
    assert "the width is 4, the runs have 32 to 96" in risk["reason"]
    assert "the nearest, tuning-" in risk["reason"]
    assert risk["launch"]["steps"] == 5
    assert risk["baselines"]["beta2"] == 0.95


def test_another_look_ahead_leaves_the_bundled_models_out(capsys: pytest.CaptureFixture[str]):
    _, document = report(capsys, "--lr", 0.01, "--look-ahead-steps", 2)
    assert document["risk"]["outcomes"] == []
    assert document["decision"]["verdict"] != "inconclusive"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--risk-model", "MODEL"], "--risk-model is of no use without --lr"),
        (["--lr", "0.1", "--suggest-lr", "0.1", "--risk-model", "none"], "--suggest-lr needs a risk model"),
        (["--suggest-lr", "0.1"], "--suggest-lr is of no use without --lr"),
        (["--lr", "0.1", "--optimizer", "sgd", "--beta2", "0.9"], "beta2 belongs to adamw, adam or lion"),
        (["--lr", "0.1", "--risk-model", "MODEL", "--suggest-lr", "1.5"], "a probability above 0 and below 1, got 1.5"),
        (["--lr", "0.1", "--risk-model", "MODEL", "--look-ahead-steps", "9"], "look-aheads of 4 steps, got"),
        (["--lr", "0.1", "--risk-model", "nowhere.json"], "cannot read the risk model nowhere.json"),
    ],
)
def test_a_mistake_is_one_sentence(
    risk_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    given = [str(risk_model) if argument == "MODEL" else argument for argument in arguments]
    assert run(["preflight", TINY, *SMALL, *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_calibrate_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "outcomes.jsonl"
    path.write_text(json.dumps(planted()[0].to_dict()) + "\n")
    assert run(["calibrate", str(path), "-o", str(tmp_path / "risk.json")]) == 2
    assert "1 runs, " in capsys.readouterr().err
    assert run(["calibrate", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "risk.json")]) == 2
    assert "cannot read the outcomes" in capsys.readouterr().err
    assert not (tmp_path / "risk.json").exists()
