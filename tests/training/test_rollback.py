"""A run that is taken back to a checkpoint goes on as a plain reading of the trainer says, and lives on."""

import json
from pathlib import Path

import pytest
import torch

from rksp_core.control import ControlWriter
from rksp_core.errors import CheckpointError
from rksp_core.orders import KSSSettings, Levers, Reason
from rksp_monitor.discovery import Scanner
from tests.training.test_resume import ALONE, assert_bitwise_equal, final
from training.callbacks import Profiles
from training.checkpoint import CheckpointWriter, checkpoints, step_of
from training.config import Checkpoint
from training.labels import Labels
from training.loop import train
from training.ranks import Ranks
from training.run import build_run
from training.run_folder import read_rollbacks
from training.step import advance

SECTIONS = {"steps": 20, "checkpoint": {"every": 4}, "profile": {"every": 3, "samples": 64, "sequences": 4}}


def order(config, step: int, **levers: float) -> None:
    ControlWriter(config.control_folder).issue(config.run_id, KSSSettings(), Reason(), rollback_to=step, **levers)


@pytest.fixture
def ordered_at(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets somebody order a rollback once a step has been made, and damage checkpoints."""

    def arrange(config, at: int, to: int, *, damaged: tuple[int, ...] = (), **levers: float) -> None:
        seen = Profiles.after

        def then_order(self, run, record):
            seen(self, run, record)
            if run.step == at and not run.rollbacks:
                for step in damaged:
                    path = Path(config.output) / f"checkpoints/step-{step:08d}/model.safetensors"
                    path.write_bytes(path.read_bytes()[:-100])
                order(config, to, **levers)

        monkeypatch.setattr(Profiles, "after", then_order)

    return arrange


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "again"])
def test_a_run_goes_back_and_on_with_the_levers_of_the_order(configure, ordered_at, skip):
    config = configure(**SECTIONS, control={"skip_batches": skip})
    ordered_at(config, at=14, to=11, learning_rate_scale=0.5)
    result = train(config, ALONE)
    offset = 6 if skip else 0
    assert result["rollbacks"] == [{"left": 14, "reached": 8, "diverged": False, "data_offset": offset}]
    assert (result["status"], result["step"]) == ("finished", 20)

    plain = build_run(configure("plain", **SECTIONS), ALONE)
    losses = [advance(plain).loss for _ in range(8)]
    plain.follower.levers = Levers(learning_rate_scale=0.5)
    whole, batch = plain.task, plain.task.batch
    whole.batch = lambda part, step, size: batch(part, step + offset, size)
    losses += [advance(plain).loss for _ in range(12)]
    weights, _, _, lines = final(config)
    assert_bitwise_equal(dict(plain.model.state_dict()), dict(weights))
    assert [line["loss"] for line in lines] == losses
    assert [line["step"] for line in lines] == list(range(1, 21))


def test_what_came_after_the_checkpoint_is_gone_and_comes_again(configure, ordered_at):
    config = configure(**SECTIONS)
    ordered_at(config, at=14, to=11)
    assert train(config, ALONE, until=15)["step"] == 15
    folder = Path(config.output)
    assert sorted(path.stem[-2:] for path in (folder / "profiles").iterdir()) == ["00", "03", "06", "09", "12", "15"]
    assert [path.name[-2:] for path in checkpoints(folder / "checkpoints")] == ["00", "04", "08", "12", "15"]
    answer = json.loads((folder / "control/applied.json").read_text())
    assert (answer["step"], answer["rolled_back_to"], answer["message"]) == (14, 8, "went back to step 8")
    (undone,) = checkpoints(folder / "checkpoints/undone-1")
    assert json.loads((undone / "checkpoint.json").read_text())["step"] == 12, "set aside, not deleted"
    seen = {each.path for each in Scanner(folder).scan() if each.kind == "checkpoint"}
    assert seen == set(checkpoints(folder / "checkpoints")), "a watcher takes it for none of the run's"


def test_of_what_was_undone_as_many_are_kept_as_of_the_runs_own(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    writer = CheckpointWriter(tmp_path, Checkpoint(keep_last=3, keep_every=10), ALONE)

    def there() -> dict[str, list[int]]:
        return {
            place.name: [step_of(path) for path in checkpoints(place)] for place in sorted(tmp_path.glob("undone-*"))
        }

    for step in (6, 7, 8):
        writer.write(step, model, optimizer, {"state": {}})
    writer.set_aside_after(8)
    assert there() == {}
    writer.set_aside_after(6)
    assert there() == {"undone-1": [7, 8]}
    for step in (9, 10):
        writer.write(step, model, optimizer, {"state": {}})
    writer.set_aside_after(6)
    assert there() == {"undone-1": [8], "undone-2": [9, 10]}
    for step in (11, 12, 13):
        writer.write(step, model, optimizer, {"state": {}})
    writer.set_aside_after(6)
    assert there() == {"undone-1": [], "undone-2": [10], "undone-3": [11, 12, 13]}, "10 is a multiple of keep_every"
    assert [step_of(path) for path in checkpoints(tmp_path)] == []


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(configure, ordered_at):
    runs = {name: configure(name, **SECTIONS) for name in ("damaged", "whole")}
    ordered_at(runs["damaged"], at=14, to=12, damaged=(8, 12), learning_rate_scale=0.5)
    result = train(runs["damaged"], ALONE)
    answer = json.loads((Path(runs["damaged"].output) / "control/applied.json").read_text())
    assert (answer["rolled_back_to"], answer["message"]) == (4, "went back to step 4")
    ordered_at(runs["whole"], at=14, to=4, learning_rate_scale=0.5)
    assert result["rollbacks"] == train(runs["whole"], ALONE)["rollbacks"]
    assert_bitwise_equal(final(runs["whole"]), final(runs["damaged"]))


def test_a_run_whose_checkpoints_are_all_damaged_ends(configure, ordered_at):
    config = configure(**SECTIONS)
    ordered_at(config, at=10, to=8, damaged=(0, 4, 8))
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step-00000000"):
        train(config, ALONE)


@pytest.mark.parametrize("killed_at", [9, 13])
def test_a_run_that_went_back_resumes_exactly(configure, ordered_at, killed_at):
    """Also from the checkpoint that it went back to, which knows nothing of it."""
    whole, parts = (configure(name, **SECTIONS, kss={"alpha": 0.1, "interval": 3}) for name in ("whole", "parts"))
    for config in (whole, parts):
        ordered_at(config, at=14, to=8, learning_rate_scale=0.5, clip=1.0)
        killed = [False]

        def kill(config=config, killed=killed) -> bool:
            there = config is parts and (lines := _lines(config)) == killed_at and bool(read_rollbacks(config))
            killed[0] = killed[0] or there
            return there and bool(lines)

        train(config, ALONE, stop=kill)
        if config is parts:
            assert killed[0]
            for left in checkpoints(Path(config.output) / "checkpoints"):  # as if it had been killed, not stopped
                if left.name.endswith(f"{killed_at:02d}"):
                    (left / "checkpoint.json").unlink()
                    left.rename(left.with_name(".gone"))
            train(config, ALONE, resume=True)
    assert_bitwise_equal(final(whole), final(parts))
    assert len(read_rollbacks(parts)) == 1


def _lines(config) -> int:
    path = Path(config.output) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def diverging(configure, name: str, **control):
    """No-Norm at a rate at which it blows up within some steps, unless that is taken down."""
    sections = {
        "steps": 40,
        "arguments": {"norm": "no_norm"},
        "optimizer": {"name": "sgd", "learning_rate": 3.0},
        "checkpoint": {"every": 2},
        "schedule": {"warmup": 0},
        "profile": {"every": 50, "samples": 64, "sequences": 4},
    }
    return configure(name, **sections, control=control)


def test_a_run_that_diverged_lives_on_when_it_is_taken_back(configure):
    lost = diverging(configure, "lost")
    assert train(lost, ALONE)["status"] == "diverged"
    at = train(diverging(configure, "waited", wait_at_divergence=0.01), ALONE)["diverged_at"]["rksp"]
    profile = json.loads((Path(lost.output).parent / f"waited/profiles/step-{at:08d}.json").read_text())
    assert (profile["step"], profile["loss"] or profile["not_finite"]) != (at, None)
    assert not (Path(lost.output) / f"profiles/step-{at:08d}.json").exists()

    saved = diverging(configure, "saved", wait_at_divergence=60.0)
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        if "diverged; waiting" in sentence:
            order(saved, 0, learning_rate_scale=0.01)

    result = train(saved, ALONE, say=say)
    assert (result["status"], result["diverged_at"]["rksp"]) == ("finished", None)
    assert result["rollbacks"] == [{"left": at - 1, "reached": 0, "diverged": True, "data_offset": at}]
    assert any("an order: back to step 0; KSS" in sentence for sentence in said)


def test_a_diverged_run_gives_up_when_nobody_takes_it_back_or_it_is_told_to_stop(configure):
    waited = diverging(configure, "waited", wait_at_divergence=0.2)
    assert train(waited, ALONE)["status"] == "diverged"
    stopped = diverging(configure, "stopped", wait_at_divergence=3600.0)
    assert train(stopped, ALONE, stop=lambda: _lines(stopped) > 0 and _has_diverged(stopped))["status"] == "diverged"


def _has_diverged(config) -> bool:
    """Whether the last line of the log says so."""
    last = json.loads((Path(config.output) / "metrics.jsonl").read_text().splitlines()[-1])
    return last["loss"] is None or last["gradient_norm"] is None or last["loss"] > 50 or last["gradient_norm"] > 500


def test_going_back_ends_where_the_run_allows_no_more(configure, ordered_at):
    config = configure(**SECTIONS, control={"limits": {"rollbacks": 0}})
    ordered_at(config, at=14, to=11, clip=0.5)
    assert train(config, ALONE, until=15)["rollbacks"] == []
    answer = json.loads((Path(config.output) / "control/applied.json").read_text())
    assert (answer["rolled_back_to"], answer["active"]["clip"]) == (None, 0.5)
    assert "limits.rollbacks" in answer["message"]


def test_a_run_in_memory_has_nowhere_to_go_back_to(configure):
    run = build_run(configure(), Ranks(0, 1, torch.device("cpu")))
    assert run.rollbacks == []
    assert run.labels == Labels()
    assert run.follower.rollback is None


def test_a_run_that_is_killed_while_it_goes_back_goes_back_when_it_is_resumed(configure, ordered_at, monkeypatch):
    config = configure(**SECTIONS, control={"limits": {"rollbacks": 1}})
    ordered_at(config, at=14, to=11, learning_rate_scale=0.5)
    with monkeypatch.context() as killing:
        killing.setattr(Profiles, "back", _killed)  # what was written later is there still, and nobody was answered
        with pytest.raises(KeyboardInterrupt):
            train(config, ALONE)
    result = train(config, ALONE, resume=True)
    assert [(each["left"], each["reached"]) for each in result["rollbacks"]] == [(12, 8)]
    answer = json.loads((Path(config.output) / "control/applied.json").read_text())
    assert answer["rolled_back_to"] == 8


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_is_resumed_from_before_a_rollback_sees_what_it_saw(configure, ordered_at):
    """Its newer checkpoints were removed, as they were damaged."""
    whole, parts = (configure(name, **SECTIONS) for name in ("whole", "parts"))
    for config in (whole, parts):
        ordered_at(config, at=14, to=8, learning_rate_scale=0.5)
        train(config, ALONE, until=None if config is whole else 15)
    for path in checkpoints(Path(parts.output) / "checkpoints"):
        if int(path.name[5:]) > 4:
            path.rename(path.with_name(f".gone-{path.name}"))
    train(parts, ALONE, resume=True, until=8)
    seen = [json.loads(line)["loss"] for line in (Path(parts.output) / "metrics.jsonl").read_text().splitlines()]
    plain = build_run(configure("plain", **SECTIONS), ALONE)
    assert seen[4:] != []
    first = [advance(plain).loss for _ in range(4)]
    assert seen[:4] == first
    plain.follower.levers = Levers(learning_rate_scale=0.5)  # the order that was given holds, whatever the step
    assert seen[4:] == [advance(plain).loss for _ in range(4)]


def test_a_file_of_another_name_among_the_profiles_is_left_alone(configure, ordered_at):
    config = configure(**SECTIONS)
    ordered_at(config, at=14, to=11)
    copy = Path(config.output) / "profiles/step-00000012 (copy).json"
    copy.parent.mkdir(parents=True)
    copy.write_text("{}")
    assert train(config, ALONE, until=15)["rollbacks"][0]["reached"] == 8
    assert copy.exists()
