"""Surprise clipping: no gradient enters Adam's moments at many times its usual size.

A gradient that is suddenly large meets second moments that remember small ones, and moves the weights by far more than
the learning rate: the usual way in which a run without norms blows up. Adafactor clips the update that would be made
(Shazeer & Stern 2018, arXiv:1804.04235, Sec. 6), AdamW can, too (Wortsman et al. 2023, arXiv:2304.13013, Sec. 3.4).
Here the gradient itself is clipped, before the moments, so that these do not remember the outlier either.

    clip_surprise(optimizer, limit)       # in a loop of your own, before `optimizer.step()`
    clip = SurpriseClip([optimizer])      # in somebody else's: whenever the optimizer steps, once clip.limit is set
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

_KIN = (Adam, AdamW, NAdam, RAdam)


def clip_surprise(optimizer: Optimizer, limit: float = 1.0) -> float:
    """Scale each gradient whose surprise is above the limit down to it, and return the largest surprise there was.

        surprise = root mean square over the entries of a parameter of g / (sqrt(v_hat) + eps)

    ``v_hat`` are the bias-corrected second moments before this step; 1 is usual. To be called after the backward pass
    and before ``optimizer.step()``. Parameters that have no moments yet (the first step) stay as they are; where none
    has, 0 is returned. A parameter that is sharded over processes (DTensor) counts as a whole; all of them call this.
    Gradients that a fused optimizer is going to unscale itself (``optimizer.grad_scale``) are judged as unscaled.

    Parameters
    ----------
    optimizer
        Adam or its kin: ``betas`` and ``eps`` in its groups, ``exp_avg_sq`` and ``step`` in its state.
    limit
        Above 0.

    Raises
    ------
    ValueError
        When the limit is not above 0, or the optimizer keeps no second moments.
    """
    if not limit > 0:
        raise ValueError(f"the limit of surprise must be above 0, got {limit}")
    largest, scale = 0.0, getattr(optimizer, "grad_scale", None)
    for group in optimizer.param_groups:
        known = [p for p in group["params"] if p.grad is not None and optimizer.state.get(p)]
        if not known:
            continue
        states = [optimizer.state[parameter] for parameter in known]
        if not _is_kin(group, states):
            raise ValueError(_none_kept(optimizer))
        gradients: list[Tensor] = [parameter.grad for parameter in known if parameter.grad is not None]
        # sqrt(v_hat) + eps = (sqrt(v) + eps c) / c with c = sqrt(1 - beta2^step): one pass over the entries is saved.
        corrections = [(1 - group["betas"][1] ** step) ** 0.5 for step in _steps(states)]
        usual = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_add_(usual, [group["eps"] * correction for correction in corrections])
        lengths = _whole(torch.stack(torch._foreach_norm(torch._foreach_div(gradients, usual))))
        if scale is not None:
            lengths = lengths / scale
        sizes = [max(gradient.numel(), 1) ** -0.5 for gradient in gradients]
        surprises = [
            length * correction * size
            for length, correction, size in zip(lengths.tolist(), corrections, sizes, strict=True)
        ]
        for gradient, surprise in zip(gradients, surprises, strict=True):
            if surprise > limit:
                gradient.mul_(limit / surprise)
        largest = max(largest, *surprises)
    return largest


def obstacle(optimizer: Optimizer) -> str | None:
    """Return why `clip_surprise` is not for this optimizer, as part of a sentence; None when it is.

    An optimizer other than torch's own Adam and its kin shows its moments from its first step on; before, it is not.
    """
    for group in optimizer.param_groups:
        states = [optimizer.state[parameter] for parameter in group["params"] if optimizer.state.get(parameter)]
        if not _is_kin(group, states):
            return _none_kept(optimizer)
    if not optimizer.state and not isinstance(optimizer, _KIN):
        return f"{_NEEDED}, which {type(optimizer).__name__} does not show before its first step"
    return None


class SurpriseClip:
    """Clips the surprise of optimizers to ``limit`` whenever they step; None leaves all as it is.

    That comes last before the update, after whatever the trainer does to gradients: unscaling, clipping, a closure.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.limit: float | None = None
        self._handles = [optimizer.register_step_pre_hook(self._clip) for optimizer in optimizers]

    def remove(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()

    def _clip(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        limit = self.limit
        if limit is None:
            return None
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            clip_surprise(optimizer, limit)
            return None

        def clipped() -> Any:  # the gradients are there when the closure has made them
            loss = closure()
            clip_surprise(optimizer, limit)
            return loss

        return (optimizer,), {**kwargs, "closure": clipped}


_NEEDED = "surprise clipping needs the second moments of Adam"


def _none_kept(optimizer: Optimizer) -> str:
    return f"{_NEEDED}, which {type(optimizer).__name__} does not keep; clip by the norm of the gradient"


def _is_kin(group: dict[str, Any], states: list[dict[str, Any]]) -> bool:
    return {"betas", "eps"} <= group.keys() and all(
        "exp_avg_sq" in state and isinstance(state.get("step"), Tensor) for state in states
    )


def _steps(states: list[dict[str, Tensor]]) -> list[float]:
    steps: list[float] = torch.stack([state["step"] for state in states]).tolist()
    return steps


def _whole(value: Tensor) -> Tensor:
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
