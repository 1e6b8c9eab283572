"""A few optimizer steps at the full learning rate, on a copy of the model, and where they lead.

A spectrum at initialization cannot know the learning rate. The look-ahead can: hidden-state RMS after three Adam steps
ranked divergence within one norm with AUROC .94 where near-unit mass alone was chance. Its figures are scores, not
probabilities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rksp_core import batch as batches
from rksp_core.capture import find_blocks, stream_of, stream_out, uncompiled
from rksp_core.errors import ConfigError, ModelError
from rksp_core.profile import ModelProfile, finite_or_none
from rksp_core.untouched import random_state_kept

OptimizerName = Literal["adamw", "adam", "lion", "sgd"]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Loss = Callable[[Any, batches.Batch], Tensor]
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d)


@dataclass(frozen=True)
class LookAhead:
    """What happened in the look-ahead.

    Attributes
    ----------
    steps
        Steps looked at: fewer than asked when the loss or the gradient was no longer finite, the last one not taken.
    losses, gradient_norms
        One figure a step, before that step; None where it was not finite.
    hidden_rms_before, hidden_rms_after
        Root mean square of the last block's output; None where it is not finite.
    profile
        The profile of the moved copy, when one was asked for.
    finite
        Whether everything stayed finite.
    normalized
        Whether the blocks hold a normalization (`has_norm`).
    """

    steps: int
    losses: tuple[float | None, ...]
    gradient_norms: tuple[float | None, ...]
    hidden_rms_before: float | None
    hidden_rms_after: float | None
    profile: ModelProfile | None
    finite: bool
    normalized: bool


def look_ahead(
    model: nn.Module,
    batch: batches.Batch,
    loss: Loss,
    *,
    learning_rate: float,
    optimizer: OptimizerName | MakeOptimizer = "adamw",
    steps: int = 5,
    seed: int = 0,
    blocks: str | None = None,
    profile: Callable[[nn.Module], ModelProfile] | None = None,
) -> LookAhead:
    """Take ``steps`` steps at the full ``learning_rate`` on a copy, without warm-up; the model itself is untouched.

    Parameters
    ----------
    batch
        The batch of every step.
    loss
        (model output, batch) -> scalar.
    optimizer
        ``adamw`` or ``adam`` (torch's defaults), ``lion`` (lion-pytorch's), ``sgd`` with momentum 0.9, or a function
        that makes the run's own for the copy; its groups get ``learning_rate``, times their ``factor`` where they have
        one (muP).
    seed
        Of dropout and the like; the random state is restored.
    profile
        Profiles the moved copy; called only when everything stayed finite.

    Raises
    ------
    ConfigError
        When the optimizer is unknown or the learning rate is not positive.
    ModelError
        When the loss is no scalar with a gradient.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(f"the learning rate must be positive, got {learning_rate}")
    with random_state_kept(), torch.enable_grad():
        torch.manual_seed(seed)
        moved = copy.deepcopy(uncompiled(model)).train().requires_grad_()
        if callable(optimizer):
            stepper = optimizer(moved)
            for group in stepper.param_groups:
                group["lr"] = learning_rate * group.get("factor", 1.0)
        else:
            stepper = make_optimizer(optimizer, moved, learning_rate)
        device = next((p.device for p in moved.parameters()), torch.device("cpu"))
        batch = batches.to_device(batch, device)
        stack = [block.module for block in find_blocks(moved, blocks)]
        last = stack[-1]
        before = _hidden_rms(moved, last, batch)
        losses: list[float | None] = []
        norms: list[float | None] = []
        for _ in range(steps):
            stepper.zero_grad(set_to_none=True)
            value: object = loss(batches.call(moved, batch), batch)
            if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
                raise ModelError("the loss must be a scalar tensor with a gradient; return a mean over the batch")
            value.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.get_total_norm([p.grad for p in moved.parameters() if p.grad is not None])
            losses.append(finite_or_none(value.item()))
            norms.append(finite_or_none(norm.item()))
            if losses[-1] is None or norms[-1] is None:
                break
            stepper.step()
        after = _hidden_rms(moved, last, batch)
        finite = after is not None and None not in losses and None not in norms
        return LookAhead(
            steps=len(losses),
            losses=tuple(losses),
            gradient_norms=tuple(norms),
            hidden_rms_before=before,
            hidden_rms_after=after,
            profile=profile(moved) if profile is not None and finite else None,
            finite=finite,
            normalized=has_norm(stack),
        )


def has_norm(blocks: Iterable[nn.Module]) -> bool:
    """Return whether a block holds a normalization: of torch, or of a class called ``..LayerNorm`` or ``..RMSNorm``."""
    return any(
        isinstance(module, _NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        for block in blocks
        for module in block.modules()
    )


def make_optimizer(
    name: str, model: nn.Module, learning_rate: float, beta2: float | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer called ``name`` over the model's parameters.

    ``beta2``, in [0, 1), replaces the second coefficient of Adam's or Lion's running averages; None: .999 and .99.

    Raises
    ------
    ConfigError
        When the name is unknown, Lion's package is missing, or ``beta2`` is out of its range or given to SGD.
    """
    if beta2 is not None and (name == "sgd" or not 0 <= beta2 < 1):
        raise ConfigError(f"beta2 belongs to adamw, adam or lion and lies in [0, 1), got {beta2} for {name}")
    if name in ("adamw", "adam"):
        adam = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.999 if beta2 is None else beta2))
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    if name == "lion":
        try:
            from lion_pytorch import Lion
        except ImportError as error:
            raise ConfigError("the optimizer lion needs lion-pytorch; pip install 'rksp[lion]'") from error
        found: torch.optim.Optimizer = Lion(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.99 if beta2 is None else beta2)
        )
        return found
    raise ConfigError(f"the optimizer must be one of {', '.join(get_args(OptimizerName))}, got {name!r}")


def _hidden_rms(model: nn.Module, block: nn.Module, batch: batches.Batch) -> float | None:
    found: list[float] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        h_in = stream_of(args, kwargs)
        h_out = None if h_in is None else stream_out(output, h_in.shape)
        if h_out is not None:
            found.append(float(h_out.double().square().mean().sqrt()))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            batches.call(model, batch)
    finally:
        handle.remove()
    return finite_or_none(found[0]) if found else None
