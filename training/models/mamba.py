"""Mamba (Gu and Dao 2023, arXiv:2312.00752): blocks of a selective state space model, no attention.

Shapes: B sequences, T tokens, d = width, e = expansion d channels inside, N = state numbers a channel, V = vocabulary.
``Mamba.blocks`` holds the layers of the profile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.models.arguments import check_counts
from training.models.norms import NORMS, Residual
from training.models.scan import scan
from training.names import choose

# DeepNorm's and SubLN's constants are derived for blocks of attention and MLP.
RESIDUALS = ("pre_ln", "rmsnorm", "post_ln", "no_norm")

STEP_RANGE = (1e-3, 0.1)  # the step sizes delta at the start, log-uniform (Sec. 3.6)


class Mamba(nn.Module):
    """Token embedding, ``depth`` blocks ``x + mixer(norm(x))``, final norm, untied head; no positions.

    The matrices start as in the authors' code: the mixer's as `torch.nn` leaves them, its output projection divided by
    sqrt(L), embedding and head N(0, 0.02^2).

    Parameters
    ----------
    vocabulary, length
        Number of token ids, and the longest sequence of the task; nothing in the model depends on ``length``.
    width, depth
        d and the number of blocks.
    state, expansion, kernel
        N, e / d, and how many tokens the convolution sees.
    norm
        One of `RESIDUALS`; the paper's is ``rmsnorm``.

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
        state: int = 16,
        expansion: int = 2,
        kernel: int = 4,
        norm: str = "rmsnorm",
    ) -> None:
        super().__init__()
        check_counts(vocabulary=vocabulary, length=length, width=width, depth=depth)
        check_counts(state=state, expansion=expansion, kernel=kernel)
        residual = NORMS[choose(norm, RESIDUALS, "model.arguments.norm")]
        self.vocabulary, self.length = vocabulary, length
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            Block(residual(width, depth), Mixer(width, state, expansion * width, kernel)) for _ in range(depth)
        )
        self.norm = residual.final(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for weight in (self.token.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.output.weight /= math.sqrt(depth)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T)."""
        x = self.token(input_ids)  # (B, T, d)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """A mixer joined to the residual stream."""

    def __init__(self, join: Residual, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.join = join

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.join(x, self.mixer)


class Mixer(nn.Module):
    """A gated selective state space model (Sec. 3.4, Fig. 3; Alg. 2).

    Every channel of u, the convolved input, drives N numbers h, and how fast they fade is chosen by the token:

        h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t,    y_t = C_t h_t + D u_t

    with delta = softplus(...) > 0 and A < 0, so every decay lies in (0, 1]. B and C (N,) and delta (e,) are linear in
    u_t. As in the authors' code, delta B stands for the exact discretization of B.
    """

    def __init__(self, width: int, state: int, inside: int, kernel: int) -> None:
        super().__init__()
        rank = math.ceil(width / 16)
        self.sizes = (rank, state, state)
        self.input = nn.Linear(width, 2 * inside, bias=False)
        self.convolution = nn.Conv1d(inside, inside, kernel, groups=inside, padding=kernel - 1)
        self.select = nn.Linear(inside, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, inside)
        # log(-A), e x N in one row: weight decay falls on what has two dimensions, and must not fall on this.
        self.log_rate = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inside))  # A = -(1, .., N)
        self.skip = nn.Parameter(torch.ones(inside))  # D
        self.output = nn.Linear(inside, width, bias=False)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        steps = torch.exp(torch.empty(inside).uniform_(*map(math.log, STEP_RANGE)))
        with torch.no_grad():
            self.step.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is ``steps``

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        u, gate = self.input(x).chunk(2, dim=-1)  # (B, T, e)
        u = self.convolution(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)  # the token itself and the past
        u = functional.silu(u)
        with torch.autocast(x.device.type, enabled=False):  # a recurrence of bfloat16 numbers would forget
            y = self._recurrence(u.to(self.skip.dtype))
        return self.output(y * functional.silu(gate))

    def _recurrence(self, u: Tensor) -> Tensor:  # (B, T, e) -> (B, T, e)
        low, into, out_of = self.select(u).split(self.sizes, dim=-1)  # (B, T, rank), and B, C (B, T, N)
        delta = functional.softplus(self.step(low))  # (B, T, e)
        decay = torch.exp(delta.unsqueeze(-1) * -self.log_rate.exp().view(u.shape[-1], -1))  # (B, T, e, N)
        h = scan(decay, (delta * u).unsqueeze(-1) * into.unsqueeze(2))  # (B, T, e, N)
        return (h @ out_of.unsqueeze(-1)).squeeze(-1) + self.skip * u
