"""Surprise clipping: no gradient enters Adam's moments at many times its usual size.

A gradient that is suddenly large meets second moments that remember small ones, and moves the weights by far more than
the learning rate: the usual way in which a run without norms blows up. Adafactor clips the update that would be made
(Shazeer & Stern 2018, arXiv:1804.04235, Sec. 6), AdamW can, too (Wortsman et al. 2023, arXiv:2304.13013, Sec. 3.4).
Here the gradient itself is clipped, before the moments, so that these do not remember the outlier either.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_surprise(optimizer: torch.optim.Optimizer, limit: float = 1.0) -> float:
    """Scale each gradient whose surprise is above the limit down to it, and return the largest surprise there was.

        surprise = root mean square over the entries of a parameter of g / (sqrt(v_hat) + eps)

    ``v_hat`` are the bias-corrected second moments before this step; 1 is usual. To be called after the backward pass
    and before ``optimizer.step()``. Parameters that have no moments yet (the first step) stay as they are; where none
    has, 0 is returned.

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
    largest = 0.0
    for group in optimizer.param_groups:
        known = [p for p in group["params"] if p.grad is not None and optimizer.state.get(p)]
        if not known:
            continue
        states = [optimizer.state[parameter] for parameter in known]
        if any("exp_avg_sq" not in state or "step" not in state for state in states):
            raise ValueError(
                f"clip_surprise needs the second moments of Adam, which {type(optimizer).__name__} does not keep; "
                "clip by the norm of the gradient"
            )
        gradients: list[Tensor] = [parameter.grad for parameter in known if parameter.grad is not None]
        # sqrt(v_hat) + eps = (sqrt(v) + eps c) / c with c = sqrt(1 - beta2^step): one pass over the entries is saved.
        corrections = [(1 - group["betas"][1] ** step) ** 0.5 for step in _steps(states)]
        usual = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_add_(usual, [group["eps"] * correction for correction in corrections])
        lengths = torch.stack(torch._foreach_norm(torch._foreach_div(gradients, usual)))
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


def _steps(states: list[dict[str, Tensor]]) -> list[float]:
    steps: list[float] = torch.stack([state["step"] for state in states]).tolist()
    return steps
