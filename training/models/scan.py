"""The linear recurrence h_t = a_t h_(t-1) + b_t over all steps at once.

An associative scan (Blelloch 1990; for state space models Smith et al. 2023, arXiv:2208.04933): two neighbouring steps
are one step with a = a_2 a_1, b = a_2 b_1 + b_2, so T steps become T/2 and, by recursion, 2 log2(T) rounds of
elementwise products. Nothing is divided and no logarithm taken: products of decays in [0, 1] may underflow to 0, which
is the right limit. The quotient of cumulative products, h_t = p_t sum_s b_s / p_s with p_t = a_1 ... a_t, was rejected:
at a decay of exp(-1.6), that of Mamba's fastest state at the start, p_s underflows in float32 within 65 steps.

h solves (I - S_a) h = b with the matrix S_a that has a on its first subdiagonal. So the gradient by b is the solution
of the transposed system, a scan from the end; autograd of the rounds would keep every round's intermediate instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scan(decay: Tensor, update: Tensor) -> Tensor:
    """Return h (B, T, ...) with ``h[:, t] = decay[:, t] * h[:, t - 1] + update[:, t]``, h = 0 before the first step.

    Parameters
    ----------
    decay, update
        a and b, both (B, T, ...), a at most 1 in modulus if rounding is to stay small. Twice differentiable by both.
    """
    solution: Tensor = _Scan.apply(decay, update, False)
    return solution


class _Scan(torch.autograd.Function):
    """Solve (I - S_a) h = b, or the transposed system h_t = a_(t+1) h_(t+1) + b_t; each is the other's derivative."""

    @staticmethod
    def forward(decay: Tensor, update: Tensor, transposed: bool) -> Tensor:
        state = update.clone()
        _solve(decay[:, 1:], state, transposed)  # a_t links the steps t - 1 and t, whatever the direction
        return state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.transposed = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, state = ctx.saved_tensors
        by_update = _Scan.apply(decay, gradient, not ctx.transposed)
        left, right = (state, by_update) if not ctx.transposed else (by_update, state)
        by_decay = torch.cat([torch.zeros_like(decay[:, :1]), left[:, :-1] * right[:, 1:]], dim=1)
        return by_decay, by_update, None


def _solve(weight: Tensor, state: Tensor, transposed: bool) -> None:
    """Scan in place, from the end when ``transposed``; ``weight[:, t]`` links the steps t and t + 1 of ``state``."""
    steps = state.shape[1]
    if steps == 1:
        return
    pairs = steps // 2
    # Neighbours (left, right) are paired from where the scan begins; the second of a pair takes the first one in.
    start = steps % 2 if transposed else 0
    left, right = state[:, start::2][:, :pairs], state[:, start + 1 :: 2][:, :pairs]
    first, second = (right, left) if transposed else (left, right)
    second.addcmul_(weight[:, start::2][:, :pairs], first)
    # The seconds, two steps apart, are a recurrence of half the length.
    inside, outside = weight[:, start + int(not transposed) :: 2], weight[:, start + 1 + int(not transposed) :: 2]
    _solve(inside[:, : pairs - 1] * outside[:, : pairs - 1], second, transposed)
    # The steps between them (every first but that of the first pair, and an unpaired one) take their neighbour in.
    if transposed:
        rest = state[:, 1 - start : steps - 2 : 2]
        rest.addcmul_(weight[:, 1 - start : steps - 2 : 2], state[:, 2 - start : steps - 1 : 2])
    else:
        rest = state[:, 2::2]
        rest.addcmul_(weight[:, 1::2], state[:, 1 : steps - 1 : 2])
