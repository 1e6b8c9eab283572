"""Associative recall (Kim et al. 2026, App. D.1): ``[k1, v1, .., kn, vn, p1, .., pm, q]``, q one of the keys.

The label is the value that followed q; the loss looks at the last position only. Deviations, where the paper is silent:
keys are drawn without repetition from the lower half of the vocabulary and values from the upper half; fillers p are
uniform over all of it, except that none repeats q, so the answer is unique. Guessing a value costs ln(V/2).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rksp_core.errors import ConfigError
from training.tasks import Batch


class AssociativeRecall:
    """Batches of the task for one seed.

    Parameters
    ----------
    vocabulary, length, pairs
        V, the sequence length T, and n; T must be at least 2 n + 1 and V at least 2 n.
    seed
        With stream and step it determines a batch completely.

    Raises
    ------
    ConfigError
        When the pairs do not fit.
    """

    inputs_name = "input_ids"
    evaluation_items = None

    def __init__(self, vocabulary: int, length: int, pairs: int, seed: int) -> None:
        if length < 2 * pairs + 1:
            raise ConfigError(
                f"task.pairs = {pairs} needs sequences of at least {2 * pairs + 1} tokens, got length {length}"
            )
        if vocabulary < 2 * pairs:
            raise ConfigError(
                f"task.pairs = {pairs} needs a vocabulary of at least {2 * pairs} tokens, got {vocabulary}"
            )
        self.vocabulary, self.length, self.pairs, self.seed = vocabulary, length, pairs, seed

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return ``size`` sequences (B, T) and their labels (B,)."""
        random = np.random.default_rng([self.seed, stream, step])
        half, n = self.vocabulary // 2, self.pairs
        keys = random.random((size, half)).argpartition(n - 1, axis=1)[:, :n]  # (B, n), distinct in each row
        values = random.integers(half, self.vocabulary, (size, n))  # (B, n)
        asked = random.integers(0, n, size)
        rows = np.arange(size)
        query, label = keys[rows, asked], values[rows, asked]  # (B,)
        filler = random.integers(0, self.vocabulary, (size, self.length - 2 * n - 1))  # (B, m)
        filler = np.where(filler == query[:, None], filler + half, filler)
        pairs = np.stack([keys, values], axis=2).reshape(size, 2 * n)  # k1, v1, k2, v2, ..
        sequences = np.concatenate([pairs, filler, query[:, None]], axis=1)
        return Batch(torch.from_numpy(sequences), torch.from_numpy(label))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy at the last position, in nats."""
        return functional.cross_entropy(logits[:, -1], targets)

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of sequences whose last position ranks the label first."""
        return (logits[:, -1].argmax(dim=-1) == targets).float().mean()
