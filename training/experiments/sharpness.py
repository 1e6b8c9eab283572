"""Preconditioned sharpness: how far the step is from the edge of stability of the optimizer (Cohen et al. 2022).

    lr * the extreme eigenvalues of  D H D,    D = diag(sqrt(v_hat) + eps)^(-1/2)

H is the Hessian of the loss of a few training sequences; D H D is similar to P^-1 H, P being Adam's preconditioner with
its bias-corrected second moments. For SGD D is the identity. For Adam with beta1 = .9 the edge lies at 38 (arXiv:
2207.14484). Both ends are found by Lanczos from Hessian-vector products, since H is indefinite: a power iteration finds
one of them, and its sign is noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rksp_core.untouched import as_written, random_state_kept
from training.run import Run
from training.tasks import TRAINING, Batch

BREAKDOWN = 1e-6  # of the scale of the operator: below it the Krylov space is invariant


def sharpness(run: Run, rate: float, *, sequences: int, iterations: int) -> tuple[float, float] | None:
    """Return (rate x the largest, rate x the smallest eigenvalue) of D H D; None where the optimizer has no such D.

    Parameters
    ----------
    rate
        The learning rate of the last step.
    sequences
        The first so many of the last step's batch.
    iterations
        Lanczos steps, each two backward passes; the extremes are found from inside, so never exceeded.
    """
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    scales = _scales(run, parameters)
    if scales is None:
        return None
    inputs, targets = run.task.batch(TRAINING, max(1, run.step), run.config.task.batch)
    batch = Batch(inputs[:sequences], targets[:sequences].to(run.ranks.device))
    # the fused kernels of attention have no second derivative
    with random_state_kept(), torch.enable_grad(), as_written(), sdpa_kernel(SDPBackend.MATH):
        loss = run.task.loss(run.model(run.to_model(batch.inputs)), batch.targets)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        scale = torch.cat([each.flatten() for each in scales])

        def operator(vector: Tensor) -> Tensor:
            products = torch.autograd.grad(flat, parameters, grad_outputs=scale * vector, retain_graph=True)
            return scale * torch.cat([product.flatten() for product in products])

        generator = torch.Generator().manual_seed(run.config.seed)
        start = torch.randn(len(flat), generator=generator).to(flat)
        low, high = extremes(operator, start, iterations)
    return rate * high, rate * low


def extremes(operator: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[float, float]:
    """Return the smallest and the largest Ritz value of a symmetric operator, by Lanczos with re-orthogonalization.

    NaN where the operator gives numbers that are not finite.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(iterations):
        vector = operator(basis[-1]).detach()
        diagonal.append(float(vector.double() @ basis[-1].double()))
        for _ in range(2):  # once is not enough (Giraud, Langou & Rozloznik 2005)
            for each in basis:
                vector = vector - (vector @ each) * each
        length = float(vector.norm())
        scale = max(map(abs, (*diagonal, *beside)))
        if not length > BREAKDOWN * scale:  # NaN ends it as well
            break
        beside.append(length)
        basis.append(vector / length)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for place, value in enumerate(beside[: len(diagonal) - 1]):
        matrix[place, place + 1] = matrix[place + 1, place] = value
    if not matrix.isfinite().all():
        return float("nan"), float("nan")
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])


def _scales(run: Run, parameters: list[Tensor]) -> list[Tensor] | None:
    """Return the diagonal of D, parameter by parameter."""
    if run.config.optimizer.name == "sgd":
        return [torch.ones_like(parameter) for parameter in parameters]
    if run.config.optimizer.name != "adamw" or run.step == 0:
        return None
    group = run.optimizer.param_groups[0]
    scales = []
    for parameter in parameters:
        state = run.optimizer.state[parameter]
        v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        scales.append((v_hat.sqrt() + group["eps"]).rsqrt())
    return scales
