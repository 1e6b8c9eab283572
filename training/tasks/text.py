"""Language modelling on any text: random windows of its tokens, its end held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rksp_core.errors import ConfigError
from training.tasks import EVALUATION, PROBE, TRAINING, Batch
from training.tasks.next_token import NextToken
from training.tasks.tokenizer import read_tokenizer
from training.tasks.tokens import read_tokens


class Text(NextToken):
    """Windows of T + 1 tokens, T inputs and the T that follow them, at random places of a text.

    Training sees the text's beginning only. The rest is held out: its first eighth (a window at least) for the probe,
    what follows for the evaluation, so that no window of one shares a token with a window of another.

    Parameters
    ----------
    path, suffix, separator, tokenizer, cache
        Which text, and which tokens: see `training.tasks.tokens.read_tokens` and `training.tasks.tokenizer`.
    validation
        Another text that is held out instead of the end of this one; None: ``held_out`` of this one.
    held_out
        Share of the tokens that is held out, in (0, 1).
    vocabulary, length
        The number of ids that the model knows, at least the tokenizer's; and T.
    seed
        With stream and step it determines a batch completely.

    Raises
    ------
    ConfigError
        When there is no text, no tokenizer, too small a vocabulary, or a part of the text is shorter than a window.
    """

    evaluation_items = None

    def __init__(
        self,
        path: str,
        suffix: str,
        separator: str,
        tokenizer: str,
        validation: str | None,
        held_out: float,
        cache: str | None,
        vocabulary: int,
        length: int,
        seed: int,
    ) -> None:
        encoder = read_tokenizer(tokenizer)
        if encoder.ids > vocabulary:
            raise ConfigError(
                f"the tokenizer {tokenizer} has {encoder.ids} ids, the model {vocabulary}; "
                f"set model.arguments.vocabulary to {encoder.ids}"
            )
        where = Path(cache) if cache else None
        tokens = read_tokens(Path(path), suffix, separator, encoder, where)
        if validation is None:
            first = len(tokens) - round(held_out * len(tokens))
            tokens, others = tokens[:first], tokens[first:]
        else:
            others = read_tokens(Path(validation), suffix, separator, encoder, where)
        probed = max(length + 1, len(others) // 8)
        self.parts = {TRAINING: tokens, PROBE: others[:probed], EVALUATION: others[probed:]}
        self.length, self.seed = length, seed
        if len(tokens) <= length:
            raise ConfigError(
                f"{path} has {len(tokens)} tokens to train on, a window needs {length + 1}; "
                "give a longer text or a smaller length"
            )
        if len(self.parts[EVALUATION]) <= length:
            raise ConfigError(
                f"{validation or path} has {len(others)} tokens to hold out, the probe and the evaluation need a "
                f"window of {length + 1} each; give a longer text, a smaller length or more of it (task.held_out)"
            )

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return ``size`` windows (B, T), and each token's successor (B, T)."""
        tokens = self.parts[stream]
        random = np.random.default_rng([self.seed, stream, step])
        begin = random.integers(len(tokens) - self.length, size=(size, 1))
        places = begin + np.arange(self.length)  # (B, T)
        inputs, targets = (torch.from_numpy(tokens[each].astype(np.int64)) for each in (places, places + 1))
        return Batch(inputs, targets)
