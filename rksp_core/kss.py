"""Koopman Spectral Shaping: a differentiable penalty on the spectrum of a block, and a regularizer that applies it.

Kim et al. 2026, Def. 2 (Eq. 14-15) and App. D. Whitening is a similarity, so the eigenvalues are those of the plain
reduced operator ``A_r = (U^T Yc)(U^T Xc)^+`` on the r principal directions U of the centred input. The paper leaves
beta and the sketch open; we take beta = 1 and two power iterations with a fixed seed.

What we measured, so that nobody is surprised: the published form mostly delays divergence and can hasten it.
``softplus(x)^2`` is no hinge: a mode at |lambda| = 1 already costs .12, and the sum runs over all modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from rksp_core.capture import Block, find_blocks, stream_of, stream_out
from rksp_core.dmd import leading_directions
from rksp_core.moments import ROUNDING
from rksp_core.orders import KSSSettings
from rksp_core.spectrum import LOWER, UPPER
from rksp_core.untouched import as_written

Variant = Literal["paper", "hinge"]
VARIANTS: tuple[Variant, ...] = ("paper", "hinge")

TEMPERATURE = 20.0
RANK = 32
SAMPLES = 2048

# A mode whose eigenvalue is this ill-conditioned sits beside a defective matrix: its derivative, of the order of the
# condition, is noise. Its weight is cut to the limit, which biases the gradient knowingly.
CONDITION_LIMIT = 1e4

# Beyond this condition (a gap below about 1e-8) the derivative is silently wrong.
DEFECTIVE = 1e8


def kss_loss(
    h_in: Float[Tensor, "tokens d"],
    h_out: Float[Tensor, "tokens d"],
    *,
    rank: int = RANK,
    gamma: float = 0.4,
    beta: float = 1.0,
    variant: Variant = "paper",
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Return the penalty of one block (Kim et al. 2026, Eq. 14), a float64 scalar with gradient to both inputs.

        paper:  sum_j sigmoid(T(|lam_j| - tau_u)) softplus(|lam_j| - tau_u)^2 + beta (m_soft - gamma)^2
        hinge:  sum_j relu(|lam_j| - tau_u)^2                                  + beta (m_soft - gamma)^2
        m_soft = mean_j sigmoid(T(|lam_j| - tau_l)) sigmoid(T(tau_u - |lam_j|)),  T = 20, tau_u = 1.05, tau_l = 0.90

    Parameters
    ----------
    h_in, h_out
        Residual state before and after the block, one row a token; at least two rows.
    rank
        r, the number of modes; fewer where the data span fewer directions.
    gamma
        Target of the soft near-unit mass, in [0, 1].
    beta
        Weight of that target, at least 0.
    seed
        Of the sketch that finds the directions U; U itself carries no gradient.

    Raises
    ------
    ValueError
        When the shapes differ, rank or variant is impossible, a state is not finite, or the input does not vary.
    torch.linalg.LinAlgError
        When the reduced operator has no eigenvector basis (a defective matrix): there is no derivative.
    """
    if h_in.shape != h_out.shape or h_in.ndim != 2 or h_in.shape[0] < 2:
        raise ValueError(
            f"kss_loss needs two tensors (tokens, width) of at least 2 tokens, got {tuple(h_in.shape)} "
            f"and {tuple(h_out.shape)}"
        )
    _check(rank, variant)
    if not bool(h_in.isfinite().all() and h_out.isfinite().all()):
        raise ValueError("kss_loss needs finite residual states, got NaN or infinity; skip this block")
    options = (rank, gamma, beta, variant, seed)
    return _penalty(h_in.double(), h_out.double(), ROUNDING[h_in.dtype], *options)


def _check(rank: int, variant: str) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


def _penalty(
    x: Float[Tensor, "tokens d"],
    y: Float[Tensor, "tokens d"],
    rounding: float,
    rank: int,
    gamma: float,
    beta: float,
    variant: Variant,
    seed: int,
) -> Float[Tensor, ""]:
    """Return Eq. 14 for finite float64 states that were stored with this relative rounding; see `kss_loss`."""
    basis = _directions(x.detach(), rounding, rank, seed)
    x, y = (x - x.mean(0)) @ basis, (y - y.mean(0)) @ basis
    operator = torch.linalg.solve(x.T @ x, x.T @ y).T
    moduli = eigenvalue_moduli(operator)
    excess = moduli - UPPER
    soft = torch.sigmoid(TEMPERATURE * (moduli - LOWER)) * torch.sigmoid(-TEMPERATURE * excess)
    if variant == "paper":
        unstable = torch.sigmoid(TEMPERATURE * excess) * functional.softplus(excess).square()
    else:
        unstable = functional.relu(excess).square()
    return unstable.sum() + beta * (soft.mean() - gamma).square()


def eigenvalue_moduli(operator: Float[Tensor, "r r"]) -> Float[Tensor, " r"]:
    """Return |lam_j| of a real matrix, with the explicit gradient d|lam_j| = Re(conj(lam_j) / |lam_j| u_j* dA v_j).

    It agrees with the autograd of `torch.linalg.eigvals`, and lets each mode's weight be cut by its condition
    |u_j||v_j| where the matrix is nearly defective.
    """
    moduli: Tensor = _Moduli.apply(operator)  # type: ignore[no-untyped-call]
    return moduli


class _Moduli(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Tensor) -> Tensor:
        values, right = torch.linalg.eig(operator)
        if operator.requires_grad:
            left = torch.linalg.inv(right)
            condition = right.norm(dim=0) * left.norm(dim=1)
            if not bool((condition < DEFECTIVE).all()):
                raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                    f"the operator is defective to working precision (condition {float(condition.max()):.1e}), "
                    "so its eigenvalues have no derivative; skip this block"
                )
            ctx.save_for_backward(values, right, left, condition)
        moduli: Tensor = values.abs()
        return moduli

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values, right, left, condition = ctx.saved_tensors
        weight = gradients[0] * (CONDITION_LIMIT / condition).clamp(max=1.0)
        # |lam| has a kink at 0; its subgradient 0 is taken there.
        phase = torch.where(values.abs() > 0, values.conj() / values.abs(), torch.zeros_like(values))
        gradient: Tensor = (left.T * (weight * phase) @ right.T).real
        return gradient


class KSSRegularizer:
    """Adds the KSS term to a training loss every few steps, on a random share of the blocks.

        regularizer = KSSRegularizer(model, alpha=0.15)
        with regularizer:
            loss = task_loss(model(inputs))
        loss = loss + regularizer.term()

    Each entry of the context counts one step. Hooks are on only while a term is due, so with ``alpha`` 0 a run is
    bitwise the same as without. The gradient of each block is computed at once in float64 and checked: a block that
    cannot be differentiated is skipped and counted in ``skipped_layers``, as is one whose forward pass records no
    gradient (under `torch.no_grad`, or in a reentrant checkpoint; checkpoint with ``use_reentrant=False``).
    Compiled models run as written while a term is due.

    Parameters
    ----------
    model
        The model whose forward pass runs inside the context.
    alpha, interval, layer_fraction, gamma
        As in `rksp_core.KSSSettings`; `configure` changes them later.
    rank, samples, beta, variant
        r modes from at most N token states; see `kss_loss`.
    blocks
        Glob or globs, as for `rksp_core.find_blocks`; None finds them.
    seed
        Chooses blocks and tokens, together with the step: a resumed run repeats the same choice.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.15,
        interval: int = 10,
        layer_fraction: float = 0.5,
        gamma: float = 0.4,
        *,
        rank: int = RANK,
        samples: int = SAMPLES,
        beta: float = 1.0,
        variant: Variant = "paper",
        blocks: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        _check(rank, variant)
        self.settings = KSSSettings(alpha, interval, layer_fraction, gamma)
        self.steps = 0
        self.skipped_layers = 0
        self._blocks = find_blocks(model, blocks)
        self._rank, self._samples, self._beta, self._seed = rank, samples, beta, seed
        self._variant: Variant = variant
        self._undo = ExitStack()
        self._inputs: dict[str, tuple[Tensor, torch.Size]] = {}
        self._terms: list[Tensor] = []

    @property
    def due(self) -> bool:
        """Whether the next forward pass contributes a term."""
        return self.settings.alpha > 0 and self.steps % self.settings.interval == 0

    def configure(self, settings: KSSSettings) -> None:
        """Take the settings of an order; they hold from the next step on."""
        self.settings = settings

    def term(self) -> Float[Tensor, ""]:
        """Return alpha times the mean penalty over the blocks and forward passes of the last context; 0 when not due.

        A scalar to add to the loss, in float32, or float64 where the model is.
        """
        if not self._terms:
            return torch.zeros(())
        total = torch.stack(self._terms).mean()
        self._terms = []
        return self.settings.alpha * total

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON-able values."""
        settings = {name: getattr(self.settings, name) for name in ("alpha", "interval", "layer_fraction", "gamma")}
        return {"steps": self.steps, "skipped_layers": self.skipped_layers, "settings": settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps, self.skipped_layers = int(state["steps"]), int(state["skipped_layers"])
        self.settings = replace(self.settings, **state["settings"])

    def __enter__(self) -> KSSRegularizer:  # noqa: PYI034 - the shape checker of the tests cannot see `Self`
        self._terms = []
        if self.due:
            self._undo.enter_context(as_written())
            for block in self._chosen():
                before = block.module.register_forward_pre_hook(self._before(block), with_kwargs=True)
                after = block.module.register_forward_hook(self._after(block))
                self._undo.callback(before.remove)
                self._undo.callback(after.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        self._inputs = {}
        self.steps += 1

    def _chosen(self) -> list[Block]:
        """Draw the blocks of this step: a share of at least one, without replacement."""
        count = max(1, round(self.settings.layer_fraction * len(self._blocks)))
        order = torch.randperm(len(self._blocks), generator=self._generator())[:count]
        return [self._blocks[index] for index in sorted(order.tolist())]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed * 1_000_003 + self.steps)

    def _before(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = stream_of(args, kwargs)
            if stream is not None:
                # The rows are copied now: a block may overwrite its input in place.
                with _kept_from_checkpoints():
                    self._inputs[block.name] = (self._rows(stream), stream.shape)

        return hook

    def _after(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
            h_in, shape = self._inputs.pop(block.name, (None, None))
            h_out = None if shape is None else stream_out(output, shape)
            with _kept_from_checkpoints():
                term = None if h_in is None or h_out is None else self._layer_term(h_in, self._rows(h_out))
            if term is None:
                self.skipped_layers += 1
            else:
                self._terms.append(term)

        return hook

    def _rows(self, stream: Tensor) -> Tensor:
        """Return at most N rows of a stream, the same ones for each block of a step."""
        rows = stream.flatten(0, -2)
        if rows.shape[0] <= self._samples:
            return rows.clone()
        return rows[torch.randperm(rows.shape[0], generator=self._generator())[: self._samples].to(rows.device)]

    def _layer_term(self, h_in: Tensor, h_out: Tensor) -> Tensor | None:
        """Return the penalty with its gradient attached to the streams, or None where it is not finite.

        The gradient is taken on detached rows and tied back by a linear form with the same value and slope. So a bad
        one is seen before it reaches the parameters, and the float64 graph is freed at once. The slope stays float64:
        in a float16 model its entries, about 1 / N, would lose most of their digits.
        """
        if not (h_in.requires_grad or h_out.requires_grad):
            return None
        if not bool(h_in.isfinite().all() and h_out.isfinite().all()):
            return None
        with torch.enable_grad():
            x, y = h_in.detach().double().requires_grad_(), h_out.detach().double().requires_grad_()
            options = (self._rank, self.settings.gamma, self._beta, self._variant, self._seed)
            try:
                loss = _penalty(x, y, ROUNDING[h_in.dtype], *options)
                slope_in, slope_out = torch.autograd.grad(loss, (x, y))
            except (torch.linalg.LinAlgError, ValueError):  # type: ignore[attr-defined]
                return None
        if not (loss.isfinite() and slope_in.isfinite().all() and slope_out.isfinite().all()):
            return None
        tie = ((h_in.double() - x.detach()) * slope_in).sum() + ((h_out.double() - y.detach()) * slope_out).sum()
        return (loss.detach() + tie).to(torch.promote_types(h_out.dtype, torch.float32))


def _kept_from_checkpoints() -> saved_tensors_hooks:
    """Return a context whose saved tensors an enclosing activation checkpoint does not see.

    It counts what the block saves and recomputes it in the backward pass, when the hooks of this context are gone.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _directions(rows: Float[Tensor, "tokens d"], rounding: float, rank: int, seed: int) -> Float[Tensor, "d r"]:
    """Return the leading principal directions of the input that stand above its rounding noise.

    Raises
    ------
    ValueError
        When no direction does.
    """
    centred = rows - rows.mean(0)
    variance, basis = leading_directions(centred.T @ centred / (len(rows) - 1), min(rank, rows.shape[1]), seed)
    floor = max(8 * rounding**2 * float(rows.square().mean()), rows.shape[1] * 2.0**-52 * float(variance[0]))
    kept = variance > floor
    if not bool(kept.any()) or not math.isfinite(floor):
        raise ValueError("the input of the block does not vary over the tokens; there is no spectrum to shape")
    return basis[:, kept]
