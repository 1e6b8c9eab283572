"""The loop as a callback of Hugging Face's `Trainer`.

    callback = RkspCallback("runs/my-run", probe={"input_ids": ids}, profile_every=20)
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

A callback cannot change the loss, so the KSS term joins it where the model returns it, in a hook that is on only while
a term is due. Whatever the Trainer makes of the loss afterwards is made of the term, too; where that would change its
weight, the hook divides by it (`_share`).
"""

# ruff: noqa: ARG002 - the arguments of a callback are the Trainer's choice

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rksp_core.errors import ConfigError, ModelError
from rksp_core.integrations.learning_rate import LearningRateScale
from rksp_core.integrations.loop import Loop

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"the callback for the Hugging Face Trainer needs {error.name}; pip install 'rksp[hf]'"
    ) from error

STATE = "rksp"


class RkspCallback(Loop, TrainerCallback):
    """Obeys a monitor at the optimizer steps of a Hugging Face `Trainer`, adds the KSS term, writes profiles.

    The arguments are those of `rksp_core.integrations.loop.Loop`. ``kss_weight``, ``kss_term`` (the last one) and
    ``kss_skipped_layers`` join the Trainer's log and its history; the reporters of ``report_to`` run before other
    callbacks and do not see them. A step whose weights are profiled is logged, as the loss and the gradient norm of
    the profile are those of the log: so the loss is the mean since the previous log, KSS term included.

    An order's clip threshold takes the place of ``max_grad_norm``, its factor multiplies whatever the scheduler says,
    its limit of surprise is kept last, as the optimizer steps. An optimizer without Adam's second moments has none: an
    order of surprise is rejected.
    KSS steps and the order that holds are kept in ``trainer_state.json`` and come back with
    ``resume_from_checkpoint``.

    The Trainer tells no callback of an exception. What it ended leaves hooks, clip threshold and factor behind, until
    another training begins or `end` is called.

    Raises
    ------
    ConfigError, ModelError
        When the training begins, or at its first step: the loss is not computed by the model
        (``label_smoothing_factor``, ``compute_loss_func``), one process drives several GPUs, or a batch is split over
        processes (tensor, context or sequence parallel). A compiled model is not asked for its loss before a term is
        due.
    """

    _checked = False  # that the model returns a loss
    _rate: LearningRateScale | None = None
    _clip = 0.0  # the Trainer's own

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model; the Trainer has loaded its weights and wrapped it."""
        _refuse(args)
        self.load_state_dict(_kept(state).get(STATE, {}))
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.begin(kwargs["model"], state.global_step, [optimizer])
        self._clip = args.max_grad_norm
        self._undo.callback(setattr, args, "max_grad_norm", self._clip)
        if self.limits.learning_rate_scale is not None:
            self._rate = LearningRateScale([optimizer])
            self._undo.callback(self._rate.remove)
        self._apply(args)
        if self.profile_due(state.global_step):
            self.profile(kwargs["model"], state.global_step, first=state.is_world_process_zero)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Obey, and switch the regularizer on for the micro-batches of this step."""
        self._window.close()
        if self.follower.follow(state.global_step) is not None:
            self._apply(args)
        due = self.regularizer.due
        if due or not (self._checked or args.torch_compile):
            count = _micro_batches(args, state, kwargs["train_dataloader"])
            processes = args.world_size if args.average_tokens_across_devices else 1

            def add(module: nn.Module, _: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
                return self._added(module, named, output, _share(named, count, processes))

            handle = kwargs["model"].register_forward_hook(add, with_kwargs=True)
            self._window.callback(handle.remove)
        self._window.enter_context(self.regularizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Switch the regularizer off; keep what a checkpoint of this step needs."""
        self._window.close()
        _kept(state)[STATE] = self.state_dict()
        if self.profile_due(state.global_step):
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the log what KSS did, and write the profile of this step."""
        if not logs or "loss" not in logs:
            return
        figures = {name: float(value) for name, value in self.figures().items()}
        logs.update(figures)
        state.log_history[-1].update(figures)
        if self.profile_due(state.global_step):
            first = state.is_world_process_zero
            loss, norm = logs["loss"], logs.get("grad_norm")
            self.profile(kwargs["model"], state.global_step, first=first, loss=loss, gradient_norm=norm)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave model, optimizer and arguments as they were."""
        self.end()

    def _apply(self, args: TrainingArguments) -> None:
        """Set what an order sets beside the regularizer; the limits have let it through."""
        levers = self.follower.levers
        if self.limits.clip is not None:
            args.max_grad_norm = self._clip if levers.clip is None else levers.clip
        if self._rate is not None:
            self._rate.factor = levers.learning_rate_scale or 1.0
        self._surprise.limit = levers.surprise

    def _added(self, model: nn.Module, named: dict[str, Any], output: Any, share: float) -> Any:
        """Return the model's output, its loss with the term; a pass without gradient (generation) stays as it is."""
        if not (model.training and torch.is_grad_enabled()):
            return output
        loss = _loss_of(output)
        if loss is None:
            raise ModelError(
                f"{type(model).__name__} returned no loss for {', '.join(named) or 'its inputs'}, so the KSS term has "
                "nothing to join; let the model compute the loss (labels in the batch, no compute_loss_func), or use "
                "KSSRegularizer in a compute_loss of your own"
            )
        self._checked = True
        term = self.take_term()
        if term is None:
            return output
        total = loss + share * term.to(loss.device)
        if isinstance(output, dict):
            output["loss"] = total
            return output
        return (total, *output[1:])


def _kept(state: TrainerState) -> dict[str, Any]:
    """Return what the Trainer writes to ``trainer_state.json`` for callbacks, by name."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _refuse(args: TrainingArguments) -> None:
    """Refuse, before the first step, what cannot work."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process drives {args.n_gpu} GPUs (DataParallel), whose copies of the model have no KSS; start one "
            "process per GPU with torchrun"
        )
    if args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor = {args.label_smoothing_factor:g} computes the loss outside of the model, where "
            "the KSS term cannot join it; set it to 0"
        )
    parallel = args.parallelism_config
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
        raise ConfigError(
            "tensor, context and sequence parallel training split one batch over processes, and KSS takes each "
            "process for one with tokens of its own; use DDP or FSDP"
        )


def _loss_of(output: Any) -> Tensor | None:
    """Return the loss where the Trainer takes it: ``output["loss"]``, or the first value of a tuple."""
    loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _share(named: dict[str, Any], count: int, processes: int) -> float:
    """Return the factor that gives the term of one of ``count`` micro-batches the weight 1 / count in the end.

    Without ``num_items_in_batch`` the Trainer divides the loss by ``count`` itself. With it the model's loss is a share
    of the whole batch's already, and the Trainer multiplies it by the processes whose gradients are averaged.
    """
    return 1.0 / (count * processes) if named.get("num_items_in_batch") is not None else 1.0


def _micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Return the micro-batches of the step that begins: fewer in an epoch's last one.

    The Trainer tells no callback; this is its own count. A dataset that does not know its length may end earlier.
    """
    size = int(args.gradient_accumulation_steps)
    try:
        batches = len(dataloader)
    except TypeError:
        return size
    steps = max(-(-batches // size), 1)
    last = state.global_step % steps == steps - 1
    return batches - (steps - 1) * size if last and batches else size
