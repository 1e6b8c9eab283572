"""The Hugging Face Trainer with the callback against the same step written out, and what must not or cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from rksp_core import KSSRegularizer, KSSSettings, Limits
from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError, ModelError
from rksp_core.integrations.huggingface import RkspCallback
from rksp_core.orders import Levers, Reason
from rksp_core.policy import Policy
from rksp_core.surprise import clip_surprise
from tests.integrations.words import IGNORED, OwnMean, Words, rows, stacked, weights

STRONG = KSSSettings(alpha=5.0, interval=1, layer_fraction=1.0)
RATE = 0.1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    fixed = {"output_dir": str(folder), "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    sizes = {"learning_rate": RATE, "per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1}
    return TrainingArguments(**(fixed | quiet | sizes | settings))


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(
    model: nn.Module, args: TrainingArguments, *callbacks: TrainerCallback, count: int = 4, resume: Any = None
) -> InOrder:
    trainer = InOrder(model, args, train_dataset=rows(count), eval_dataset=rows(2), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(model: Words, micro_batches: list[dict[str, Tensor]], regularizer: KSSRegularizer, *, share: bool) -> None:
    """One step of SGD: each micro-batch's loss by its items (``share``) or alike, each micro-batch's term alike."""
    items = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
    with regularizer:
        for batch in micro_batches:
            output = model(**batch, num_items_in_batch=items) if share else model(**batch)
            loss = output["loss"] if isinstance(output, dict) else output[0] / len(micro_batches)
            (loss + regularizer.term() / len(micro_batches)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    model.zero_grad()


@pytest.mark.parametrize("kind", [Words, OwnMean])
def test_the_step_is_the_one_written_out(tmp_path: Path, kind: type[Words]) -> None:
    """Three micro-batches of unlike lengths make two steps, of two and of one: the Trainer divides by 2 and by 1."""
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trained = kind()
    train(trained, args, RkspCallback(tmp_path, kss=STRONG), count=6)
    expected = kind()
    regularizer = KSSRegularizer(expected, STRONG.alpha, STRONG.interval, STRONG.layer_fraction)
    batches = [stacked(rows(6)[start : start + 2]) for start in (0, 2, 4)]
    for window in (batches[:2], batches[2:]):
        by_hand(expected, window, regularizer, share=kind is Words)
    torch.testing.assert_close(weights(trained), weights(expected), rtol=1e-10, atol=1e-14)
    without = kind()
    train(without, arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2), count=6)
    assert (weights(trained) - weights(without)).abs().max() > 1e-3


def test_observing_changes_no_bit(tmp_path: Path) -> None:
    """Profiles, logs of their steps, evaluations in between: the weights are those of a run without the callback."""
    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 5, "optim": "adamw_torch"}
    plain, observed = Words(), Words()
    train(plain, arguments(tmp_path, **settings), count=6)
    probe = {name: stacked(rows(6))[name] for name in ("input_ids", "attention_mask")}
    trainer = train(
        observed, arguments(tmp_path, **settings), RkspCallback(tmp_path, probe=probe, profile_every=2), count=6
    )
    assert torch.equal(weights(plain), weights(observed))
    profiles = {int(p.stem[5:]): json.loads(p.read_text()) for p in sorted((tmp_path / "profiles").glob("*.json"))}
    assert list(profiles) == [0, 2, 4, 6, 8]
    logged = {record["step"]: record for record in trainer.state.log_history if "loss" in record}
    assert profiles[4]["loss"] == logged[4]["loss"]
    assert profiles[4]["gradient_norm"] == logged[4]["grad_norm"]
    assert logged[4]["kss_weight"] == 0.0


class Orders(TrainerCallback):
    """Plays the monitor: writes an order after a step."""

    def __init__(self, folder: Path, rollback_to: int | None = None, **levers_after: Levers) -> None:
        self.writer, self.folder = ControlWriter(folder / "control"), folder
        self.rollback_to = rollback_to
        self.after = {int(name.removeprefix("step_")): levers for name, levers in levers_after.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.after:
            levers, name = self.after[state.global_step], self.folder.resolve().name
            self.writer.issue(name, levers, Reason(), rollback_to=self.rollback_to)

    def answer(self) -> dict[str, Any]:
        return json.loads((self.folder / "control" / "applied.json").read_text())


def figures(trainer: Trainer, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if "loss" in record]


def test_an_order_is_obeyed_at_the_next_optimizer_step_and_answered(tmp_path: Path) -> None:
    monitor = Orders(tmp_path, step_2=Levers(alpha=0.3, interval=2, layer_fraction=1.0))
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2)
    trainer = train(Words(), args, monitor, RkspCallback(tmp_path), count=12)
    assert figures(trainer, "kss_weight") == [0.0, 0.0, 0.3, 0.3, 0.3, 0.3]
    assert [term > 0 for term in figures(trainer, "kss_term")] == [False, False, True, True, True, True]
    answer = monitor.answer()
    assert (answer["status"], answer["step"], answer["active"]["kss"]["alpha"]) == ("applied", 2, 0.3)


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path) -> None:
    """Also without the control folder: the order that holds is in the checkpoint."""
    folder, again = tmp_path / "run", tmp_path / "elsewhere"
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch"}
    order = Orders(folder, step_2=Levers(alpha=0.5, interval=3, layer_fraction=0.4))
    straight, resumed = Words(), Words()
    train(straight, arguments(folder, **settings), order, RkspCallback(folder, kss=STRONG), count=10)
    shutil.copytree(folder / "checkpoint-4", again / "checkpoint-4")
    trainer = train(resumed, arguments(again, **settings), RkspCallback(again), count=10, resume=True)
    assert torch.equal(weights(straight), weights(resumed))
    assert figures(trainer, "kss_weight")[4:] == [0.5] * 3


def test_clip_and_learning_rate_go_where_an_order_says_and_back(tmp_path: Path) -> None:
    """The schedule falls by a tenth a step; the factor neither shows in it nor compounds."""
    limits = Limits(clip=(0.01, 1.0), learning_rate_scale=(0.1, 1.0))
    quarter = Levers(clip=0.05, learning_rate_scale=0.25)
    monitor = Orders(tmp_path, step_2=quarter, step_4=Levers())
    moves: list[float] = []

    class Moves(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = weights(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = weights(kwargs["model"])
            moves.append(float((now - self.last).norm()))
            self.last = now

    args = arguments(tmp_path, max_steps=10, lr_scheduler_type="linear", max_grad_norm=0.1)
    trainer = train(Words(), args, monitor, RkspCallback(tmp_path, limits=limits), Moves(), count=20)
    assert min(figures(trainer, "grad_norm")) > 0.1  # so every step is clipped, and its length is known
    rates = [RATE * (10 - step) / 10 for step in range(10)]
    assert figures(trainer, "learning_rate") == pytest.approx(rates, rel=1e-12)
    clips = [0.1, 0.1, 0.05 / 4, 0.05 / 4] + [0.1] * 6
    # torch divides by the norm plus 1e-6
    assert moves == pytest.approx([rate * clip for rate, clip in zip(rates, clips, strict=True)], rel=1e-4)
    assert args.max_grad_norm == 0.1


SURPRISE = Limits(surprise=(0.1, 1.0))


def test_surprise_is_clipped_as_long_as_an_order_says_and_over_a_resume(tmp_path: Path) -> None:
    """After accumulation and the Trainer's own clip, as by hand; the order is in the checkpoint."""

    class ByHand(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if 2 <= state.global_step < 5:
                assert clip_surprise(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]), 0.2) > 0.2

    settings = {"max_steps": 6, "optim": "adamw_torch", "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    monitor = Orders(tmp_path / "a", step_2=Levers(surprise=0.2), step_5=Levers())
    expected, ordered, free, resumed = Words(), Words(), Words(), Words()
    train(expected, arguments(tmp_path / "b", **settings), ByHand(), count=24)
    train(
        ordered, arguments(tmp_path / "a", **settings), monitor, RkspCallback(tmp_path / "a", limits=SURPRISE), count=24
    )
    train(free, arguments(tmp_path / "c", **settings), RkspCallback(tmp_path / "c", limits=SURPRISE), count=24)
    assert torch.equal(weights(ordered), weights(expected))
    assert (weights(free) - weights(expected)).abs().max() > 1e-3
    assert (monitor.answer()["status"], "surprise" in monitor.answer()["active"]) == ("applied", False)
    again = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "a" / "checkpoint-3", again / "checkpoint-3")
    off = Orders(again, step_5=Levers())
    train(resumed, arguments(again, **settings), off, RkspCallback(again, limits=SURPRISE), count=24, resume=True)
    assert torch.equal(weights(resumed), weights(ordered))


def test_surprise_is_no_lever_of_an_optimizer_without_second_moments(tmp_path: Path) -> None:
    """The training goes on with what held, and the answer says why."""
    monitor = Orders(tmp_path, step_1=Levers(alpha=0.2, surprise=0.5))
    trainer = train(
        Words(), arguments(tmp_path, max_steps=3), monitor, RkspCallback(tmp_path, limits=SURPRISE), count=6
    )
    assert figures(trainer, "kss_weight") == [0.0] * 3
    assert monitor.answer()["status"] == "rejected"
    assert "second moments of Adam, which SGD does not keep" in monitor.answer()["message"]


def test_the_shipped_order_is_obeyed_out_of_the_box_but_for_the_way_back(tmp_path: Path) -> None:
    monitor = Orders(tmp_path, rollback_to=0, step_1=Policy().rung(3).levers)
    train(Words(), arguments(tmp_path, max_steps=3), monitor, RkspCallback(tmp_path), count=6)
    answer = monitor.answer()
    assert (answer["status"], answer["active"]["learning_rate_scale"]) == ("applied", 0.5)
    assert answer["message"] == "did not go back: this trainer cannot go back"


def test_an_order_never_raises_the_rate_by_default(tmp_path: Path) -> None:
    monitor = Orders(tmp_path, step_1=Levers(learning_rate_scale=2.0))
    train(Words(), arguments(tmp_path, max_steps=3), monitor, RkspCallback(tmp_path), count=6)
    assert monitor.answer()["status"] == "rejected"
    assert "this trainer allows 0.01 to 1 (limits.learning_rate_scale)" in monitor.answer()["message"]


def test_an_order_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    monitor = Orders(tmp_path, step_1=Levers(alpha=0.2, clip=0.5))
    trainer = train(Words(), arguments(tmp_path, max_steps=3), monitor, RkspCallback(tmp_path), count=6)
    assert figures(trainer, "kss_weight") == [0.0] * 3
    assert monitor.answer()["status"] == "rejected"
    assert "no such lever" in monitor.answer()["message"]


def test_a_loss_that_the_model_does_not_compute_is_refused_at_the_first_step(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    model = Words()
    trainer = InOrder(
        model,
        arguments(tmp_path),
        train_dataset=rows(4),
        compute_loss_func=own,
        callbacks=[RkspCallback(tmp_path)],
    )
    with pytest.raises(ModelError, match=r"Words returned no loss for input_ids, attention_mask, .*compute_loss_func"):
        trainer.train()


class Configured(Words):
    """Label smoothing asks a model for its config."""

    config = type("Config", (), {"problem_type": None, "use_cache": False})()


def test_label_smoothing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing_factor = 0.1 computes the loss outside of the model"):
        train(Configured(), arguments(tmp_path, label_smoothing_factor=0.1), RkspCallback(tmp_path))


def test_what_an_exception_left_behind_is_undone_by_the_next_training_or_by_hand(tmp_path: Path) -> None:
    """The Trainer tells no callback of an exception."""

    class Failing(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of luck")

    limits = Limits(clip=(0.1, 1.0), learning_rate_scale=(0.1, 1.0), surprise=(0.1, 1.0))
    ControlWriter(tmp_path / "control").issue(tmp_path.name, STRONG, Reason(), clip=0.5, learning_rate_scale=0.5)
    model, loop, args = Words(), RkspCallback(tmp_path, limits=limits), arguments(tmp_path, max_grad_norm=0.7)
    trainer = InOrder(model, args, train_dataset=rows(4), callbacks=[loop, Failing()])
    for again in (False, True):
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.train()
        if again:
            loop.end()
        hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert bool(hooked) != again
        assert len(trainer.optimizer.optimizer._optimizer_step_pre_hooks) == (0 if again else 2)
        assert args.max_grad_norm == (0.7 if again else 0.5)
        (tmp_path / "control" / "desired.json").unlink(missing_ok=True)


def test_profiles_need_a_probe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile_every = 5 needs a probe"):
        RkspCallback(tmp_path, profile_every=5)


def test_a_model_without_blocks_is_refused_when_the_training_begins(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no module is called nowhere"):
        train(Words(), arguments(tmp_path), RkspCallback(tmp_path, blocks="nowhere"))
