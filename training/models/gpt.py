"""A GPT-2 style decoder (Radford et al. 2019) whose residual connections are one of those of `norms`.

Shapes: B sequences, T tokens, d = width, H heads, V = vocabulary. ``GPT.blocks`` holds the layers of the profile: each
block takes and returns the residual stream (B, T, d). `Decoder` is GPT with another sublayer in the place of the MLP;
`Block`, `Attention` and `MLP` serve the other architectures too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from rksp_core.errors import ConfigError
from training.models.arguments import check_counts
from training.models.initialization import INITIALIZATIONS, Initialization, Readout


class Decoder(nn.Module):
    """Token and position embedding, ``depth`` blocks, final norm, untied head.

    ``feed_forward`` makes the second sublayer of a block; the other arguments are those of `GPT`.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        norm: str,
        initialization: str,
        base_width: int | None,
        feed_forward: Callable[[Initialization], nn.Module],
        known: Collection[str] = INITIALIZATIONS,
    ) -> None:
        super().__init__()
        check_counts(vocabulary=vocabulary, length=length, width=width, depth=depth, heads=heads)
        start = Initialization.of(initialization, norm, depth, width, base_width, known)
        self.vocabulary, self.length = vocabulary, length
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            Block(width, start, Attention(width, heads, start), feed_forward(start)) for _ in range(depth)
        )
        self.norm = start.residual.final(width)
        self.head = Readout(width, vocabulary, start.shrink)
        start.fill(self)
        self._factors = start.learning_rate_factors(self)  # now, before the names of parametrized matrices change

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        x = self.token(input_ids) + self.position(positions)  # (B, T, d): h[0] of the paper
        for block in self.blocks:
            x = block(x)  # (B, T, d): h[l] -> h[l+1]
        return self.head(self.norm(x))  # (B, T, V)

    def learning_rate_factors(self) -> dict[str, float]:
        """Return {parameter name: factor of the learning rate}; empty except in muP."""
        return dict(self._factors)


class GPT(Decoder):
    """The decoder with an MLP.

    Parameters
    ----------
    vocabulary, length
        Number of token ids, and the longest sequence.
    width, depth, heads
        d, the number of blocks L, and attention heads (they must divide d).
    norm
        One of `training.models.norms.NORMS`.
    initialization
        One of `training.models.initialization.INITIALIZATIONS`; ``fixup`` and ``rezero`` take ``norm: no_norm``.
    base_width
        In muP, and only there: the width at which the model is that of ``published``, and whose learning rate holds at
        this width too. The number of heads stays the same over widths.

    Raises
    ------
    ConfigError
        When an argument is out of its range, or two do not go together.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        norm: str = "pre_ln",
        initialization: str = "published",
        base_width: int | None = None,
    ) -> None:
        super().__init__(
            vocabulary, length, width, depth, heads, norm, initialization, base_width, lambda start: MLP(width, start)
        )


class Block(nn.Module):
    """Attention, then a feed-forward sublayer, each joined to the residual stream by the norm's rule."""

    def __init__(self, width: int, start: Initialization, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = feed_forward
        self.join_attention = start.residual(width, start.depth)
        self.join_mlp = start.residual(width, start.depth)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = self.join_attention(x, self.attention)
        return self.join_mlp(x, self.mlp)


class Attention(nn.Module):
    """Multi-head self-attention, over the past only when ``causal``."""

    def __init__(self, width: int, heads: int, start: Initialization, *, causal: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"model.arguments.heads must divide width, got {heads} heads for width {width}; choose a divisor"
            )
        self.heads, self.causal = heads, causal
        self.scale = start.attention_scale(width, heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.inner = start.residual.inner(width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (part(x).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))  # (B, H, T, d/H)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        return self.output(self.inner(mixed.transpose(1, 2).flatten(2)))  # mixed (B, H, T, d/H)


class MLP(nn.Module):
    """Two linear maps with a GELU between them, four times as wide inside."""

    def __init__(self, width: int, start: Initialization) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.inner = start.residual.inner(4 * width)
        self.output = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.output(self.inner(functional.gelu(self.up(x), approximate="tanh")))  # (B, T, 4d) inside
