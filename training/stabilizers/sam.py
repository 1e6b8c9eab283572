"""Sharpness-aware minimization (Foret et al. 2021, arXiv:2010.01412, Algorithm 1).

The step is made with the gradient at the point of highest loss nearby, w + rho g / |g|, g the gradient at w.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.ranks import whole


class SAM:
    """Moves the weights ``rho`` (above 0, in their own units) along the gradient, for a second pass.

    gradients()
    with sam.perturbed(parameters):
        optimizer.zero_grad()
        gradients()
    optimizer.step()
    """

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = rho

    @contextmanager
    def perturbed(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Hold the weights at w + rho g / |g|, and give back the same bits at the end.

        The norm is over all parameters, sharded ones included. Where the gradient is 0 or not finite there is no
        direction, and the weights stay.
        """
        moved = [(weight, weight.grad) for weight in parameters if weight.grad is not None]
        norm = float(whole(nn.utils.get_total_norm([gradient for _, gradient in moved])))
        if not 0 < norm < float("inf"):
            yield
            return
        with torch.no_grad():
            kept = [weight.clone() for weight, _ in moved]
            for weight, gradient in moved:
                weight.add_(gradient, alpha=self.rho / norm)
        try:
            yield
        finally:
            with torch.no_grad():
                for (weight, _), before in zip(moved, kept, strict=True):
                    weight.copy_(before)
