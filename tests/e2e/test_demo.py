"""The loop from end to end through ``rksp demo``: real trainers, real watchers, orders, acknowledgements, the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rksp_core.orders import Acknowledgement, Desired
from rksp_monitor.demo.page import Story, verdict

ROOT = Path(__file__).parents[2]

TRAINER = {
    "run_id": "small",
    "steps": 1500,
    "model": {
        "factory": "training.models.gpt:GPT",
        "arguments": {"vocabulary": 32, "length": 16, "width": 16, "depth": 2, "heads": 2, "norm": "pre_ln"},
    },
    "task": {"name": "associative_recall", "batch": 8, "pairs": 2},
    "checkpoint": {"every": 1000},
    "profile": {"every": 20, "samples": 128, "sequences": 8},
}

# A policy that cannot stay silent: every loss is above 0.
ALWAYS = {
    "policy": {
        "ladder": {0: {"alpha": 0.0}, 2: {"alpha": 0.05, "interval": 5, "layer_fraction": 1.0}},
        "rules": [
            {
                "name": "any_loss",
                "level": 2,
                "all": [{"metric": "loss", "against": "absolute", "direction": "rises", "by": 0.0}],
                "arm_after_step": 0,
            }
        ],
    },
    "replay": {"samples": 128},
}


def demo(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rksp_monitor", "demo", "--output", str(folder / "out"), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def column(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_order_goes_all_the_way_and_only_where_it_may(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAINER))
    (tmp_path / "watch.yaml").write_text(yaml.safe_dump(ALWAYS))
    done = demo(tmp_path, "--config", str(tmp_path / "train.yaml"), "--watch-config", str(tmp_path / "watch.yaml"))
    assert done.returncode == 0, done.stderr
    alone, looped = tmp_path / "out" / "without-loop", tmp_path / "out" / "with-loop"

    assert not (alone / "control" / "desired.json").exists(), "observing writes no order"
    order = Desired.from_dict(json.loads((looped / "control" / "desired.json").read_text()))
    answer = Acknowledgement.from_dict(json.loads((looped / "control" / "applied.json").read_text()))
    assert order.run_id == answer.run_id == "with-loop"
    assert answer.status == "applied"
    assert answer.active_generation == order.generation
    assert answer.active_kss == order.kss
    assert order.kss.alpha == 0.05

    weights = [column(run, "kss_weight") for run in (alone, looped)]
    assert set(weights[0]) == {0.0}
    assert weights[1] == sorted(weights[1]), "switched on once, at a step boundary"
    assert weights[1][-1] == 0.05
    first = weights[1].index(0.05)
    losses = [column(run, "loss") for run in (alone, looped)]
    assert losses[0][:first] == losses[1][:first], "up to the order both runs are the same, bit by bit"
    assert losses[0][-1] != losses[1][-1]

    page = (tmp_path / "out" / "demo.html").read_text()
    assert "false alarm, on this seed" in done.stdout
    assert "false alarm, on this seed" in page
    assert not re.search(r"(src|href)=.?http", page), "the page needs nothing else"


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    done = demo(tmp_path)
    assert done.returncode == 2
    assert "is not empty; remove it, or choose another folder with --output" in done.stderr
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_without_the_trainer_it_says_where_to_get_it(tmp_path: Path) -> None:
    """As a wheel would be: the packages alone, elsewhere."""
    for package in ("rksp_core", "rksp_monitor"):
        (tmp_path / package).symlink_to(ROOT / package)
    code = (
        "import rksp_monitor, sys; rksp_monitor.__file__ = 'elsewhere/rksp_monitor/__init__.py';"
        "from rksp_monitor.cli import main; main(['demo', '--output', 'out'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the demo trains with the bundled trainer" in done.stderr
    assert not (tmp_path / "out").exists()


def story(diverged_at: int | None, applied_at: int | None = None, orders: int = 0, kss: float = 0.0) -> Story:
    went_back = () if applied_at is None or kss else ((applied_at, 100),)
    scale = 0.5 if went_back else 1.0
    ended = (diverged_at, None, None, applied_at, orders, went_back, scale, kss)
    return Story("run", "", 300, 300, *ended, 1.0, 0.5)


@pytest.mark.parametrize(
    ("alone", "looped", "words"),
    [
        (story(None), story(None), "the watcher at rest"),
        (story(200), story(200), "no order was given"),
        (story(200), story(200, orders=1), "too late to be obeyed"),
        (story(200), story(None), "Only the run run diverged, at step 200, and no order was given"),
        (
            story(200),
            story(None, 150, 1),
            "went back from step 150 to step 100 and went on at 0.5 of its learning rate; it",
        ),
        (story(200), story(None, 150, 1, kss=0.15), "at step 150 switched KSS on at weight 0.15; it reached"),
        (story(200), story(None, 150, 1), "saved, on this seed and up to this horizon"),
        (story(None), story(None, 150, 1), "false alarm"),
        (story(None), story(200, 150, 1), "it harmed"),
        (story(200), story(230, 150, 1), "30 steps later than the one without"),
        (story(200), story(180, 150, 1), "20 steps earlier than the one without"),
    ],
)
def test_the_sentence_says_what_happened_and_no_more(alone: Story, looped: Story, words: str) -> None:
    assert words in verdict(alone, looped)
