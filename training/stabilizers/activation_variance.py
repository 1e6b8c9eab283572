"""Activation-variance penalty: a block shall keep the variance of the stream (Kim et al. 2026, Table 6).

The paper leaves the form open; ours is that of a token over its d features, which is what a LayerNorm would fix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.stabilizers.penalty import Pair, Penalty, wide


class ActivationVariance(Penalty):
    """The mean over tokens of (Var h_out - Var h_in)^2, or (Var h_out - 1)^2 with target ``one``; Var over features.

    The gradient reaches the input, too: the blocks below are asked for what this one can keep.
    """

    def __init__(
        self, model: nn.Module, weight: float, *, target: Literal["input", "one"] = "input", **others: Any
    ) -> None:
        super().__init__(model, weight, **others)
        self.target = target

    def measure(self, pairs: list[Pair], loss: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mean squared deviation."""
        return torch.stack([self._deviation(*pair).square().mean() for pair in pairs]).mean()

    def _deviation(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        variance = wide(h_out).var(dim=-1, correction=0)  # (B, T)
        return variance - (wide(h_in).var(dim=-1, correction=0) if self.target == "input" else 1.0)
