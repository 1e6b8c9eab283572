"""What says more of a coming run than its spectrum at the start: learning rate x depth, and a look-ahead.

Scores, not probabilities: nothing here is calibrated. The look-ahead takes a few full-rate steps on a copy of the
model; it needs a loss, next-token cross-entropy by default.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rksp_core.profile import ModelProfile

if TYPE_CHECKING:
    from torch import nn

    from rksp_core.batch import Batch
    from rksp_core.lookahead import LookAhead
    from rksp_monitor.models import LoadedModel
    from rksp_monitor.preflight import Settings

Progress = Callable[[int, int, str], None]
Loss = Callable[[Any, Any], Any]

STEPS = 5  # of a look-ahead, where nothing says how many
_IGNORED = -100  # no target


def baseline_scores(
    profile: ModelProfile, settings: Settings, standard: float | None, ahead: LookAhead | str | None
) -> dict[str, Any]:
    """Return the scores that say more than a spectrum does, uncalibrated, for the report."""
    rate = settings.learning_rate
    depth = settings.depth or len(profile.layers)
    return {
        "calibrated": False,
        "learning_rate": rate,
        "standard_learning_rate": standard,
        "optimizer": settings.optimizer,
        "beta2": settings.beta2,
        "depth": depth,
        "learning_rate_times_depth": None if rate is None else rate * depth,
        "near_unit_mass": profile.summary["near_unit_mass"]["mean"],
        "look_ahead": _look_ahead_document(ahead),
    }


def _look_ahead_document(ahead: LookAhead | str | None) -> dict[str, Any]:
    if ahead is None or isinstance(ahead, str):
        return {"available": False, "reason": ahead or "no learning rate was given; --lr adds a look-ahead"}
    largest = largest_loss(ahead)
    return {
        "available": True,
        "reason": None,
        "steps": ahead.steps,
        "finite": ahead.finite,
        "losses": list(ahead.losses),
        "largest_loss": largest if largest is not None and math.isfinite(largest) else None,
        "gradient_norms": list(ahead.gradient_norms),
        "hidden_rms_before": ahead.hidden_rms_before,
        "hidden_rms_after": ahead.hidden_rms_after,
        "summary_after": None if ahead.profile is None else ahead.profile.summary,
    }


def take_look_ahead(
    model: LoadedModel,
    module: nn.Module,
    batch: Batch,
    settings: Settings,
    profile: Callable[[nn.Module], ModelProfile] | None,
    progress: Progress | None,
) -> LookAhead | str | None:
    """Return the look-ahead, the reason why there is none, or None when none was asked for."""
    from rksp_core.lookahead import look_ahead, make_optimizer
    from rksp_monitor.models import user_code

    rate, steps = settings.learning_rate, settings.steps or STEPS
    if rate is None:
        return None
    loss = settings.loss
    if loss is None:
        reason = _no_next_token_loss(model, module, batch)
        if reason:
            return reason
        loss = next_token_loss
    with user_code("the look-ahead"):
        return look_ahead(
            module,
            batch,
            _counted(loss, steps, progress),
            learning_rate=rate,
            optimizer=lambda moved: make_optimizer(settings.optimizer, moved, rate, settings.beta2),
            steps=steps,
            seed=settings.seed,
            blocks=settings.blocks,
            profile=profile,
        )


def _counted(loss: Loss, steps: int, progress: Progress | None) -> Loss:
    """Return the loss that also reports each step of the look-ahead, which takes one loss a step."""
    if progress is None:
        return loss
    done = itertools.count(1)

    def counted(output: Any, batch: Any) -> Any:
        progress(next(done), steps, "look-ahead")
        return loss(output, batch)

    return counted


def _no_next_token_loss(model: LoadedModel, module: nn.Module, batch: Batch) -> str:
    """Say why next-token cross-entropy cannot be had, after a look at the output for one sequence; "" when it can."""
    from torch import Tensor

    from rksp_core.batch import call, part
    from rksp_core.untouched import evaluating
    from rksp_monitor.models import user_code

    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        return "the probe holds no tokens; give a loss with --loss module:function"
    with evaluating(module), user_code("the model's output layer"):
        logits = _logits(call(module, part(batch, 0, 1)))
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape == (1, tokens.shape[1], model.vocabulary):
        return ""
    vocabulary = model.vocabulary if model.vocabulary is not None else "unknown"
    return (
        f"the model returns {shape}, no logits over the vocabulary ({vocabulary}) for each token; "
        "give a loss with --loss module:function"
    )


def largest_loss(ahead: LookAhead | str | None) -> float | None:
    """Return the largest loss of the look-ahead: infinite when it blew up, None when there was none."""
    if ahead is None or isinstance(ahead, str):
        return None
    losses = [loss for loss in ahead.losses if loss is not None]
    return max(losses, default=math.inf) if ahead.finite else math.inf


def next_token_loss(output: Any, batch: Any) -> Any:
    """Return the mean cross-entropy of predicting each next token; padding (``attention_mask`` 0) does not count."""
    import torch
    from torch.nn import functional

    tokens = batch if not isinstance(batch, Mapping) else batch["input_ids"]
    mask = None if not isinstance(batch, Mapping) else batch.get("attention_mask")
    targets = torch.full_like(tokens, _IGNORED)
    targets[:, :-1] = tokens[:, 1:] if mask is None else tokens[:, 1:].masked_fill(mask[:, 1:] == 0, _IGNORED)
    # The last position is ignored instead of cut off: a slice of the logits, the largest tensor of all, is a copy.
    return functional.cross_entropy(_logits(output).flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED)


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
