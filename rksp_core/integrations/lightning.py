"""The loop as a callback of Lightning's `Trainer`.

    callback = RkspCallback("runs/my-run", probe=ids, profile_every=20)
    Trainer(callbacks=[callback]).fit(module, loader)

The gradient of the KSS term joins the loss in place just before the backward pass, which is where Lightning shows it to
callbacks. The value stays: what ``training_step`` logs is the loss of the task.
"""

# ruff: noqa: ARG002 - the arguments of a callback are the Trainer's choice

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rksp_core.errors import ConfigError
from rksp_core.integrations.learning_rate import LearningRateScale
from rksp_core.integrations.loop import Loop

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f"the callback for the Lightning Trainer needs {error.name}; pip install 'rksp[lightning]'"
    ) from error


class RkspCallback(Loop, Callback):
    """Obeys a monitor at the optimizer steps of a Lightning `Trainer`, adds the KSS term, writes profiles.

    ``kss_weight``, ``kss_term`` (the last one) and ``kss_skipped_layers`` are logged with the module's own figures. An
    order's clip threshold takes the place of ``gradient_clip_val``, its factor multiplies whatever the schedulers say,
    its limit of surprise is kept last, as the optimizers step; without Adam's second moments it is rejected.
    KSS steps and the order that holds are kept in checkpoints. With automatic optimization a step is an optimizer
    step; with manual optimization it is a batch, and the term joins the first loss given to ``manual_backward`` after
    a forward pass.

    Parameters
    ----------
    run_folder, settings
        As for `rksp_core.integrations.loop.Loop`.
    network
        Dotted name, inside the LightningModule, of the model that ``training_step`` calls and the probe is for:
        ``"model"``, say. None: the LightningModule itself, by its ``forward``.

    Raises
    ------
    ConfigError
        When the training begins: no network of that name, or none is named and the module has no ``forward``; limits
        for a clip threshold although the module clips by itself (manual optimization) or by value.
    """

    def __init__(self, run_folder: str | os.PathLike[str], *, network: str | None = None, **settings: Any) -> None:
        super().__init__(run_folder, **settings)
        self._name = network
        self._network: nn.Module = nn.Identity()
        self._norm: Tensor | None = None
        self._rate: LearningRateScale | None = None
        self._clip: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the network; its weights are loaded, its processes here."""
        self._network = _network(pl_module, self._name)
        if self.limits.clip is not None:
            _refuse_to_clip(trainer, pl_module)
        self.begin(self._network, trainer.global_step, trainer.optimizers)
        self._clip = trainer.gradient_clip_val
        self._undo.callback(setattr, trainer, "gradient_clip_val", self._clip)
        if self.limits.learning_rate_scale is not None:
            self._rate = LearningRateScale(trainer.optimizers)
            self._undo.callback(self._rate.remove)
        self._apply(trainer)
        if self.profile_due(trainer.global_step):
            self.profile(self._network, trainer.global_step, first=trainer.is_global_zero)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Obey where an optimizer step begins, and switch the regularizer on for this micro-batch."""
        self._window.close()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            if self.follower.follow(trainer.global_step) is not None:
                self._apply(trainer)
        else:
            self.regularizer.steps -= 1  # the same step still: the same layers, due as before
        self._window.enter_context(self.regularizer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the term to the loss, scaled as Lightning has scaled it."""
        term = self.take_term()
        if term is None:
            return
        if pl_module.automatic_optimization:
            term = term / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        term = (term if scaler is None else scaler.scale(term)).to(loss)
        # The value stays: a module may log it, or the loss's own gradient may need it, as that of a square root does.
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(loss):
            loss.add_(term - term.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradient norm before it is clipped, where a profile wants it."""
        if self.profile_due(trainer.global_step + 1):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Switch the regularizer off, log what it did, and write a profile after the optimizer step that is due."""
        self._window.close()
        pl_module.log_dict(self.figures(), batch_size=1)
        norm, self._norm = self._norm, None
        if self.profile_due(trainer.global_step):
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            whole = None if loss is None else loss * trainer.accumulate_grad_batches
            first = trainer.is_global_zero
            self.profile(self._network, trainer.global_step, first=first, loss=whole, gradient_norm=norm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave model, optimizers and trainer as they were."""
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave them so, too, when the training fails."""
        self.end()

    def _apply(self, trainer: Trainer) -> None:
        """Set what an order sets beside the regularizer; the limits have let it through."""
        levers = self.follower.levers
        if self.limits.clip is not None:
            trainer.gradient_clip_val = self._clip if levers.clip is None else levers.clip
        if self._rate is not None:
            self._rate.factor = levers.learning_rate_scale or 1.0
        self._surprise.limit = levers.surprise


def _network(module: LightningModule, name: str | None) -> nn.Module:
    modules: dict[str, nn.Module] = dict(module.named_modules())
    children = ", ".join(child for child, _ in module.named_children()) or "none"
    if name is None:
        if type(module).forward is not LightningModule.forward:
            return module
        raise ConfigError(
            f"{type(module).__name__} has no forward, so nothing says which network to watch; name it with network=, "
            f"one of: {children}"
        )
    if name not in modules:
        raise ConfigError(f"{type(module).__name__} has no network {name!r}; its children are: {children}")
    return modules[name]


def _refuse_to_clip(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise ConfigError("limits.clip is set, but a module with manual optimization clips by itself; leave it None")
    if trainer.gradient_clip_algorithm == "value":
        raise ConfigError(
            "limits.clip bounds a gradient norm, but gradient_clip_algorithm is 'value'; leave limits.clip None, or "
            "clip by norm"
        )
