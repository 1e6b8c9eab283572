"""The largest spectral norms of a model's matrices: the cheapest figure that grows before many runs diverge."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rksp_core.capture import uncompiled
from rksp_core.profile import WeightNorms

EXACT = 256  # up to this shorter side from the Gram matrix
STEPS = 12  # of the power method beyond: a few per cent low where leading values are close, the same way each time


@torch.no_grad()
def weight_norms(model: nn.Module, blocks: Iterable[str]) -> WeightNorms:
    """Return the largest spectral norms of a model's matrices, infinite where one holds no finite numbers.

    ``blocks`` are the names of the residual blocks in the model.
    """
    model = uncompiled(model)
    inside = {id(parameter) for block in blocks for parameter in model.get_submodule(block).parameters()}
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return WeightNorms(
        _largest(parameter for parameter in model.parameters() if id(parameter) in inside),
        _largest(weight for weight in linear if id(weight) not in inside),
    )


@torch.no_grad()
def spectral_norm(weight: Tensor) -> float:
    """Return |W|_2 of a matrix (m, n), infinite where it holds no finite numbers; in float32 at least."""
    weight = weight.detach()
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if min(weight.shape) == 0:
        return 0.0
    if weight.shape[0] <= EXACT:
        gram = weight @ weight.T
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))) if gram.isfinite().all() else math.inf
    generator = torch.Generator().manual_seed(weight.shape[0])
    v = torch.randn(weight.shape[0], generator=generator).to(weight)
    for _ in range(STEPS):
        v = weight @ (weight.T @ (v / v.norm()))
    found = float(v.norm()) ** 0.5  # |W W^T v| of a unit v: the square of the norm
    return found if math.isfinite(found) else math.inf


def _largest(weights: Iterable[Tensor]) -> float | None:
    matrices = [weight for weight in weights if weight.dim() == 2 and weight.is_floating_point()]
    if not matrices or any(hasattr(weight, "full_tensor") or weight.is_meta for weight in matrices):
        return None
    return max(map(spectral_norm, matrices))
