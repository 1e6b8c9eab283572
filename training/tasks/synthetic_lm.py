"""The synthetic language of Kim et al. 2026, App. D.2: what can be predicted from the context, amid noise.

A sequence of T = 256 ids out of {10..V-1}, V = 10 000, is a row of segments, cut at T: a repetition (a pattern of 2-5
tokens, 2-4 times), a run of 5-15 consecutive ids, or 5-15 independent tokens. There are 20 000 training and 2 000
validation sequences, and number i of either is a function of (seed, split, i), so nothing is stored. What the paper
leaves open is chosen so: the three kinds are equally likely, every range is uniform and includes both ends, patterns
may repeat a token, a run ends at V - 1 at the latest (it does not wrap), and the last of the T tokens is a target only.
"""

from __future__ import annotations

import numpy as np
import torch

from rksp_core.errors import ConfigError
from training.tasks import TRAINING, Batch
from training.tasks.epochs import chosen
from training.tasks.next_token import NOT_ASKED, NextToken

FIRST_ID = 10
PATTERN, REPEATS, LENGTH = (2, 5), (2, 4), (5, 15)
REPETITION, RUN, NOISE = range(3)


class SyntheticLM(NextToken):
    """Batches of the language for one seed.

    Training goes through the training sequences epoch by epoch; EVALUATION takes the validation sequences in turn, and
    PROBE as many others, made the same way.

    Parameters
    ----------
    vocabulary, length
        V, at least 25, so that a run of 15 fits above 9; and T, at least 2.
    training_sequences, validation_sequences
        How many there are of each.
    seed
        With the split and the number i it determines a sequence.

    Raises
    ------
    ConfigError
        When vocabulary or length is too small.
    """

    def __init__(
        self, vocabulary: int, length: int, training_sequences: int, validation_sequences: int, seed: int
    ) -> None:
        smallest = FIRST_ID + LENGTH[1]
        if vocabulary < smallest:
            raise ConfigError(f"task synthetic_lm needs a vocabulary of at least {smallest} tokens, got {vocabulary}")
        if length < 2:
            raise ConfigError(f"task synthetic_lm needs sequences of at least 2 tokens, got length {length}")
        self.vocabulary, self.length, self.seed = vocabulary, length, seed
        self.training_sequences, self.evaluation_items = training_sequences, validation_sequences

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return ``size`` sequences (B, T), and each token's successor (B, T)."""
        if stream == TRAINING:
            numbers = chosen(self.training_sequences, self.seed, step, size)
        else:
            numbers = (step * size + np.arange(size)) % self.evaluation_items
        inputs = torch.from_numpy(np.stack([self.sequence(stream, int(number)) for number in numbers]))
        targets = torch.full_like(inputs, NOT_ASKED)
        targets[:, :-1] = inputs[:, 1:]
        return Batch(inputs, targets)

    def sequence(self, split: int, number: int) -> np.ndarray:
        """Return one sequence (T,); the splits are TRAINING, EVALUATION (validation) and PROBE."""
        random = np.random.default_rng([self.seed, split, number])
        segments = self.length // (PATTERN[0] * REPEATS[0]) + 1  # S: as many as the shortest ones that would fill it
        kind = random.integers(3, size=segments)  # (S,), like all that is drawn for each segment
        pattern = _within(random, PATTERN, segments)
        repeats, other = _within(random, REPEATS, segments), _within(random, LENGTH, segments)
        size = np.where(kind == REPETITION, pattern * repeats, other)
        first = random.integers(FIRST_ID, self.vocabulary - np.where(kind == RUN, size, 1) + 1)
        noise = random.integers(FIRST_ID, self.vocabulary, self.length)  # (T,), where patterns come from too
        begin = size.cumsum() - size
        segment = np.repeat(np.arange(segments), size)[: self.length]  # (T,): which segment a place belongs to
        offset = np.arange(self.length) - begin[segment]
        repeated = noise[begin[segment] + offset % pattern[segment]]
        return np.choose(kind[segment], [repeated, first[segment] + offset, noise])


def _within(random: np.random.Generator, ends: tuple[int, int], count: int) -> np.ndarray:
    return random.integers(ends[0], ends[1], count, endpoint=True)
