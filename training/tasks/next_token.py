"""Language modelling: the loss and the accuracy of predicting each next token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NOT_ASKED = -100  # a target that is not counted: `torch.nn.functional.cross_entropy` knows it by this number


class NextToken:
    """Targets (B, T) are the tokens that follow the inputs (B, T), or `NOT_ASKED` where none does."""

    inputs_name = "input_ids"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token; its exponential is the perplexity."""
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_ASKED)

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of tokens that the logits (B, T, V) before them rank first."""
        asked = targets != NOT_ASKED
        right = (logits.argmax(dim=-1) == targets) & asked
        return right.sum(dtype=torch.float32) / asked.sum()
