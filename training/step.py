"""One step of training: gradients over the micro-batches, what the stabilizers make of them, the update.

Every random number of a step is a function of (seed, step, process): batches come from counted streams, and torch is
seeded anew at each step. So a resumed run is bitwise the run that was never interrupted, and observers, whatever they
draw, change nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rksp_core.surprise import clip_surprise
from training.build import learning_rate
from training.labels import judge
from training.ranks import Ranks, sharded, synchronized, whole
from training.run import Run
from training.tasks import TRAINING, Batch


@dataclass(frozen=True)
class Record:
    """What one step was.

    Attributes
    ----------
    loss
        The task's, over all processes; ``auxiliary_loss`` is what the model and the penalties add.
    gradient_norm
        Before clipping. Under SAM, of the gradient at the perturbed weights, which is the one that is applied.
    learning_rate
        As applied, an order's scale included.
    kss_weight, kss_term, kss_skipped_layers
        alpha; alpha times the penalty, 0 where none was due; layers without a term since the start.
    kss_gradient_ratio
        |gradient of the KSS term| / |gradient of everything else|; None where it was not measured.
    tokens_per_second
        Over all processes; None for images.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    kss_weight: float
    kss_term: float
    kss_skipped_layers: int
    auxiliary_loss: float = 0.0
    kss_gradient_ratio: float | None = None
    control_generation: int = 0
    step_seconds: float = 0.0
    tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return strict JSON; a number that is not finite becomes null."""
        values = dataclasses.asdict(self).items()
        return {name: value if value is None or math.isfinite(value) else None for name, value in values}


def advance(run: Run) -> Record:
    """Make one step; when the run diverges in it, the weights stay as they are."""
    config, step, began = run.config, run.step + 1, time.perf_counter()
    # Not the model's: between a forward pass without gradients and the next step, FSDP2 shows whole ones there.
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    weight = run.regularizer.settings.alpha
    with ExitStack() as terms:
        for regularizer in (run.regularizer, *run.penalties):
            terms.enter_context(regularizer)
        batch = run.task.batch(TRAINING, step + run.data_offset, config.task.batch)
        kss_gradients = _KSSGradients(run, parameters)
        figures = _gradients(run, step, batch, kss_gradients)
        kss_gradient_ratio = kss_gradients.ratio()
        if run.sam is not None:
            with run.sam.perturbed(parameters):
                _gradients(run, step, batch)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    rate = learning_rate(config.optimizer.learning_rate, config.schedule, step, config.steps)
    rate *= run.follower.levers.learning_rate_scale or 1.0
    run.labels = judge(run.labels, step, figures.loss, float(norm))
    if not run.diverged:
        surprise = surprise_limit(run)
        if surprise is not None:
            clip_surprise(run.optimizer, surprise)
        clip = run.follower.levers.clip or config.stabilizers.clip
        if clip is not None:
            left = norm if surprise is None else whole(nn.utils.get_total_norm(gradients))
            nn.utils.clip_grads_with_norm_(parameters, clip, left)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        run.optimizer.step()
        run.step = step
    seconds = time.perf_counter() - began
    return Record(
        step=step,
        loss=figures.loss,
        gradient_norm=float(norm),
        learning_rate=rate,
        kss_weight=weight,
        kss_term=figures.kss_term,
        kss_skipped_layers=run.regularizer.skipped_layers,
        auxiliary_loss=figures.auxiliary_loss,
        kss_gradient_ratio=kss_gradient_ratio,
        control_generation=0 if run.follower.order is None else run.follower.order.generation,
        step_seconds=seconds,
        tokens_per_second=None if batch.inputs.is_floating_point() else batch.inputs.numel() / seconds,
    )


def surprise_limit(run: Run) -> float | None:
    """Return the tighter limit of surprise, an order's or the run's own; None where there is neither."""
    limits = (run.follower.levers.surprise, run.config.stabilizers.surprise)
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class _Figures:
    loss: float
    kss_term: float
    auxiliary_loss: float


def _gradients(run: Run, step: int, batch: Batch, kss_gradients: _KSSGradients | None = None) -> _Figures:
    """Leave in ``.grad`` the gradient of the step's whole batch: the mean over its micro-batches and processes."""
    seed_step(run.config.seed, step, run.ranks)
    run.optimizer.zero_grad(set_to_none=True)
    count = run.config.accumulation
    sums = torch.zeros(3, dtype=torch.float64)
    for index, (inputs, targets) in enumerate(zip(*(part.chunk(count) for part in batch), strict=True)):
        last = index == count - 1
        with synchronized(run.parallel, last):
            with autocast(run):
                logits = run.parallel(run.to_model(run.ranks.share(inputs)))
                loss = run.task.loss(logits, run.ranks.share(targets))
                term = run.regularizer.term().to(loss.device)
                added = sum((penalty.term(loss) for penalty in run.penalties), _auxiliary_loss(run))
            if kss_gradients is not None:
                kss_gradients.add(term / count)
            torch.autograd.backward((loss + term + added) / count)
        sums += torch.stack([part.detach().cpu().double() / count for part in (loss, term, added)])
    return _Figures(*run.ranks.mean(*sums))


class _KSSGradients:
    """Sums the gradient of the KSS term alone, at the few steps at which that is measured: it costs a backward pass."""

    def __init__(self, run: Run, parameters: list[nn.Parameter]) -> None:
        period = run.config.metrics.kss_ratio_every * run.regularizer.settings.interval
        due = run.regularizer.due and period > 0 and run.regularizer.steps % period == 0
        # A sharded parameter has no gradient of its own until FSDP2 has scattered it, which `autograd.grad` bypasses.
        self._on = due and not sharded(run.model)
        self._ranks, self._parameters = run.ranks, parameters
        self._sum = [torch.zeros_like(parameter) for parameter in parameters] if self._on else []

    def add(self, term: Tensor) -> None:
        if self._on and term.requires_grad:
            found = torch.autograd.grad(term, self._parameters, retain_graph=True, allow_unused=True)
            for total, part in zip(self._sum, found, strict=True):
                if part is not None:
                    total.add_(part, alpha=1 / self._ranks.size)

    def ratio(self) -> float | None:
        """Return |KSS| / |all - KSS|, once the backward passes have left the whole gradient in ``.grad``."""
        if not self._on:
            return None
        rest = []
        for parameter, part in zip(self._parameters, self._sum, strict=True):
            self._ranks.add_up(part)
            if parameter.grad is not None:
                rest.append(parameter.grad - part)
        return float(nn.utils.get_total_norm(self._sum) / nn.utils.get_total_norm(rest))


def autocast(run: Run) -> torch.autocast | nullcontext[None]:
    """Return the context of a forward pass in the configured precision."""
    if run.config.precision != "bfloat16":
        return nullcontext()
    return torch.autocast(run.ranks.device.type, torch.bfloat16)


def seed_step(seed: int, step: int, ranks: Ranks) -> None:
    """Seed the random state that a model may draw from (dropout, say) as a function of seed, step and process."""
    state = int(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)  # `torch.manual_seed` asks after every kind of device: 0.2 ms a step
    if ranks.device.type == "cuda":
        torch.cuda.manual_seed(state)


def _auxiliary_loss(run: Run) -> Tensor:
    """Return what the model itself adds to the loss of its last forward pass (a mixture of experts does)."""
    own = getattr(run.model, "auxiliary_loss", None)
    return torch.zeros((), device=run.ranks.device) if own is None else own()
