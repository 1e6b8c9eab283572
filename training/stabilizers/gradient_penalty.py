"""Gradient penalty: double backpropagation (Drucker and LeCun 1992) at the embedding output.

Kim et al. 2026 say "gradient penalty 0.1" (Table 4) and no more. We take the gradient of the task loss with respect to
h[0], the input of the first block: ids have no gradient, and h[0] is where the residual stream begins. Their overhead
of 6.4 % means that they, too, did not take it at every step: it costs a second backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rksp_core.capture import Block
from training.stabilizers.penalty import Pair, Penalty, wide


class GradientPenalty(Penalty):
    """The mean over the B sequences of |d l_b / d h[0]_b|^2, l_b the loss of sequence b.

    The loss is the mean of the l_b, so this is B |d loss / d h[0]|^2, which does not depend on how a batch is divided
    among processes and micro-batches (where sequences do not interact).
    """

    twice = True

    def measure(self, pairs: list[Pair], loss: Tensor) -> Tensor:
        """Return the mean squared norm; ``loss`` must be a mean over the sequences."""
        h_in, _ = pairs[0]  # (B, T, d)
        (slope,) = torch.autograd.grad(loss, h_in, create_graph=True)
        return len(h_in) * wide(slope).square().sum()

    def _chosen(self) -> list[Block]:
        return self._blocks[:1]
