"""A rescue from its spec to its table; in lockstep with a real watcher it comes out the same again."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rksp_core.errors import ConfigError
from rksp_monitor.config import read_settings
from training.experiments import rescue
from training.experiments.record import Records
from training.experiments.rescue_report import difference, p_value, share, table
from training.experiments.rescue_run import SCHEMA, overhead
from training.experiments.rescue_spec import plan, read_spec

SPECS = sorted((Path(rescue.__file__).parent / "specs" / "rescue").glob("*.yaml"))

# No-Norm at a rate at which it blows up in some steps: the loop takes it back and lowers the rate.
SMALL: dict[str, Any] = {
    "base": {
        "steps": 16,
        "model": {
            "factory": "training.models.gpt:GPT",
            "arguments": {"vocabulary": 32, "length": 16, "width": 16, "depth": 2, "heads": 2, "norm": "no_norm"},
        },
        "task": {"name": "associative_recall", "batch": 8, "pairs": 2},
        "optimizer": {"name": "sgd"},
        "schedule": {"warmup": 0},
        "checkpoint": {"every": 2},
        "profile": {"every": 4, "samples": 64, "sequences": 4},
        "control": {"wait_at_divergence": 60.0},
    },
    "grid": {"optimizer.learning_rate": [3.0, 4.0]},
    "seeds": [1, 2],
    "arms": [
        {"name": "nothing"},
        {"name": "stable", "settings": {"optimizer.learning_rate": 0.01}},
        {
            "name": "Back, slower",
            "policy": {
                "rules": [
                    {"name": name, "level": 3, "all": [{"metric": metric, "by": by, "against": "absolute"}]}
                    for name, metric, by in (("a", "not_finite_figures", 0.0), ("b", "loss", 50.0))
                ],
                "cooldown_steps": 2,
                "rollback_margin": 2,
                "ratchet": True,
                "ladder": {3: {"learning_rate_scale": 0.01, "rollback": True}},
            },
        },
    ],
    "reference": "stable",
    "controls": ["nothing"],
}


def written(tmp_path: Path, **sections: Any) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | sections))
    return path


def test_every_seed_is_run_by_each_arm_at_each_point_that_is_its_own(tmp_path: Path) -> None:
    runs = plan(read_spec(written(tmp_path)))
    assert [(run.arm.name, run.seed, list(run.point.values())) for run in runs[:5]] == [
        ("nothing", 1, [3.0]),
        ("nothing", 1, [4.0]),
        ("stable", 1, []),
        ("Back, slower", 1, [3.0]),
        ("Back, slower", 1, [4.0]),
    ]
    assert len(runs) == len({run.key for run in runs}) == 10
    rates = [run.config(read_spec(written(tmp_path))).optimizer.learning_rate for run in runs[:3]]
    assert rates == [3.0, 4.0, 0.01]
    assert runs[3].arm.slug == "back-slower"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"reference": "nobody"}, "'nobody' is no arm; the arms are nothing, stable, Back, slower"),
        ({"lag": 4}, "lag = 4 must be less than profile.every = 4, of arm 'Back, slower'"),
        ({"seeds": [3, 1]}, r"seeds must be \[first, last\], got \[3, 1\]"),
        ({"arms": [{"name": "a b"}, {"name": "a-b"}], "reference": "a b", "controls": []}, "two arms are called 'a b'"),
        ({"grid": {"optimizer.learning_rte": [1]}}, "arm 'nothing': unknown key 'optimizer.learning_rte'"),
    ],
)
def test_a_mistake_in_a_spec_is_one_sentence(tmp_path: Path, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(read_spec(written(tmp_path, **sections)))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_shipped_specs_are_ones_that_trainer_and_watcher_take(path: Path, tmp_path: Path) -> None:
    spec = read_spec(path)
    assert plan(spec)
    policies = [arm.policy for arm in spec.arms if arm.policy is not None]
    config = tmp_path / "watch.yaml"
    config.write_text(yaml.safe_dump({"runs": [{"folder": str(tmp_path), "policy": policy} for policy in policies]}))
    assert len(read_settings(config).runs) == len(policies)


def test_no_two_of_them_share_a_seed() -> None:
    """What one chose is not confirmed on the runs that it was chosen on."""
    seeds = [seed for spec in map(read_spec, SPECS) for seed in range(spec.seeds[0], spec.seeds[1] + 1)]
    assert len(seeds) == len(set(seeds))


def test_the_overhead_is_what_was_made_again_and_what_terms_cost() -> None:
    """Ten steps of 1 s and two of 3 s with a term, of which 8 steps stand."""
    found = overhead([(1.0, False)] * 10 + [(3.0, True)] * 2, 8)
    assert found == {"steps": 12, "step_seconds": 1.0, "kss": 4.0, "ratio": pytest.approx((12 + 4) / 8 - 1)}
    assert overhead([(1.0, True)], 1)["ratio"] is None


def record(arm: str, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
    ending = {"status": "diverged" if loss is None else "finished", "final": {"loss": loss}}
    return {"arm": arm, "seed": seed, "point": {}, **ending, **more}


def test_shares_and_differences_are_those_of_the_textbook() -> None:
    # None of n: the upper end is 1 - (alpha / 2)^(1 / n) (Clopper and Pearson 1934).
    assert share(0, 45) == f"0 of 45: 0% [0.0, {100 * (1 - 0.025 ** (1 / 45)):.1f}]"
    lost, saved = ([record("a", seed, loss) for seed in range(4)] for loss in (None, 2.0))
    assert float(p_value(lost, saved)) == pytest.approx(2 / math.comb(8, 4), rel=0.02)
    rivals = [record("b", seed, loss) for seed, loss in enumerate((2.5, 2.5, None, 2.5))]
    assert difference(saved, rivals) == "-0.500 [-0.500, -0.500] (3)"
    assert difference(lost, rivals) == "-"


def test_the_table_counts_no_seed_twice(tmp_path: Path) -> None:
    """Two rates on the same seeds are two rows: a third over both would have runs that are not independent."""
    spec = read_spec(written(tmp_path))
    made = {
        "failed": False,
        "rollbacks": [],
        "overhead": {"ratio": 0.0},
        "seconds": {"observing": 0.0, "training": 1.0},
    }
    made |= {"status": "finished", "final": {"loss": 2.0}}
    known = [made | {"key": run.key, "seed": run.seed, "point": dict(run.point)} for run in plan(spec)]
    rows = [line.split(" | ")[:3] for line in table(spec, plan(spec), known).splitlines()[2:]]
    assert rows == [
        ["| nothing", "learning_rate 3.0", "2"],
        ["| nothing", "learning_rate 4.0", "2"],
        ["| stable", "", "2"],
        ["| Back, slower", "learning_rate 3.0", "2"],
        ["| Back, slower", "learning_rate 4.0", "2"],
    ]


@pytest.mark.slow
def test_in_lockstep_a_rescue_comes_out_the_same_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, seeds=[1, 1])
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, more in zip(folders, (["--jobs", "2"], ["--jobs", "1", "--arms", "Back, slower"]), strict=True):
        assert rescue.main([str(path), "--folder", str(folder), *more]) == 0
        assert list((folder / "runs").rglob("config.yaml")) == []
    one, two = ([_timeless(record) for record in Records(folder, SCHEMA)] for folder in folders)
    by_arm = {name: [each for each in one if each["arm"] == name] for name in ("nothing", "stable", "Back, slower")}
    assert by_arm["Back, slower"] == two
    assert [each["status"] for each in by_arm["nothing"]] == ["diverged"] * 2
    assert [(each["status"], len(each["rollbacks"])) for each in by_arm["Back, slower"]] == [("finished", 1)] * 2
    assert [each["orders"][0]["reason"]["risk_level"] for each in by_arm["Back, slower"]] == [3, 3]
    capfd.readouterr()
    assert rescue.main([str(path), "--folder", str(folders[0])]) == 0
    assert "0 runs are left" in capfd.readouterr().out
    assert rescue.main([str(path), "--folder", str(folders[0]), "--report"]) == 0
    lines = capfd.readouterr().out.splitlines()
    nothing, saved = (f"{count} of 1: {100 * count}% " for count in (1, 0))
    assert [line.split(" | ")[3].partition("[")[0] for line in lines[2:]] == [nothing] * 2 + [saved] * 3


@pytest.mark.slow
def test_an_arms_ladder_may_order_a_limit_of_surprise(tmp_path: Path) -> None:
    """A real trainer with AdamW, a real watcher whose alarm is the step: the order changes the run."""
    alarm = {
        "name": "a",
        "level": 3,
        "arm_after_step": 6,
        "all": [{"metric": "loss", "by": 0.0, "against": "absolute"}],
    }
    common = {"rules": [alarm], "cooldown_steps": 2, "rollback_margin": 1, "ratchet": True}
    rungs = {"slower": {}, "surprise, slower": {"surprise": 0.1}}
    arms = [
        {
            "name": name,
            "policy": common | {"ladder": {3: rung | {"learning_rate_scale": 0.5, "rollback": True}}},
        }
        for name, rung in rungs.items()
    ]
    once = {"wait_at_divergence": 60.0, "limits": {"rollbacks": 1}}
    base = SMALL["base"] | {"optimizer": {"name": "adamw"}, "steps": 12, "control": once}
    sections = {"base": base, "grid": {"optimizer.learning_rate": [0.001]}, "seeds": [1, 1], "controls": []}
    path = written(tmp_path, **sections, arms=arms, reference="slower")
    assert rescue.main([str(path), "--folder", str(tmp_path / "made"), "--jobs", "1"]) == 0
    made = {record["arm"]: record for record in Records(tmp_path / "made", SCHEMA)}
    ordered = {name: {order["levers"].get("surprise") for order in each["orders"]} for name, each in made.items()}
    assert ordered == {"slower": {None}, "surprise, slower": {0.1}}
    assert [(len(each["rollbacks"]), each["status"]) for each in made.values()] == [(1, "finished")] * 2
    assert made["slower"]["final"]["loss"] != made["surprise, slower"]["final"]["loss"]


@pytest.mark.slow
def test_a_rescue_that_is_ended_takes_its_watcher_with_it(tmp_path: Path) -> None:
    """As `timeout`, a scheduler or systemd end it."""
    path = written(tmp_path, base=SMALL["base"] | {"steps": 10**6}, arms=[SMALL["arms"][2]], grid={}, controls=[])
    path.write_text(path.read_text().replace("reference: stable", "reference: Back, slower"))
    command = [sys.executable, "-m", "training.experiments.rescue", str(path), "--folder", str(tmp_path / "made")]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with process:
        while not list((tmp_path / "made/runs").rglob("step-*.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        children = process.children(recursive=True)
        assert any("rksp_monitor" in child.cmdline() for child in children)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "rescue: interrupted; the same command goes on\n")
    assert psutil.wait_procs(children, timeout=60)[1] == []


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what a clock has measured."""
    made = {"steps_made": record["overhead"]["steps"]}
    return {name: value for name, value in record.items() if name not in ("seconds", "overhead")} | made


def test_the_records_that_are_kept_are_runs_of_their_plan() -> None:
    kept = Path(__file__).parents[2] / "benchmarks" / "data" / "rescue"
    planned = {spec.name: {run.key: run for run in plan(spec)} for spec in map(read_spec, SPECS)}
    for folder in kept.iterdir():
        records = list(Records(folder, SCHEMA))
        assert len(records) >= 16
        for each in records:
            run = planned[each["experiment"]][each["key"].removeprefix(rescue.FREE)]
            assert (each["arm"], each["seed"], each["point"]) == (run.arm.name, run.seed, run.point)
