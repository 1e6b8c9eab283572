"""Koopman Spectral Shaping: a differentiable penalty on the spectrum of a block, and a regularizer that applies it.

Kim et al. 2026, Def. 2 (Eq. 14-15) and App. D. Whitening is a similarity, so the eigenvalues are those of the plain
reduced operator ``A_r = (U^T Yc)(U^T Xc)^+`` on the r principal directions U of the centred input. The paper leaves
beta and the sketch open; we take beta = 1 and two power iterations with a fixed seed.

What we measured, so that nobody is surprised: the published form mostly hastens divergence. ``softplus(x)^2`` is no
hinge: a mode at |lambda| = 1 already costs .12, and the sum runs over all modes. And at each tenth step its gradient
comes to Adam as an outlier: on a No-Norm GPT whose spectrum had begun to spread it was 20-30 times sqrt(v_hat) in the
blocks, the task's about 1, and all but orthogonal to it. `rksp_core.surprise` takes such outliers off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from rksp_core.batch import token_mask
from rksp_core.capture import Block, draw_blocks, find_blocks, stream_of, stream_out, uncompiled
from rksp_core.dmd import leading_directions
from rksp_core.moments import ROUNDING
from rksp_core.orders import VARIANTS, KSSSettings, Levers, Variant
from rksp_core.spectrum import LOWER, UPPER
from rksp_core.untouched import as_written

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
    x, y = h_in.double(), h_out.double()
    x, y = x - x.mean(0), y - y.mean(0)
    basis = _directions(
        x.detach().T @ x.detach() / (len(x) - 1), float(h_in.detach().double().square().mean()), h_in.dtype, rank, seed
    )
    x, y = x @ basis, y @ basis
    return _penalty(x.T @ x, x.T @ y, gamma, beta, variant)


def _check(rank: int, variant: str) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


def _penalty(
    gram: Float[Tensor, "r r"], cross: Float[Tensor, "r r"], gamma: float, beta: float, variant: Variant
) -> Float[Tensor, ""]:
    """Return Eq. 14 from the centred second moments x^T x and x^T y on the r directions; see `kss_loss`."""
    moduli = eigenvalue_moduli(torch.linalg.solve(gram, cross).T)
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
    Compiled models run as written while a term is due. Padding (``attention_mask`` and its like among the keyword
    arguments of the model, or of a module in it that holds the blocks) stays out of the sample.

    Where `torch.distributed` runs, a term is that of all processes' tokens together: the sums that make the operator
    are reduced over ``group``, four small collectives a block. Its gradient is scaled for gradients that are averaged
    over the processes, as DDP and FSDP do, and equals that of one process on the concatenated batch. So every process
    of the group must enter the context and run the model at the same steps.

    Parameters
    ----------
    model
        The model whose forward pass runs inside the context; behind a wrapper such as DDP, the model itself.
    alpha, interval, layer_fraction, gamma
        As in `rksp_core.KSSSettings`; `configure` changes them later.
    rank, samples, beta, variant
        r modes from at most N token states; see `kss_loss`. An order may set another variant.
    blocks
        Glob or globs, as for `rksp_core.find_blocks`; None finds them.
    seed
        Chooses blocks and tokens, together with the step: a resumed run repeats the same choice.
    group
        The processes that share the batch; None: all of them.
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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(rank, variant)
        self.settings = KSSSettings(alpha, interval, layer_fraction, gamma)
        self.steps = 0
        self.skipped_layers = 0
        self._model, self._blocks = uncompiled(model), find_blocks(model, blocks)
        self._group = group
        self._rank, self._samples, self._beta, self._seed = rank, samples, beta, seed
        self._variant: Variant = variant
        self._undo = ExitStack()
        names = [block.name for block in self._blocks]
        self._around = [  # the model, and what in it holds blocks
            module
            for path, module in self._model.named_modules()
            if any(not path or name.startswith(f"{path}.") for name in names)
        ]
        # For each of those that run now, outermost first: the masks that may be its stream's, its own the last.
        self._masks: list[list[Bool[Tensor, "sequences length"]]] = []
        self._inputs: dict[str, tuple[Tensor, Tensor | None, torch.Size]] = {}
        self._terms: list[Tensor] = []

    @property
    def due(self) -> bool:
        """Whether the next forward pass contributes a term."""
        return self.settings.alpha > 0 and self.steps % self.settings.interval == 0

    def configure(self, settings: KSSSettings) -> None:
        """Take the settings of an order; they hold from the next step on."""
        self.settings = settings.kss if isinstance(settings, Levers) else settings

    def term(self) -> Float[Tensor, ""]:
        """Return alpha times the mean penalty over the blocks and forward passes of the last context; 0 when not due.

        A scalar to add to the loss, in float32, or float64 where the model is.
        """
        if not self._terms:
            return torch.zeros(())
        device = self._terms[0].device  # the blocks may be spread over several
        total = torch.stack([term.to(device) for term in self._terms]).mean()
        self._terms = []
        return self.settings.alpha * total

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON-able values."""
        return {"steps": self.steps, "skipped_layers": self.skipped_layers, "settings": asdict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps, self.skipped_layers = int(state["steps"]), int(state["skipped_layers"])
        self.settings = replace(self.settings, **state["settings"])

    def __enter__(self) -> KSSRegularizer:  # noqa: PYI034 - the shape checker of the tests cannot see `Self`
        self._terms = []
        if self.due:
            self._undo.enter_context(as_written())
            for module in self._around:
                entered = module.register_forward_pre_hook(self._enter_module, with_kwargs=True)
                left = module.register_forward_hook(self._leave_module)
                self._undo.callback(entered.remove)
                self._undo.callback(left.remove)
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
        self._inputs, self._masks = {}, []
        self.steps += 1

    def _chosen(self) -> list[Block]:
        return draw_blocks(self._blocks, self.settings.layer_fraction, self._generator())

    def _generator(self) -> torch.Generator:
        return step_generator(self._seed, self.steps)

    def _enter_module(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        mask = token_mask(kwargs)
        # A decoder is given the encoder's output: the mask of the model around it is the encoder's.
        decoder = kwargs.get("encoder_hidden_states") is not None or "memory_key_padding_mask" in kwargs
        outer = self._masks[-1] if self._masks and not decoder else []
        self._masks.append(outer if mask is None else [*outer, mask])

    def _leave_module(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self._masks:
            self._masks.pop()

    def _before(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = stream_of(args, kwargs)
            # Without gradient, as in an evaluation by one process alone, nothing here may wait for the others.
            if stream is None or _recomputing() or not torch.is_grad_enabled():
                return
            # The rows are copied now: a block may overwrite its input in place.
            with _kept_from_checkpoints():
                chosen = self._sample(stream)
                self._inputs[block.name] = (_rows(stream, chosen), chosen, stream.shape)

        return hook

    def _after(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
            if _recomputing():
                return
            h_in, chosen, shape = self._inputs.pop(block.name, (None, None, None))
            h_out = None if shape is None else stream_out(output, shape)
            term = None
            if h_in is not None and h_out is not None:
                with _kept_from_checkpoints():
                    term = self._layer_term(h_in.to(h_out.device), _rows(h_out, chosen))
            if term is None:
                self.skipped_layers += 1
            else:
                self._terms.append(term)

        return hook

    def _sample(self, stream: Tensor) -> Tensor | None:
        """Return this process's part of at most N rows over all of them, the same for each block of a step; None: all.

        A mask is (sequences, length); streams are, too, or have their positions first.
        """
        masks = reversed(self._masks[-1] if self._masks else [])
        fitting = (each for mask in masks for each in (mask, mask.T) if each.shape == stream.shape[:-1])
        mask = next(fitting, None)
        real = None if mask is None else mask.flatten().to(stream.device).nonzero().flatten()
        mine = math.prod(stream.shape[:-1]) if real is None else len(real)
        counts = self._gathered(mine, stream.device)
        total, before = sum(counts), sum(counts[: self._process])
        if total <= self._samples:
            return real
        chosen = torch.randperm(total, generator=self._generator())[: self._samples] - before
        chosen = chosen[(chosen >= 0) & (chosen < mine)].to(stream.device)
        return chosen if real is None else real[chosen]

    def _layer_term(self, h_in: Tensor, h_out: Tensor) -> Tensor | None:
        """Return the penalty with its gradient attached to the streams, or None where it is not finite.

        The gradient is taken on detached rows and tied back by a linear form with the same value and slope. So a bad
        one is seen before it reaches the parameters, and the float64 graph is freed at once. The slope stays float64:
        in a float16 model its entries, about 1 / N, would lose most of their digits. All that decides whether a block
        is skipped has been reduced over the processes, so they skip the same ones.
        """
        if not (h_in.requires_grad or h_out.requires_grad):
            return None
        found = self._slopes(h_in.detach().double(), h_out.detach().double(), h_in.dtype)
        if found is None:
            return None
        loss, slope_in, slope_out = found
        tie = ((h_in.double() - h_in.detach().double()) * slope_in).sum()
        tie = tie + ((h_out.double() - h_out.detach().double()) * slope_out).sum()
        return (loss + self._processes * tie).to(torch.promote_types(h_out.dtype, torch.float32))

    def _slopes(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the penalty of all processes' rows, and its derivatives by this process's rows x and y.

        They pass through G = x^T x and H = x^T y of the centred, projected rows: dx = x (dG + dG^T) + y dH^T and
        dy = x dH. The derivative of the means vanishes, as centred rows add up to 0.
        """
        width = x.shape[1]
        sums = self._sum(torch.cat([x.sum(0), y.sum(0), x.new_tensor([len(x)]), x.square().sum()[None]]))
        count = int(sums[-2]) if bool(sums.isfinite().all()) else 0
        if count < 2:
            return None
        x, y = x - sums[:width] / count, y - sums[width : 2 * width] / count
        try:
            mean_square = float(sums[-1]) / (count * width)
            basis = _directions(self._sum(x.T @ x) / (count - 1), mean_square, dtype, self._rank, self._seed)
            x, y = x @ basis, y @ basis
            with torch.enable_grad():
                gram, cross = self._sum(torch.stack([x.T @ x, x.T @ y])).requires_grad_()
                variant = self.settings.variant or self._variant
                loss = _penalty(gram, cross, self.settings.gamma, self._beta, variant)
                by_gram, by_cross = torch.autograd.grad(loss, (gram, cross))
        except (torch.linalg.LinAlgError, ValueError):  # type: ignore[attr-defined]
            return None
        if not (loss.isfinite() and by_gram.isfinite().all() and by_cross.isfinite().all()):
            return None
        slope_in = (x @ (by_gram + by_gram.T) + y @ by_cross.T) @ basis.T
        return loss.detach(), slope_in, (x @ by_cross) @ basis.T

    @property
    def _processes(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def _process(self) -> int:
        return dist.get_rank(self._group) if self._processes > 1 else 0

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes."""
        if self._processes > 1:
            dist.all_reduce(values, group=self._group)
        return values

    def _gathered(self, number: int, device: torch.device) -> list[int]:
        """Return the number that each process has."""
        mine = torch.zeros(self._processes, dtype=torch.int64, device=device)
        mine[self._process] = number
        return [int(each) for each in self._sum(mine)]


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random numbers of one step of a regularizer: blocks and tokens are a function of seed and step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _rows(stream: Tensor, chosen: Tensor | None) -> Tensor:
    rows = stream.flatten(0, -2)
    return rows.clone() if chosen is None else rows[chosen.to(rows.device)]


def _recomputing() -> bool:
    """Whether a backward pass runs: a block then runs anew for its gradient, under an activation checkpoint."""
    return bool(torch._C._current_graph_task_id() != -1)


def _kept_from_checkpoints() -> saved_tensors_hooks:
    """Return a context whose saved tensors an enclosing activation checkpoint does not see.

    It counts what the block saves and recomputes it in the backward pass, when the hooks of this context are gone.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _directions(
    covariance: Float[Tensor, "d d"], mean_square: float, dtype: torch.dtype, rank: int, seed: int
) -> Float[Tensor, "d r"]:
    """Return the leading principal directions of the input that stand above its rounding noise.

    ``mean_square`` is that of the input before centring, ``dtype`` what it was stored in.

    Raises
    ------
    ValueError
        When no direction does.
    """
    width = covariance.shape[0]
    variance, basis = leading_directions(covariance, min(rank, width), seed)
    floor = max(8 * ROUNDING[dtype] ** 2 * mean_square, width * 2.0**-52 * float(variance[0]))
    kept = variance > floor
    if not bool(kept.any()) or not math.isfinite(floor):
        raise ValueError("the input of the block does not vary over the tokens; there is no spectrum to shape")
    return basis[:, kept]
