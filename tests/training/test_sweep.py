"""A sweep from its spec to its records: split, resumed, and without a trace on the runs."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rksp_core.errors import ConfigError
from training.experiments import sweep
from training.experiments.one_run import carry_out
from training.experiments.plan import plan, write_plan
from training.experiments.record import Records, read_records
from training.experiments.spec import PARTS, Spec, read_spec
from training.experiments.trace import Trace
from training.loop import drive
from training.ranks import Ranks
from training.run import build_run

SPECS = sorted(Path(sweep.__file__).parent.glob("specs/*.yaml"))


def document(**sections: Any) -> dict[str, Any]:
    base = {
        "steps": 10,
        "model": {
            "factory": "training.models.gpt:GPT",
            "arguments": {"vocabulary": 32, "length": 16, "width": 16, "depth": 2, "heads": 2, "norm": "pre_ln"},
        },
        "task": {"batch": 8, "pairs": 2},
        "schedule": {"warmup": 2},
    }
    groups = [
        {"name": "one", "sample": {"count": 3, "draw": {"optimizer.learning_rate": {"log_uniform": [0.001, 0.01]}}}}
    ]
    measure = {"profile": {"every": 5, "samples": 64, "sequences": 4}, "look_ahead": [2], "sharpness": {"every": 5}}
    return {"name": "tiny", "base": base, "groups": groups, "measure": measure} | sections


def spec(**sections: Any) -> Spec:
    return Spec.model_validate(document(**sections))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document()))
    return path


def run(file: Path, *more: str) -> int:
    return sweep.main([str(file), "--folder", str(file.parent / "sweep"), "--backend", "sequential", *more])


def bare_losses(one: Spec) -> list[float]:
    class Losses:
        def __init__(self) -> None:
            self.seen: list[float] = []

        def after(self, _: Any, record: Any) -> None:
            self.seen += [] if record is None else [record.loss]

        def end(self, _: Any) -> None: ...

    losses = Losses()
    drive(build_run(plan(one)[0].config(one), Ranks(0, 1, torch.device("cpu"))), [losses])
    return losses.seen


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_measuring_changes_no_bit_of_a_run(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.experiments.trace.compact", lambda value: value)
    one = spec(groups=[{"name": "one", "settings": {"optimizer.name": optimizer}}])
    assert carry_out(one, plan(one)[0], "cpu")["steps"]["loss"] == bare_losses(one)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_a_twin_on_the_cpu_is_measured_like_the_run(optimizer: str) -> None:
    """As for a run on a GPU."""
    one = spec(groups=[{"name": "one", "settings": {"optimizer.name": optimizer}}])
    alone = Ranks(0, 1, torch.device("cpu"))
    runs = [build_run(plan(one)[0].config(one), alone) for _ in range(2)]
    traces = [Trace(run, one.measure) for run in runs]
    traces[1].twin = build_run(runs[1].config, alone)
    for run, trace in zip(runs, traces, strict=True):
        drive(run, [trace])
    assert traces[0].document() == traces[1].document()


@pytest.mark.gpu
def test_a_run_on_a_gpu_has_the_record_of_one_on_the_cpu() -> None:
    one = spec()
    here, there = (carry_out(one, plan(one)[0], device) for device in ("cpu", "cuda"))
    assert there["environment"]["device"] == "cuda"
    # float32 sums run in another order on a GPU, and Adam divides small numbers.
    assert there["steps"]["loss"] == pytest.approx(here["steps"]["loss"], rel=1e-2)
    for name, values in here["profiles"]["features"].items():
        assert there["profiles"]["features"][name] == pytest.approx(values, rel=2e-2, abs=2e-2), name


def test_a_sweep_goes_on_where_it_was(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(file.parent / "sweep")
    assert run(file, "--time-limit", "0") == 0
    assert not records.keys()
    assert run(file, "--limit", "1") == 0
    (first,) = records
    assert run(file) == 0
    assert "1 of 3 runs have a record" in capsys.readouterr().out
    assert records.keys() == {each.key for each in plan(read_spec(file))}
    assert first in list(records)


def test_a_sweep_goes_on_from_packed_records(file: Path) -> None:
    folder = file.parent / "sweep"
    run(file, "--limit", "2")
    for path in (folder / "records").iterdir():
        path.unlink()
    assert len(Records(folder).keys()) == 2
    run(file)
    assert len(list((folder / "records").iterdir())) == 1
    assert len(list(read_records(folder / "records.jsonl.gz"))) == 3


def test_a_failed_run_is_named_and_ends_no_other(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = plan(read_spec(file))[0].key

    def sometimes(one: Spec, planned: Any, device: str) -> Any:
        if planned.key == bad:
            raise RuntimeError("out of memory")
        return carry_out(one, planned, device)

    monkeypatch.setattr("training.experiments.one_run.carry_out", sometimes)
    assert run(file) == sweep.FAILED
    assert f"{bad} (one) failed: RuntimeError: out of memory" in capsys.readouterr().err
    assert len(Records(file.parent / "sweep").keys()) == 2


def test_another_spec_is_refused_in_the_same_folder(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, "--limit", "1")
    file.write_text(yaml.safe_dump(document(seeds={"each": 2})))
    assert run(file) == 2
    assert "is the plan of another spec" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["lokee", "tcp://127.0.0.1:1"])
def test_a_backend_that_is_not_there_is_said(backend: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second, unless `distributed` is installed, for want of that."""
    assert run(file, "--backend", backend) == 2
    assert f"sweep: --backend {backend}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grups": []}, "did you mean 'groups'"),
        (
            {"groups": [{"name": "a", "settings": {"optimizer.learning_rte": 1}}]},
            "did you mean 'optimizer.learning_rate'",
        ),
        ({"groups": [{"name": "a"}, {"name": "b"}]}, "hold the same configuration"),
        ({"seeds": {"tuning": [1, 9], "held_out": [5, 20]}}, "share seed 5"),
        ({"split": {"tuning": 0.9}}, "must add up to 1"),
        ({"draw": {"task.batch": {"log_uniform": [8, 2]}}}, "must ascend"),
        ({"draw": {"task.batch": {"choices": [8], "log_uniform": [2, 8]}}}, "one of them"),
    ],
)
def test_a_mistake_is_one_sentence(
    change: dict[str, Any], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(yaml.safe_dump(document(**change)))
    assert run(file) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (file.parent / "sweep").exists()


def test_no_part_shares_a_configuration_or_a_seed_with_another() -> None:
    groups = [
        {
            "name": "all",
            "grid": {"model.arguments.norm": ["pre_ln", "no_norm"]},
            "sample": {"count": 40, "draw": {"optimizer.learning_rate": {"log_triangular": [0.001, 0.01, 1.0]}}},
        }
    ]
    runs = plan(spec(groups=groups, seeds={"each": 2}))
    parts = {str(run.settings): set() for run in runs}
    for each in runs:
        parts[str(each.settings)].add(each.part)
    assert all(len(part) == 1 for part in parts.values())
    seeds = [{run.seed for run in runs if run.part == part} for part in PARTS]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    counts = Counter((run.settings["model.arguments.norm"], run.part) for run in runs)
    assert counts == {
        (norm, part): 2 * n for norm in ("pre_ln", "no_norm") for part, n in zip(PARTS, (8, 8, 4), strict=True)
    }


def test_a_sample_spreads_every_key_evenly() -> None:
    draw = {"task.batch": [8, 16], "optimizer.learning_rate": {"log_uniform": [0.01, 1.0]}}
    runs = plan(spec(groups=[{"name": "a", "sample": {"count": 20, "draw": draw}}]))
    assert Counter(run.settings["task.batch"] for run in runs) == {8: 10, 16: 10}
    rates = sorted(run.settings["optimizer.learning_rate"] for run in runs)
    for place, rate in enumerate(rates):
        assert 0.01 * 100 ** (place / 20) * 0.999 <= rate <= 0.01 * 100 ** ((place + 1) / 20) * 1.001


def test_a_plan_is_written_once(tmp_path: Path) -> None:
    one = spec()
    write_plan(tmp_path / "plan.json", one, plan(one))
    write_plan(tmp_path / "plan.json", one, plan(one))
    assert [run["key"] for run in json.loads((tmp_path / "plan.json").read_text())["runs"]] == [
        r.key for r in plan(one)
    ]
    with pytest.raises(ConfigError, match="another spec"):
        write_plan(tmp_path / "plan.json", one, plan(one)[:1])


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_shipped_specs_can_be_planned(path: Path) -> None:
    runs = plan(read_spec(path))
    assert {run.part for run in runs} == set(PARTS)


def test_no_two_shipped_specs_share_a_seed() -> None:
    """So that a model fitted on one of them has seen no batch, and no initialization, of another."""
    ranges = sorted(read_spec(path).seeds.of(part) for path in SPECS for part in PARTS)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))


def test_the_records_that_are_kept_are_runs_of_their_plan() -> None:
    kept = Path(__file__).parents[2] / "benchmarks" / "data" / "risk"
    planned = {run.key: run for run in plan(read_spec(SPECS[0].parent / "risk.yaml"))}
    records = list(read_records(kept))
    assert len(records) > 250
    for record in records:
        assert record["part"] == planned[record["key"]].part
        settings = planned[record["key"]].settings
        assert record["configuration"]["optimizer.learning_rate"] == settings["optimizer.learning_rate"]
