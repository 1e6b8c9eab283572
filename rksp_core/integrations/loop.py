"""What a trainer's callback does, whoever's trainer it is: obey orders, add the KSS term, write profiles."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, SupportsFloat

from torch import Tensor, nn
from torch.optim import Optimizer

from rksp_core.batch import Batch
from rksp_core.errors import ConfigError
from rksp_core.follower import ControlFollower, Rollback
from rksp_core.kss import KSSRegularizer
from rksp_core.limits import Limits
from rksp_core.orders import KSSSettings
from rksp_core.profile_writer import ProfileWriter
from rksp_core.profiling import profile_model
from rksp_core.surprise import SurpriseClip

_log = logging.getLogger(__name__)

LOWER_RATE = Limits(learning_rate_scale=(0.01, 1.0))


class Loop:
    """Keeps a model in the loop with a monitor while a trainer trains it; `begin` starts, the callbacks do the rest.

    Orders come from ``run_folder/control``, profiles go to ``run_folder/profiles``: the folder that ``rksp watch``
    is given. With KSS off and no order, nothing here changes a number of the run.

    Parameters
    ----------
    run_folder
        The folder of the run; created when a profile is written.
    run_id
        Of the orders to obey; None: the name of the folder, as the watcher has it, too.
    kss
        The regularizer until an order comes; off by default.
    limits
        What an order may set: by default KSS, and a learning rate that is lower than the trainer's own, as the shipped
        policy orders it. The clip threshold and the surprise of gradients are left alone unless limits say otherwise.
    rollback
        Takes the trainer back to a checkpoint, as `rksp_core.ControlFollower` says; None: an order that asks for it is
        told that this trainer cannot.
    probe
        A fixed batch of the model's inputs, for profiles: a tensor, a tuple, or a dict of keyword arguments.
    profile_every
        Optimizer steps between two profiles; 0 writes none.
    profile_options
        Further keyword arguments of `rksp_core.profile_model`, such as ``samples``.
    regularizer_options
        Further keyword arguments of `rksp_core.KSSRegularizer`: ``rank``, ``samples``, ``beta``, ``blocks``, ``seed``.

    Raises
    ------
    ConfigError
        When profiles are asked for without a probe.
    """

    regularizer: KSSRegularizer  # these two since `begin`
    follower: ControlFollower

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        *,
        run_id: str | None = None,
        kss: KSSSettings = KSSSettings(),  # noqa: B008 - it is frozen
        limits: Limits = LOWER_RATE,
        rollback: Rollback | None = None,
        probe: Batch | None = None,
        profile_every: int = 0,
        profile_options: dict[str, Any] | None = None,
        **regularizer_options: Any,
    ) -> None:
        if profile_every > 0 and probe is None:
            raise ConfigError(f"profile_every = {profile_every} needs a probe, got none; give a fixed batch as probe")
        self.run_folder = Path(run_folder)
        self.run_id = run_id or self.run_folder.resolve().name
        self.limits, self._rollback = limits, rollback
        self._kss, self._probe, self._every = kss, probe, profile_every
        self._profile_options, self._regularizer_options = profile_options or {}, regularizer_options
        self._begun = False
        self._kept: dict[str, Any] = {}  # a state that waits for the training to begin
        self._window, self._undo = ExitStack(), ExitStack()  # of a step, and of the training
        self._term: float | Tensor = 0.0
        self._profiled: int | None = None

    def begin(self, model: nn.Module, step: int, optimizers: Sequence[Optimizer] = ()) -> None:
        """Start on a model that is ready to train, after ``step`` updates: on its device, its weights loaded.

        ``optimizers``, their state loaded, are those whose surprise an order may limit.

        Raises
        ------
        NoBlocksError
            When no residual blocks are found; the message lists the candidates.
        """
        kss = self._kss
        self.end()  # one that an exception ended
        self._profiled = step or None  # a resumed run has that profile already
        self.regularizer = KSSRegularizer(
            model, kss.alpha, kss.interval, kss.layer_fraction, kss.gamma, **self._regularizer_options
        )
        self.regularizer.configure(kss)
        self.follower = ControlFollower(
            self.run_folder / "control",
            self.run_id,
            self.regularizer,
            self.limits,
            optimizers=optimizers,
            rollback=self._rollback,
        )
        self._surprise = SurpriseClip(() if self.limits.surprise is None else optimizers)
        self._undo.callback(self._surprise.remove)
        self._begun = True
        kept, self._kept = self._kept, {}
        if kept:
            self.regularizer.load_state_dict(kept["kss"])
            self.follower.load_state_dict(kept["control"])

    def end(self) -> None:
        """Leave the model and its trainer as they were."""
        self._window.close()
        self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON-able values."""
        if not self._begun:
            return self._kept
        return {"kss": self.regularizer.state_dict(), "control": self.follower.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was returned, as soon as the training begins."""
        self._kept = state_dict

    def take_term(self) -> Tensor | None:
        """Return the KSS term of the forward passes since the last call, None when none was due."""
        term = self.regularizer.term()
        if not term.requires_grad:
            return None
        self._term = term.detach()
        return term

    def figures(self) -> dict[str, float | Tensor]:
        """Return what a log says about KSS: the weight, the last weighted term (0 while off), layers without a term."""
        alpha = self.regularizer.settings.alpha
        skipped = float(self.regularizer.skipped_layers)
        return {"kss_weight": alpha, "kss_term": self._term if alpha > 0 else 0.0, "kss_skipped_layers": skipped}

    def profile_due(self, step: int) -> bool:
        """Whether a profile is wanted of the weights after this many updates."""
        return self._every > 0 and step % self._every == 0 and step != self._profiled

    def profile(
        self,
        model: nn.Module,
        step: int,
        *,
        first: bool,
        loss: SupportsFloat | None = None,
        gradient_norm: SupportsFloat | None = None,
    ) -> None:
        """Write a profile of the probe; trouble in it is logged, and never stops the run.

        Every process calls this. The ``first`` one writes; the others help where the weights are sharded over them.
        """
        self._profiled = step
        if not first and not _sharded(model):
            return
        try:
            assert self._probe is not None  # noqa: S101 - said in __init__
            profile = profile_model(model, self._probe, **self._profile_options)
            if first:
                writer = ProfileWriter(self.run_folder, every=self._every)
                writer.write(profile, step, loss=loss, gradient_norm=gradient_norm)
        except Exception as error:  # noqa: BLE001 - a run of days is worth more than a profile of it
            _log.warning("no profile at step %d: %s", step, error)


def _sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all processes: FSDP2 or tensor parallel (DTensor), DeepSpeed ZeRO-3, FSDP1."""
    by_parameter = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())
    return by_parameter or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
