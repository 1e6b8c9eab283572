"""Moments of a block -> its whitened linear operator (X-whitened DMD, Kim et al. 2026, Sec. 3.2.2, Eq. 6-9).

The paper whitens with ``S^(-1/2)`` (ZCA) and takes ``A = Yw pinv(Xw)``. ZCA, PCA and Cholesky whitening differ by an
orthogonal similarity, so eigenvalues, their condition, norms, residuals and the Kreiss constant are the same; PCA is
the cheap one and is used here. We deviate twice. ``eps`` is relative to the mean variance by default, so that
rescaling the residual stream changes nothing (``eps_mode="absolute"`` is Eq. 9 as printed). And the operator lives on
the directions that the data really span: the literal pseudo-inverse amplifies what Y has outside X's span by
``eps^(-1/2)`` (measured: spectral radius 15742 instead of 2.11 on a rank-deficient stream).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rksp_core.moments import Moments

EPS = 1e-5
EpsMode = Literal["relative", "absolute"]

# Below this |Yw - Xw|_F / |Xw|_F a block is the identity to the precision of moments: their rounding is about 1e-8.
UPDATE_FLOOR = 1e-6


@dataclass(frozen=True)
class Operator:
    """The operator of one block on its retained subspace, in whitened PCA coordinates.

    Attributes
    ----------
    matrix
        A, m x m.
    gram_in
        Diagonal of G_xx = Xw Xw^T / (n - 1); just below 1.
    residual
        E, second moment of Yw - A Xw, m x m, positive semi-definite up to rounding.
    nonlinearity_ratio
        eta_nl of Eq. 5, in [0, 1]; None below the update floor, where it is 0/0.
    update_ratio
        |Yw - Xw|_F / |Xw|_F; None without any direction.
    status
        What is wrong with the data: a subset of ``rank_deficient``, ``rank_capped``, ``interpolating``,
        ``degenerate_update``.
    """

    matrix: Float[Tensor, "m m"]
    gram_in: Float[Tensor, " m"]
    residual: Float[Tensor, "m m"]
    nonlinearity_ratio: float | None
    update_ratio: float | None
    status: tuple[str, ...]

    @property
    def rank(self) -> int:
        """m, the number of retained directions."""
        return int(self.matrix.shape[0])


def whitened_dmd(
    moments: Moments, *, eps: float = EPS, eps_mode: EpsMode = "relative", rank: int | None = None, seed: int = 0
) -> Operator:
    """Estimate the operator of a block from its moments.

    Parameters
    ----------
    moments
        At least two samples, finite.
    eps
        Regularization of the whitening covariance, relative to its mean eigenvalue or absolute (`eps_mode`).
    rank
        None keeps every direction above the rounding floor; r keeps the r leading ones, found by a randomized
        range finder (Halko, Martinsson and Tropp 2011) with two power iterations.
    seed
        Of the random sketch; used with ``rank`` only.

    Raises
    ------
    ValueError
        With fewer than two samples, a rank below 1, a negative eps or an unknown mode of it.
    """
    if moments.count < 2:
        raise ValueError(f"an operator needs at least 2 samples, got {moments.count}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if eps_mode not in get_args(EpsMode) or not eps >= 0:
        raise ValueError(f"eps must be at least 0, relative or absolute, got {eps} {eps_mode!r}")
    span = _span(moments, rank, seed)
    ridge = eps * span.mean_variance if eps_mode == "relative" else eps
    damped = span.variance + ridge
    scale = damped.rsqrt()
    operator = scale[:, None] * span.cross * (damped.sqrt() / span.variance)
    gram_in = span.variance / damped
    gram_out = scale[:, None] * span.out * scale
    gram_cross = operator * gram_in
    residual = gram_out - gram_cross @ operator.T

    update, size = _update(gram_in, gram_out, gram_cross)
    status = span.status
    if size > 0 and update <= UPDATE_FLOOR * size:
        # The estimate is the identity plus rounding; its rounding would read as a condition number of 1e8.
        operator, residual = torch.eye(len(gram_in), dtype=operator.dtype), torch.zeros_like(residual)
        status += ("degenerate_update",)
    degenerate = "degenerate_update" in status or size == 0
    error = float(residual.diagonal().sum().clamp(min=0).sqrt())
    return Operator(
        matrix=operator,
        gram_in=gram_in,
        residual=(residual + residual.T) / 2,
        nonlinearity_ratio=None if degenerate else min(error / update, 1.0),
        update_ratio=update / size if size > 0 else None,
        status=status,
    )


@dataclass(frozen=True)
class _Span:
    """The retained directions Q: variances along them, Q^T C_yx Q, Q^T C_yy Q, and tr(C_xx) / d of all of X."""

    variance: Float[Tensor, " m"]
    cross: Float[Tensor, "m m"]
    out: Float[Tensor, "m m"]
    mean_variance: float
    status: tuple[str, ...]


def _span(moments: Moments, rank: int | None, seed: int) -> _Span:
    snapshots = moments.snapshots
    if moments.count >= moments.width or rank is not None:
        snapshots = None
    variance, basis, mean_variance, offset = (
        _from_moments(moments, rank, seed) if snapshots is None else _from_snapshots(snapshots[0])
    )

    # What float32 rounding alone puts into a direction: below it a direction is noise, not data.
    floor = max(
        8 * moments.rounding**2 * (mean_variance * (moments.count - 1) / moments.count + offset),
        moments.width * 2.0**-52 * float(variance.max()) if len(variance) else 0.0,
    )
    status: tuple[str, ...] = ()
    # Fewer than two samples a direction interpolate: the fit is exact, whatever the block does. Then a quarter of
    # the distinct samples is the largest subspace that still leaves something to average over.
    cap = moments.width
    if rank is not None:
        cap = min(rank, cap)
    elif moments.width > moments.distinct / 2:
        cap = moments.distinct // 4
        status += ("rank_capped",)
    kept = (variance > floor).nonzero().flatten()
    kept = kept[variance[kept].argsort(descending=True)][:cap]
    if len(kept) < 0.9 * min(moments.width, cap):
        status += ("rank_deficient",)
    if moments.distinct < 2 * len(kept):
        status += ("interpolating",)

    basis = basis[:, kept]
    if snapshots is not None:
        x, y = (rows - rows.mean(0) for rows in snapshots)
        x, y = x @ basis, y @ basis
        cross, out = (y.T @ x / (moments.count - 1), y.T @ y / (moments.count - 1))
    else:
        _, second_yx, second_yy = moments.second.cpu() / (moments.count - 1)
        cross, out = basis.T @ second_yx @ basis, basis.T @ second_yy @ basis
    return _Span(variance[kept], cross, out, mean_variance, status)


def _from_moments(moments: Moments, rank: int | None, seed: int) -> tuple[Tensor, Tensor, float, float]:
    """Return variances, directions (columns), tr(C_xx) / d and mean(x)^2 averaged over the channels."""
    covariance = moments.second[0].cpu() / (moments.count - 1)
    mean_variance = float(covariance.diagonal().mean())
    offset = float(moments.mean[0].square().mean())
    if rank is None or rank >= moments.width:
        variance, basis = torch.linalg.eigh(covariance)
    else:
        variance, basis = leading_directions(covariance, rank, seed)
    return variance, basis, mean_variance, offset


def _from_snapshots(rows: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, float, float]:
    """Do the same where n < d, from the n x n Gram matrix: nothing of size d x d is made."""
    count, width = rows.shape
    mean = rows.mean(0)
    centred = (rows - mean) / (count - 1) ** 0.5
    variance, left = torch.linalg.eigh(centred @ centred.T)
    positive = variance > width * 2.0**-52 * variance.max()
    variance, left = variance[positive], left[:, positive]
    basis = centred.T @ left / variance.sqrt()
    return variance, basis, float(variance.sum()) / width, float(mean.square().mean())


def leading_directions(
    covariance: Float[Tensor, "d d"], rank: int, seed: int, *, power_iterations: int = 2, oversampling: int = 8
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Return the leading variances and directions of a covariance by a seeded sketch (Halko et al. 2011, Alg. 4.4).

    Descending order. ``oversampling`` extra columns keep the last wanted direction accurate.
    """
    width = covariance.shape[0]
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(width, min(rank + oversampling, width), generator=generator, dtype=covariance.dtype)
    for _ in range(power_iterations + 1):
        sketch = torch.linalg.qr(covariance @ sketch.to(covariance.device)).Q
    variance, rotation = torch.linalg.eigh(sketch.T @ covariance @ sketch)
    return variance.flip(0)[:rank], (sketch @ rotation).flip(1)[:, :rank]


def _update(gram_in: Tensor, gram_out: Tensor, gram_cross: Tensor) -> tuple[float, float]:
    """Return |Yw - Xw|_F and |Xw|_F, both divided by sqrt(n - 1)."""
    squared = gram_out.diagonal().sum() - 2 * gram_cross.diagonal().sum() + gram_in.sum()
    return float(squared.clamp(min=0).sqrt()), float(gram_in.sum().sqrt())
