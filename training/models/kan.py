"""A decoder whose feed-forward sublayer is a Kolmogorov-Arnold network: a learned function on every edge.

Liu et al. 2024, arXiv:2404.19756, Eq. 2.10-2.12: each edge from input i to output j has

    phi_ji(x) = w_ji silu(x) + sum_b c_jib B_b(x)

with the cubic B-splines B_b over a uniform grid, and output j is sum_i phi_ji(x_i). The published factor w_s of the
spline is contained in c. Kim et al. 2026, Table 18 counts basis functions (B = 4 and 8) and leaves the order open: we
take the cubic of Liu et al., so B functions span B - 3 intervals, and 8 are their default of 5 intervals.

Our grid is fixed: it lies over [-3, 3], three standard deviations of a normalized stream, where Liu et al. start with
[-1, 1] and move it after the inputs. Outside of it the splines fade to 0 and the SiLU remains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rksp_core.errors import ConfigError
from training.models.arguments import check_counts
from training.models.gpt import Decoder
from training.models.initialization import Initialization

ORDER = 3  # cubic
DOMAIN = 3.0  # the grid lies over [-3, 3]
NOISE = 0.1  # standard deviation of the coefficients c at the start, Liu et al. 2024, Sec. 2.2

# The spline layers start as in their paper whatever is chosen; Fixup and muP say nothing about them.
INITIALIZATIONS = ("published", "gpt2", "gpt2_unscaled", "torch", "rezero")


class KAN(Decoder):
    """The decoder with two spline layers in the place of the MLP.

    Parameters
    ----------
    vocabulary, length, width, depth, heads, norm
        As for `training.models.gpt.GPT`.
    basis
        B, the number of basis functions of an edge, at least 4. The sublayer is as wide inside as outside, so it has
        2 (B + 1) d^2 parameters; an MLP has 8 d^2.
    initialization
        One of `INITIALIZATIONS`, of all matrices but those of the spline layers.

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
        basis: int = 8,
        norm: str = "pre_ln",
        initialization: str = "published",
    ) -> None:
        check_counts(basis=basis)
        if basis <= ORDER:
            raise ConfigError(
                f"model.arguments.basis must be at least {ORDER + 1} for splines of order {ORDER}, got {basis}"
            )
        super().__init__(
            *(vocabulary, length, width, depth, heads, norm, initialization, None),
            feed_forward=lambda start: SplineNetwork(width, basis, start),
            known=INITIALIZATIONS,
        )


class SplineNetwork(nn.Module):
    """Two spline layers, d -> d -> d."""

    def __init__(self, width: int, basis: int, start: Initialization) -> None:
        super().__init__()
        gain = start.gain or 1.0
        self.up = SplineLayer(width, width, basis, gain)
        self.inner = start.residual.inner(width)
        self.output = SplineLayer(width, width, basis, gain)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.output(self.inner(self.up(x)))


class SplineLayer(nn.Module):
    """A function of one number on each edge; the outputs are their sums. ``gain`` is that of the norm's paper."""

    def __init__(self, inputs: int, outputs: int, basis: int, gain: float) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(outputs, inputs))  # w
        self.spline = nn.Parameter(torch.empty(outputs, basis, inputs))  # c
        self.register_buffer("knots", uniform_knots(basis), persistent=False)
        nn.init.xavier_normal_(self.base, gain=gain)
        nn.init.normal_(self.spline, std=gain * NOISE)

    def forward(self, x: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        values = b_splines(x, self.knots, ORDER)  # (..., basis, inputs), in float32 whatever x is, as the knots are
        return functional.linear(functional.silu(x), self.base) + functional.linear(
            values.flatten(-2), self.spline.flatten(1)
        )


def uniform_knots(basis: int) -> Tensor:
    """Return the knots (basis + 4,) of cubic splines over [-3, 3]: an equidistant grid, continued by 3 on each side."""
    intervals = basis - ORDER
    steps = torch.arange(-ORDER, intervals + ORDER + 1, dtype=torch.float64)
    return (DOMAIN * (2 * steps / intervals - 1)).to(torch.get_default_dtype())


def b_splines(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Return the B-splines of ``order`` at x (..., n), as (..., basis, n) with basis = len(knots) - order - 1.

    The recursion of Cox and de Boor from the indicators of the intervals; they sum to 1 between the knots ``order`` and
    ``basis``. The basis is not the last dimension, as short rows cost 1.6 times as much, forward and backward.
    """
    knots = knots.unsqueeze(1)
    distances = x.unsqueeze(-2) - knots  # (..., knots, n)
    values = ((distances[..., :-1, :] >= 0) & (distances[..., 1:, :] < 0)).to(distances.dtype)
    for degree in range(1, order + 1):
        values = values / (knots[degree:] - knots[:-degree])
        rising, falling = distances[..., : -degree - 1, :], distances[..., degree + 1 :, :]
        values = rising * values[..., :-1, :] - falling * values[..., 1:, :]
    return values
