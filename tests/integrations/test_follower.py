"""One process that follows: what holds after each order, after a restart, and when the answer cannot be written."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from rksp_core import KSSRegularizer, KSSSettings, Limits
from rksp_core.control import ControlWriter
from rksp_core.follower import ControlFollower
from rksp_core.orders import Levers, Reason
from rksp_core.policy import Policy
from tests.integrations.words import Words

ALL = Limits(clip=(0.1, 10.0), learning_rate_scale=(0.1, 1.0), surprise=(0.1, 10.0))
ORDER = KSSSettings(0.2, 7, 0.3, 0.45, "hinge")


def follower(folder: Path) -> tuple[ControlFollower, KSSRegularizer]:
    regularizer = KSSRegularizer(Words(), alpha=0.05)
    return ControlFollower(folder, "run", regularizer, ALL), regularizer


def test_an_order_reaches_the_regularizer_and_the_levers_beside_it(tmp_path: Path) -> None:
    one, regularizer = follower(tmp_path)
    assert one.follow(0) is None
    assert one.levers.alpha == 0.05
    ControlWriter(tmp_path).issue("run", ORDER, Reason(), clip=0.5, learning_rate_scale=0.25, surprise=2.0)
    assert one.follow(3) == one.levers == Levers.of(ORDER, 0.5, 0.25, 2.0)
    assert regularizer.settings == ORDER
    assert one.follow(4) is None
    answer = json.loads((tmp_path / "applied.json").read_text())
    assert (answer["status"], answer["step"], answer["active"]["clip"]) == ("applied", 3, 0.5)


def test_an_order_whose_time_is_over_gives_everything_back(tmp_path: Path) -> None:
    one, regularizer = follower(tmp_path)
    ControlWriter(tmp_path).issue("run", ORDER, Reason(), clip=0.5, expires_in=-1.0)
    assert one.follow(0) is not None
    assert (one.levers.alpha, one.levers.clip, regularizer.settings.alpha) == (0.0, None, 0.0)


def test_a_restored_follower_holds_the_order_and_takes_a_newer_one(tmp_path: Path) -> None:
    one, _ = follower(tmp_path / "here")
    ControlWriter(tmp_path / "here").issue("run", ORDER, Reason(), clip=0.5, surprise=2.0, expires_in=3600.0)
    one.follow(0)
    state = json.loads(json.dumps(one.state_dict()))
    other, regularizer = follower(tmp_path / "there")
    other.load_state_dict(state)
    assert other.levers == one.levers
    assert regularizer.settings == ORDER
    writer = ControlWriter(tmp_path / "there")
    writer.issue("run", KSSSettings(0.1), Reason(), known=1)
    assert other.follow(9) == Levers(0.1)


def test_an_answer_that_cannot_be_written_is_logged_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, regularizer = follower(tmp_path / "gone")
    ControlWriter(tmp_path / "gone").issue("run", ORDER, Reason())
    acknowledge = one._listener.acknowledge

    def after_the_folder_went(*args: object, **named: object) -> None:
        shutil.rmtree(tmp_path / "gone")
        acknowledge(*args, **named)

    monkeypatch.setattr(one._listener, "acknowledge", after_the_folder_went)
    with caplog.at_level(logging.WARNING):
        assert one.follow(5) is not None
    assert regularizer.settings == ORDER
    assert "step 5: the answer cannot be written" in caplog.text


def test_a_loop_of_ones_own_takes_the_shipped_order_where_its_limits_say_so(tmp_path: Path) -> None:
    shipped = Policy().rung(3).levers
    ControlWriter(tmp_path).issue("run", shipped, Reason())
    assert ControlFollower(tmp_path, "run", KSSRegularizer(Words())).follow(1) is None
    answer = json.loads((tmp_path / "applied.json").read_text())
    assert answer["status"] == "rejected"
    assert answer["message"].endswith("this trainer has no such lever; its limits.learning_rate_scale must allow it")
    applies = Limits(learning_rate_scale=(0.01, 1.0))
    assert ControlFollower(tmp_path, "run", KSSRegularizer(Words()), applies).follow(2) == shipped


def answer_to_a_rollback(one: ControlFollower, folder: Path) -> dict:
    ControlWriter(folder).issue("run", ORDER, Reason(), clip=0.5, rollback_to=30)
    assert one.follow(42) == one.levers == Levers.of(ORDER, 0.5)
    return json.loads((folder / "applied.json").read_text())


def test_an_order_takes_the_loop_back_before_its_levers_are_set(tmp_path: Path) -> None:
    one, regularizer = follower(tmp_path)
    seen: list[tuple[int, float]] = []

    def rollback(step: int) -> int:
        seen.append((step, regularizer.settings.alpha))
        regularizer.load_state_dict({"steps": 3, "skipped_layers": 0, "settings": {"alpha": 0.7}})  # of a checkpoint
        return 25

    one.rollback = rollback
    answer = answer_to_a_rollback(one, tmp_path)
    assert (seen, one.rollbacks) == ([(30, 0.05)], 1)
    assert (regularizer.settings, regularizer.steps) == (ORDER, 3)
    assert (answer["schema"], answer["status"], answer["step"]) == ("rksp.control.ack/3", "applied", 42)
    assert (answer["rolled_back_to"], answer["message"]) == (25, "went back to step 25")
    assert one.follow(25) is None


@pytest.mark.parametrize(
    ("rollback", "rollbacks", "why"),
    [
        (None, 3, "this trainer cannot go back"),
        (lambda _: None, 3, "there is no checkpoint at or before step 30"),
        (lambda _: 30, 0, "this trainer goes back 0 times at most (limits.rollbacks)"),
    ],
    ids=["no callback", "no checkpoint", "not allowed"],
)
def test_a_loop_that_cannot_go_back_obeys_the_rest_and_says_why(tmp_path: Path, rollback, rollbacks, why) -> None:
    regularizer = KSSRegularizer(Words())
    limits = Limits(clip=(0.1, 10.0), rollbacks=rollbacks)
    one = ControlFollower(tmp_path, "run", regularizer, limits, rollback=rollback)
    answer = answer_to_a_rollback(one, tmp_path)
    assert (answer["status"], answer["rolled_back_to"], answer["message"]) == (
        "applied",
        None,
        f"did not go back: {why}",
    )
    assert (answer["active"]["clip"], one.rollbacks) == (0.5, 0)


def test_a_loop_goes_back_as_often_as_it_allows_counted_over_restarts(tmp_path: Path) -> None:
    went: list[int] = []
    writer = ControlWriter(tmp_path)
    state: dict = {"order": None, "rollbacks": 1}
    for step in (50, 40, 30):
        one = ControlFollower(tmp_path, "run", KSSRegularizer(Words()), rollback=lambda s: went.append(s) or s)
        one.load_state_dict(state)
        before = len(went)
        one.follow(60)
        assert len(went) == before, "an order that was obeyed before takes nobody back again"
        writer.issue("run", KSSSettings(), Reason(), rollback_to=step)
        one.follow(60)
        state = json.loads(json.dumps(one.state_dict()))
    assert (went, state["rollbacks"]) == ([50, 40], 3)


def test_a_loop_that_takes_its_follower_back_with_it_goes_back_no_oftener(tmp_path: Path) -> None:
    """A checkpoint does not know that the loop came back to it."""
    went: list[int] = []
    one = ControlFollower(tmp_path, "run", KSSRegularizer(Words()), Limits(rollbacks=2))
    kept, writer = json.loads(json.dumps(one.state_dict())), ControlWriter(tmp_path)

    def rollback(step: int) -> int:
        one.load_state_dict(kept)
        went.append(step)
        return step

    one.rollback = rollback
    for step in (50, 40, 30):
        writer.issue("run", KSSSettings(), Reason(), rollback_to=step)
        one.follow(60)
    assert (went, one.rollbacks) == ([50, 40], 2)


def stepped(kind: type[torch.optim.Optimizer], model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = kind(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax, torch.optim.AdamW])
def test_an_order_of_surprise_is_rejected_as_a_whole_where_the_optimizer_keeps_no_second_moments(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    model = Words()
    regularizer, optimizer = KSSRegularizer(model), stepped(kind, model)
    one = ControlFollower(tmp_path, "run", regularizer, ALL, optimizers=[optimizer])
    writer = ControlWriter(tmp_path)
    writer.issue("run", ORDER, Reason(), clip=0.5)
    assert one.follow(1) == Levers.of(ORDER, 0.5)
    writer.issue("run", KSSSettings(), Reason(), clip=0.7, surprise=2.0)
    able = kind is torch.optim.AdamW
    assert one.follow(2) == (Levers(clip=0.7, surprise=2.0) if able else None)
    said = writer.applied()
    assert said is not None
    assert (said.status, said.active) == ("applied" if able else "rejected", one.levers)
    if not able:
        assert one.levers == Levers.of(ORDER, 0.5), "what held goes on"
        assert said.message == (
            f"the order asks for surprise 2.0, and surprise clipping needs the second moments of Adam, which "
            f"{kind.__name__} does not keep; clip by the norm of the gradient"
        )


def test_a_loop_that_resumes_with_another_optimizer_holds_the_rest_of_its_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Words()
    one = ControlFollower(tmp_path, "run", KSSRegularizer(model), ALL, optimizers=[stepped(torch.optim.AdamW, model)])
    writer = ControlWriter(tmp_path)
    writer.issue("run", ORDER, Reason(), clip=0.5, surprise=2.0)
    assert one.follow(1) == Levers.of(ORDER, 0.5, None, 2.0)
    state = json.loads(json.dumps(one.state_dict()))
    other = ControlFollower(tmp_path, "run", KSSRegularizer(model), ALL, optimizers=[stepped(torch.optim.SGD, model)])
    other.load_state_dict(state)
    assert other.levers == Levers.of(ORDER, 0.5)
    assert "order 1 holds without surprise: the order asks for surprise 2.0, and surprise clipping needs" in caplog.text
    assert other.follow(1) is None  # the same order is there still
    said = writer.applied()
    assert said is not None
    assert (said.status, said.active) == ("rejected", Levers.of(ORDER, 0.5))
