"""Jacobian penalty (Hoffman, Roberts and Yaida 2019, arXiv:1908.02729) on a block (Kim et al. 2026, Table 6).

Kim et al. do not say of what the Jacobian is taken; ours is that of the map which KSS looks at, h_in -> h_out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, distributed

from training.stabilizers.penalty import Pair, Penalty, wide


class Jacobian(Penalty):
    """An unbiased estimate of |d h_out / d h_in|_F^2 per entry of h_out (a block that does nothing has 1).

    One random projection for each block and forward pass (Hoffman et al. 2019, Eq. 11 with n_proj = 1): v^T J with v
    uniform on the sphere of radius sqrt(size of h_out), by one backward pass through the block. The v are functions of
    (seed, step, process, pass); so, unlike the other penalties, this one is the same over differently divided batches
    in expectation only.
    """

    twice = True

    def measure(self, pairs: list[Pair], loss: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mean estimate over the blocks drawn."""
        generator = torch.Generator(pairs[0][0].device).manual_seed(self._draw())
        return torch.stack([_projected(*pair, generator) for pair in pairs]).mean()

    def _draw(self) -> int:
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        self._passes += 1
        return int(np.random.SeedSequence([self._seed, self.steps, rank, self._passes]).generate_state(1)[0])

    def __enter__(self) -> Jacobian:  # noqa: PYI034
        self._passes = 0
        super().__enter__()
        return self


def _projected(h_in: Tensor, h_out: Tensor, generator: torch.Generator) -> Tensor:
    v = torch.randn(h_out.shape, generator=generator, device=h_out.device, dtype=wide(h_out).dtype)
    v = v * (math.sqrt(v.numel()) / v.norm())
    (slope,) = torch.autograd.grad(h_out, h_in, v.to(h_out.dtype), create_graph=True)  # v^T J, like h_in
    return wide(slope).square().mean()
