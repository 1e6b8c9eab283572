"""A GPT-2 style decoder (Radford et al. 2019) whose residual connections are one of the six of `norms`.

Shapes: B sequences, T tokens, d = width, H heads, V = vocabulary. ``GPT.blocks`` holds the layers of the profile: each
block takes and returns the residual stream (B, T, d).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rksp_core.errors import ConfigError
from training.models.norms import NORMS, Residual
from training.names import choose

INITIALIZATIONS = ("published", "gpt2", "gpt2_unscaled", "torch")


class GPT(nn.Module):
    """Token and position embedding, ``depth`` blocks, final norm, untied head.

    Parameters
    ----------
    vocabulary, length
        Number of token ids, and the longest sequence.
    width, depth, heads
        d, the number of blocks L, and attention heads (they must divide d).
    norm
        One of `training.models.norms.NORMS`.
    initialization
        ``published``: what the norm's paper prescribes (DeepNorm, SubLN), GPT-2's rule otherwise. ``gpt2``: every
        matrix N(0, 0.02^2), the two output projections of a block divided by sqrt(2L). ``gpt2_unscaled``: the same
        without the division. ``torch``: as `torch.nn` leaves them.

    Raises
    ------
    ConfigError
        When an argument is out of its range.
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
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "length": length, "width": width, "depth": depth, "heads": heads}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"model.arguments.{name} must be a whole number of at least 1, got {value!r}")
        if width % heads:
            raise ConfigError(
                f"model.arguments.heads must divide width, got {heads} heads for width {width}; choose a divisor"
            )
        choose(initialization, INITIALIZATIONS, "model.arguments.initialization")
        residual = NORMS[choose(norm, NORMS, "model.arguments.norm")]
        self.vocabulary, self.length = vocabulary, length
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, depth, heads, residual) for _ in range(depth))
        self.norm = residual.final(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        _initialize(self, initialization, depth, residual.gain(depth))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        x = self.token(input_ids) + self.position(positions)  # (B, T, d): h[0] of the paper
        for block in self.blocks:
            x = block(x)  # (B, T, d): h[l] -> h[l+1]
        return self.head(self.norm(x))  # (B, T, V)


class Block(nn.Module):
    """Attention, then MLP, each joined to the residual stream by the norm's rule."""

    def __init__(self, width: int, depth: int, heads: int, residual: type[Residual]) -> None:
        super().__init__()
        self.attention = Attention(width, heads, residual.inner(width))
        self.mlp = MLP(width, residual.inner(4 * width))
        self.join_attention = residual(width, depth)
        self.join_mlp = residual(width, depth)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = self.join_attention(x, self.attention)
        return self.join_mlp(x, self.mlp)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int, inner: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.inner = inner
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (part(x).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))  # (B, H, T, d/H)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, d/H)
        return self.output(self.inner(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear maps with a GELU between them, four times as wide inside."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.inner = inner
        self.output = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.output(self.inner(functional.gelu(self.up(x), approximate="tanh")))  # (B, T, 4d) inside


def _initialize(model: GPT, initialization: str, depth: int, gain: float | None) -> None:
    """Fill every matrix; biases become 0, norms keep gain 1 and bias 0."""
    if initialization == "torch":
        return
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            if name.endswith("bias"):
                nn.init.zeros_(weight)
        elif initialization == "published" and gain is not None and name.startswith("blocks."):
            nn.init.xavier_normal_(weight, gain=1.0 if ".query." in name or ".key." in name else gain)
        else:
            scaled = initialization != "gpt2_unscaled" and name.endswith(".output.weight")
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth) if scaled else 0.02)
