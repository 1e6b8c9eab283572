"""Ways to join a sublayer f (attention or MLP) to the residual stream x: six as published, and what stands beside them.

    no_norm   x + f(x)                       no normalization anywhere
    pre_ln    x + f(LN(x))                   Xiong et al. 2020, arXiv:2002.04745; Radford et al. 2019 (GPT-2)
    post_ln   LN(x + f(x))                   Vaswani et al. 2017, arXiv:1706.03762
    rmsnorm   x + f(RMS(x))                  Zhang and Sennrich 2019, arXiv:1910.07467, placed as in Pre-LN
    deepnorm  LN(alpha x + f(x))             Wang et al. 2022a, arXiv:2203.00555, Fig. 2, decoder-only row
    subln     x + W_out LN(g(LN(x)))         Wang et al. 2022b, arXiv:2210.06423, Fig. 2, decoder-only row;
                                             g is the sublayer before its output projection W_out

    deepnorm_pre_ln   alpha x + f(LN(x))     no published method; see `DeepNormPreLN`

DeepNorm and SubLN are more than a place for a LayerNorm: their papers also prescribe how the projections are
initialized, which `Residual.gain` tells. Two initializations, in turn, replace the norms by scalars (L blocks, two
sublayers each):

    fixup     x + m f(x + b)                 Zhang et al. 2019, arXiv:1901.09321
    rezero    x + a f(x)                     Bachlechner et al. 2020, arXiv:2003.04887, Eq. 1
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

EPSILON = 1e-5  # GPT-2's, for every norm here

Sublayer = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """One residual connection of a stack that is ``depth`` blocks deep; this base class is No-Norm itself."""

    def __init__(self, width: int, depth: int) -> None:  # noqa: ARG002 - all share one signature
        super().__init__()

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:  # (batch, length, width) -> the same
        return x + sublayer(x)

    @staticmethod
    def inner(width: int) -> nn.Module:  # noqa: ARG004
        """Return the norm inside a sublayer, in front of its output projection."""
        return nn.Identity()

    @staticmethod
    def final(width: int) -> nn.Module:  # noqa: ARG004
        """Return the norm between the last block and the head."""
        return nn.Identity()

    @staticmethod
    def gain(depth: int) -> float | None:  # noqa: ARG004
        """Return the Xavier gain of the value, output and MLP matrices (query and key: 1); None: GPT-2's rule."""
        return None


class NoNorm(Residual):
    """``x + f(x)``."""


class PreLN(Residual):
    """``x + f(LN(x))``, and a LayerNorm in front of the head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + sublayer(self.norm(x))

    @staticmethod
    def final(width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=EPSILON)


class PostLN(Residual):
    """``LN(x + f(x))``; the stream leaves the last block normalized, so the head needs no norm of its own."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(x + sublayer(x))


class RMSNorm(Residual):
    """``x + f(RMS(x))``, RMS(x) = g x / sqrt(mean(x^2) + eps): no mean is subtracted, there is no bias."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.norm = nn.RMSNorm(width, eps=EPSILON)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + sublayer(self.norm(x))

    @staticmethod
    def final(width: int) -> nn.Module:
        return nn.RMSNorm(width, eps=EPSILON)


class DeepNorm(PostLN):
    """``LN(alpha x + f(x))`` with alpha = (2L)^(1/4) and gain (8L)^(-1/4), L blocks."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.alpha = (2 * depth) ** 0.25

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(self.alpha * x + sublayer(x))

    @staticmethod
    def gain(depth: int) -> float | None:
        return (8 * depth) ** -0.25


class DeepNormPreLN(PreLN):
    """``alpha x + f(LN(x))`` with DeepNorm's alpha = (2L)^(1/4), and a LayerNorm in front of the head.

    No published method: the stream grows by alpha with every sublayer. It is here because it alone fits the row that
    Kim et al. 2026, Table 1 calls DeepNorm (near-unit mass 0.00, expansive mass 1.00, rho 3.94): at d = 256, L = 6 we
    measured 0.00, 1.00, 3.8 (0.00, 0.99, 4.5 with ``gpt2_unscaled``), and 0.83, 0.17, 7.3 for the published form.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.alpha = (2 * depth) ** 0.25

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.alpha * x + sublayer(self.norm(x))


class SubLN(PreLN):
    """Pre-LN with a second LayerNorm in front of each output projection, and gain sqrt(log 2L) (Magneto)."""

    @staticmethod
    def inner(width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=EPSILON)

    @staticmethod
    def gain(depth: int) -> float | None:
        return math.sqrt(math.log(2 * depth))


NORMS: dict[str, type[Residual]] = {
    "no_norm": NoNorm,
    "pre_ln": PreLN,
    "post_ln": PostLN,
    "rmsnorm": RMSNorm,
    "deepnorm": DeepNorm,
    "subln": SubLN,
    "deepnorm_pre_ln": DeepNormPreLN,
}


class Fixup(Residual):
    """``x + m f(x + b)`` with learned scalars m = 1, b = 0, and another b in front of the output projection.

    The paper puts a scalar bias in front of every linear map and activation. Query, key and value read the same input
    and share one; the one in front of GELU is left out, as `up` has a vector of biases that contains it.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.shift = Shift()
        self.multiplier = nn.Parameter(torch.ones(1))  # FSDP shards no scalars, hence one element

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.multiplier * sublayer(self.shift(x))

    @staticmethod
    def inner(width: int) -> nn.Module:  # noqa: ARG004
        return Shift()


class Shift(nn.Module):
    """``x + b`` with a learned scalar b = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class ReZero(Residual):
    """``x + a f(x)`` with a learned scalar a = 0 for each sublayer; the paper's Transformer has one for a block."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.multiplier = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.multiplier * sublayer(x)

    @staticmethod
    def gain(depth: int) -> float | None:  # noqa: ARG004
        return 1.0
