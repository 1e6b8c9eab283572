"""Lightning's Trainer with the callback against the same step written out, and what must not or cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rksp_core import KSSRegularizer, KSSSettings, Limits
from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError
from rksp_core.integrations.lightning import RkspCallback
from rksp_core.orders import Levers, Reason
from rksp_core.policy import Policy
from rksp_core.surprise import clip_surprise
from tests.integrations.words import Words, rows, stacked, weights

STRONG = KSSSettings(alpha=5.0, interval=1, layer_fraction=1.0)
RATE = 0.1

# What Lightning thinks of small loaders, folders that exist and an srun on the path.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|exists and is not empty).*"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Module(LightningModule):
    """The words of the tests, by automatic optimization."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __init__(self) -> None:
        super().__init__()
        self.model = Words()
        self.double()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.model(**batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=RATE)


class Manual(Module):
    """The same steps, each optimizer step in the module's own hands."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch)["loss"])
        optimizer.step()


def fit(module: Module, *callbacks: Callback, count: int = 6, resume: Any = None, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": 1}
    batches = [stacked(rows(count)[start : start + 2]) for start in range(0, count, 2)]
    trainer = Trainer(callbacks=list(callbacks), **(quiet | fixed | settings))
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, DataLoader(batches[:1], batch_size=None), ckpt_path=resume)
    return trainer


def callback(folder: Path, **settings: Any) -> RkspCallback:
    return RkspCallback(folder, network="model", **settings)


def by_hand(model: Words, windows: list[list[dict[str, Tensor]]], divisor: int) -> None:
    """SGD; Lightning divides the loss of each micro-batch by the same number, also where an epoch's end is short."""
    regularizer = KSSRegularizer(model, STRONG.alpha, STRONG.interval, STRONG.layer_fraction)
    for window in windows:
        with regularizer:
            for batch in window:
                ((model(**batch)["loss"] + regularizer.term()) / divisor).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        model.zero_grad()


@pytest.mark.parametrize("kind", [Module, Manual])
def test_the_steps_are_those_written_out(tmp_path: Path, kind: type[Module]) -> None:
    module, expected = kind(), Words()
    fit(module, callback(tmp_path, kss=STRONG))
    by_hand(expected, [[stacked(rows(6)[start : start + 2])] for start in (0, 2, 4)], 1)
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-10, atol=1e-14)
    assert (weights(expected) - weights(Words())).abs().max() > 1e-3


def test_accumulated_micro_batches_are_one_step_and_a_validation_between_them_is_none(tmp_path: Path) -> None:
    module, expected, loop = Module(), Words(), callback(tmp_path, kss=STRONG)
    fit(module, loop, accumulate_grad_batches=2, val_check_interval=1)
    batches = [stacked(rows(6)[start : start + 2]) for start in (0, 2, 4)]
    by_hand(expected, [batches[:2], batches[2:]], 2)
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-10, atol=1e-14)
    assert loop.state_dict()["kss"]["steps"] == 2
    assert loop.regularizer.skipped_layers == 0


def test_observing_changes_no_bit(tmp_path: Path) -> None:
    plain, observed = Module(), Module()
    plain.optimizer = observed.optimizer = torch.optim.AdamW
    fit(plain, count=12, max_epochs=2)
    probe = stacked(rows(6))["input_ids"]
    fit(observed, callback(tmp_path, probe=probe, profile_every=3), count=12, max_epochs=2)
    assert torch.equal(weights(plain), weights(observed))
    profiles = {int(p.stem[5:]): json.loads(p.read_text()) for p in sorted((tmp_path / "profiles").glob("*.json"))}
    assert list(profiles) == [0, 3, 6, 9, 12]
    assert profiles[3]["loss"] == pytest.approx(loss_of_step(3), rel=1e-10)
    assert profiles[3]["gradient_norm"] > 0


def loss_of_step(step: int) -> float:
    """The loss that the step was made from, before it was made."""
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for start in range(0, 2 * step, 2):
        loss = model(**stacked(rows(12)[start : start + 2]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


class Monitor(Callback):
    """Plays the monitor: writes an order after a batch; notes what the trainer says of KSS."""

    def __init__(self, folder: Path, rollback_to: int | None = None, **levers_after: Levers) -> None:
        self.writer, self.folder = ControlWriter(folder / "control"), folder
        self.rollback_to = rollback_to
        self.after = {int(name.removeprefix("step_")): levers for name, levers in levers_after.items()}
        self.weights: list[float] = []
        self.moves: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = weights(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append(round(float(trainer.callback_metrics["kss_weight"]), 6))  # a float32 by then
        now = weights(pl_module)
        self.moves.append(float((now - self.last).norm()))
        self.last = now
        if trainer.global_step in self.after:
            levers, name = self.after.pop(trainer.global_step), self.folder.resolve().name
            self.writer.issue(name, levers, Reason(), rollback_to=self.rollback_to)


def test_an_order_is_obeyed_at_the_next_optimizer_step_and_answered(tmp_path: Path) -> None:
    """It comes between the first and the second batch of three: those after them obey."""
    monitor = Monitor(tmp_path, step_1=Levers(alpha=0.3, interval=1))
    fit(Module(), callback(tmp_path), monitor, count=18, accumulate_grad_batches=3)
    assert monitor.weights == [0.0] * 3 + [0.3] * 6
    answer = json.loads((tmp_path / "control" / "applied.json").read_text())
    assert (answer["status"], answer["step"], answer["active"]["kss"]["alpha"]) == ("applied", 1, 0.3)


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path) -> None:
    straight, resumed = Module(), Module()
    straight.optimizer = resumed.optimizer = torch.optim.AdamW
    saved = [ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_epochs=1) for _ in range(2)]
    order = Monitor(tmp_path / "run", step_2=Levers(alpha=0.5, interval=2, layer_fraction=0.4))
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
    fit(straight, callback(tmp_path / "run"), order, saved[0], **settings)
    checkpoint = tmp_path / "saved" / "epoch=0-step=3.ckpt"
    loop = callback(tmp_path / "elsewhere")
    fit(Module(), loop)  # it has trained another model before
    fit(resumed, loop, saved[1], resume=checkpoint, **settings)
    assert torch.equal(weights(straight), weights(resumed))


def test_clip_and_learning_rate_go_where_an_order_says_and_back(tmp_path: Path) -> None:
    """An exponential schedule computes each rate from the last one: the factor neither shows in it nor compounds."""

    class Falling(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    limits = Limits(clip=(0.01, 1.0), learning_rate_scale=(0.1, 1.0))
    monitor = Monitor(tmp_path, step_2=Levers(clip=0.05, learning_rate_scale=0.25), step_4=Levers())
    fit(Falling(), callback(tmp_path, limits=limits), monitor, count=16, gradient_clip_val=0.1)
    clips = [0.1, 0.1, 0.05 / 4, 0.05 / 4] + [0.1] * 4
    expected = [RATE * 0.9**step * clip for step, clip in enumerate(clips)]
    assert monitor.moves == pytest.approx(expected, rel=1e-4)  # torch divides by the norm plus 1e-6


@pytest.mark.parametrize("kind", [Module, Manual])
def test_the_shipped_order_is_obeyed_out_of_the_box_but_for_the_way_back(tmp_path: Path, kind: type[Module]) -> None:
    monitor = Monitor(tmp_path, rollback_to=0, step_1=Policy().rung(3).levers)
    fit(kind(), callback(tmp_path), monitor, count=6)
    answer = json.loads((tmp_path / "control" / "applied.json").read_text())
    assert (answer["status"], answer["active"]["learning_rate_scale"]) == ("applied", 0.5)
    assert answer["message"] == "did not go back: this trainer cannot go back"


@pytest.mark.parametrize("kind", [Module, Manual])
def test_surprise_is_clipped_as_long_as_an_order_says(tmp_path: Path, kind: type[Module]) -> None:
    """Lightning makes the gradients inside of the optimizer's step, in a closure."""

    class ByHand(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if 2 <= trainer.global_step < 4:
                assert clip_surprise(optimizer, 0.2) > 0.2

    ordered, expected, free = kind(), kind(), kind()
    ordered.optimizer = expected.optimizer = free.optimizer = torch.optim.AdamW
    settings = {"count": 20} | ({"accumulate_grad_batches": 2} if kind is Module else {})
    fit(expected, ByHand(), **settings)
    limits = Limits(surprise=(0.1, 1.0))
    monitor = Monitor(tmp_path, step_2=Levers(surprise=0.2), step_4=Levers())
    fit(ordered, callback(tmp_path, limits=limits), monitor, **settings)
    fit(free, callback(tmp_path / "nobody", limits=limits), **settings)
    assert torch.equal(weights(ordered), weights(expected))
    assert (weights(free) - weights(expected)).abs().max() > 1e-3


def test_surprise_is_no_lever_of_an_optimizer_without_second_moments(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, step_1=Levers(alpha=0.2, surprise=0.5))
    fit(Module(), callback(tmp_path, limits=Limits(surprise=(0.1, 1.0))), monitor)
    assert monitor.weights == [0.0] * 3
    answer = json.loads((tmp_path / "control" / "applied.json").read_text())
    assert answer["status"] == "rejected"
    assert "second moments of Adam, which SGD does not keep" in answer["message"]


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Module has no forward, .*name it with network=, one of: model"):
        fit(Module(), RkspCallback(tmp_path))
    with pytest.raises(ConfigError, match=r"Module has no network 'net'; its children are: model"):
        fit(Module(), RkspCallback(tmp_path, network="net"))
    clipping = callback(tmp_path, limits=Limits(clip=(0.1, 1.0)))
    with pytest.raises(ConfigError, match=r"manual optimization clips by itself"):
        fit(Manual(), clipping)
    with pytest.raises(ConfigError, match=r"gradient_clip_algorithm is 'value'"):
        fit(Module(), clipping, gradient_clip_val=1.0, gradient_clip_algorithm="value")


def test_an_exception_leaves_no_hooks_and_the_trainer_as_it_was(tmp_path: Path) -> None:
    class Failing(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if index == 1:
                raise RuntimeError("out of luck")
            return super().training_step(batch, index)

    class Kept(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            self.clip, self.optimizer = trainer.gradient_clip_val, trainer.optimizers[0]

    module, kept = Failing(), Kept()
    limits = Limits(clip=(0.1, 1.0), learning_rate_scale=(0.1, 1.0), surprise=(0.1, 1.0))
    ControlWriter(tmp_path / "control").issue(tmp_path.name, STRONG, Reason(), clip=0.5, learning_rate_scale=0.5)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, callback(tmp_path, limits=limits), kept, gradient_clip_val=0.7)
    hooked = [m for m in module.modules() if isinstance(m, nn.Module) and (m._forward_hooks or m._forward_pre_hooks)]
    assert hooked == []
    assert kept.clip == 0.7
    assert not kept.optimizer._optimizer_step_pre_hooks


def test_a_loss_that_its_own_gradient_needs_takes_the_term_and_keeps_its_value(tmp_path: Path) -> None:
    """The gradient of a square root is made of its value, so nothing may be added to that in place."""
    losses = []

    class Root(Manual):
        def training_step(self, batch: dict[str, Tensor], _: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.model(**batch)["loss"].sqrt()
            losses.append(loss.item())
            self.manual_backward(loss)
            losses.append(loss.item())
            optimizer.step()

    module, expected = Root(), Words()
    fit(module, callback(tmp_path, kss=STRONG), count=2)
    regularizer = KSSRegularizer(expected, STRONG.alpha, STRONG.interval, STRONG.layer_fraction)
    with regularizer:
        (expected(**stacked(rows(2)))["loss"].sqrt() + regularizer.term()).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= RATE * parameter.grad
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-10, atol=1e-14)
    assert losses[0] == losses[1]
