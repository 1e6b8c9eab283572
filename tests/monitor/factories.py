"""Factories for the preflight tests: what a user might point `rksp preflight` at, good and bad."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.monitor.tiny_model import Tiny

NOT_CALLABLE = 3


def tiny(width: int = 16, depth: int = 3, vocabulary: int = 32) -> nn.Module:
    return Tiny(vocabulary, width, depth)


def raises(width: int = 16) -> nn.Module:
    raise ValueError(f"width {width} is odd today")


def exits() -> nn.Module:
    raise SystemExit(1)


def text() -> str:
    return "not a module"


def flat() -> nn.Module:
    """A model without any stack of blocks."""
    return nn.Linear(4, 4)


class NoNorm(nn.Module):
    """The name says norm, but it is none: what the detection must not fall for."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def no_norm() -> nn.Module:
    model = Tiny()
    for block in model.blocks:
        block.norm = NoNorm()
    return model


def zero_branches() -> nn.Module:
    """Each branch ends in zeros (Fixup, ReZero), so each block is the identity."""
    model = Tiny()
    for block in model.blocks:
        nn.init.zeros_(block.down.weight)
        nn.init.zeros_(block.down.bias)
    return model


def not_finite() -> nn.Module:
    model = Tiny()
    nn.init.constant_(model.blocks[1].down.bias, torch.inf)
    return model


def exhausting() -> nn.Module:
    """Asks for a petabyte in its forward pass."""
    model = Tiny()
    model.blocks[0].register_forward_pre_hook(lambda *_: torch.empty(2**47))
    return model


class Hidden(Tiny):
    """Returns hidden states, not logits, from (sequences, length, width) floats."""

    def __init__(self) -> None:
        super().__init__()
        del self.embedding, self.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def hidden() -> nn.Module:
    return Hidden()


def energy(output: Tensor, batch: Tensor) -> Tensor:
    """A loss for `hidden`."""
    return (output - batch).square().mean()


def broken_loss(output: Tensor, batch: Tensor) -> Tensor:
    raise KeyError("labels")
