"""Associative recall (Kim et al. 2026, App. D.1): ``[k1, v1, .., kn, vn, p1, .., pm, q]``, q one of the keys.

The label is the value that followed q; the loss looks at the last position only. Deviations, where the paper is silent:
keys are drawn without repetition from the lower half of the vocabulary and values from the upper half; fillers p are
uniform over all of it, except that none repeats q, so the answer is unique. Guessing a value costs ln(V/2).

With ``queries`` above 1, which is not in the paper, the sequence ends with so many different keys ``q1, .., qk``, and
the value of each is asked for where it stands. Small models learn the task so: docs/training.md has the figures.
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
    vocabulary, length, pairs, queries
        V, the sequence length T, n, and k; T must be at least 2 n + k, V at least 2 n, and k at most n.
    seed
        With stream and step it determines a batch completely.

    Raises
    ------
    ConfigError
        When the pairs do not fit.
    """

    inputs_name = "input_ids"
    evaluation_items = None

    def __init__(self, vocabulary: int, length: int, pairs: int, seed: int, queries: int = 1) -> None:
        if queries > pairs:
            raise ConfigError(f"task.queries = {queries} needs as many pairs, got task.pairs = {pairs}; ask for fewer")
        if length < 2 * pairs + queries:
            raise ConfigError(
                f"task.pairs = {pairs} needs sequences of at least {2 * pairs + queries} tokens, got length {length}"
            )
        if vocabulary < 2 * pairs:
            raise ConfigError(
                f"task.pairs = {pairs} needs a vocabulary of at least {2 * pairs} tokens, got {vocabulary}"
            )
        self.vocabulary, self.length, self.pairs, self.queries = vocabulary, length, pairs, queries
        self.seed = seed

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return ``size`` sequences (B, T) and the labels (B, k) of their last k positions."""
        random = np.random.default_rng([self.seed, stream, step])
        half, n, k = self.vocabulary // 2, self.pairs, self.queries
        keys = random.random((size, half)).argpartition(n - 1, axis=1)[:, :n]  # (B, n), distinct in each row
        values = random.integers(half, self.vocabulary, (size, n))  # (B, n)
        first = random.integers(0, n, (size, 1))
        filler = random.integers(0, self.vocabulary, (size, self.length - 2 * n - k))  # (B, m)
        others = random.random((size, n - 1)).argsort(axis=1)[:, : k - 1] + 1  # from the first one on, in any order
        asked = np.concatenate([first, (first + others) % n], axis=1)  # (B, k), distinct in each row
        query, label = (np.take_along_axis(part, asked, axis=1) for part in (keys, values))  # (B, k)
        filler = np.where((filler[:, :, None] == query[:, None]).any(axis=2), filler + half, filler)
        pairs = np.stack([keys, values], axis=2).reshape(size, 2 * n)  # k1, v1, k2, v2, ..
        sequences = np.concatenate([pairs, filler, query], axis=1)
        return Batch(torch.from_numpy(sequences), torch.from_numpy(label))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy at the last k positions, in nats."""
        return functional.cross_entropy(logits[:, -self.queries :].flatten(0, 1), targets.flatten())

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of the last k positions that rank the label first."""
        return (logits[:, -self.queries :].argmax(dim=-1) == targets).float().mean()
