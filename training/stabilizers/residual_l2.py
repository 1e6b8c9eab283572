"""Random L2 on residuals: the update of a block, made small (an ablation arm of Kim et al. 2026, Table 6).

The paper gives no formula; ours is the mean square of the update, whatever its spectrum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.stabilizers.penalty import Pair, Penalty, wide


class ResidualL2(Penalty):
    """The mean of (h_out - h_in)^2 over entries, tokens and the blocks drawn."""

    def measure(self, pairs: list[Pair], loss: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mean square."""
        return torch.stack([(wide(h_out) - wide(h_in)).square().mean() for h_in, h_out in pairs]).mean()
