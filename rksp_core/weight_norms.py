"""The largest spectral norms of a model's matrices: the cheapest figure that grows before many runs diverge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rksp_core.capture import uncompiled
from rksp_core.profile import WeightNorms
from rksp_core.untouched import evaluating

EXACT = 256  # up to this shorter side from the Gram matrix
STEPS = 12  # of the power method beyond: a few per cent low where leading values are close, the same way each time


def weight_norms(model: nn.Module, blocks: Iterable[str]) -> WeightNorms:
    """Return the largest spectral norms of a model's matrices, infinite where one holds no finite numbers.

    ``blocks`` are the names of the residual blocks in the model. A parametrized matrix counts as the model uses it.
    """
    model = uncompiled(model)
    inside = {module: None for block in blocks for module in model.get_submodule(block).modules()}
    outside = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
    with evaluating(model):  # in training, torch's spectral norm moves each time that it is looked at
        return WeightNorms(
            _largest(weight for module in inside for weight in _weights(module)),
            _largest(module.weight for module in outside),
        )


@torch.no_grad()
def spectral_norm(weight: Tensor) -> float:
    """Return |W|_2 of a matrix (m, n), infinite where it holds no finite numbers; in float32 at least."""
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.float64):
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
        if not v.any():  # zeros, as many a projection begins
            return 0.0
    found = float(v.norm()) ** 0.5  # |W W^T v| of a unit v: the square of the norm
    return found if math.isfinite(found) else math.inf


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield the module's own parameters; one that is parametrized as it is used, not what it is made of."""
    if isinstance(module, parametrize.ParametrizationList):
        return
    yield from module.parameters(recurse=False)
    chosen = getattr(module, "parametrizations", None)
    if isinstance(chosen, nn.ModuleDict):
        yield from (getattr(module, name) for name in chosen)


def _largest(weights: Iterable[Tensor]) -> float | None:
    matrices = [weight for weight in weights if weight.dim() == 2 and weight.is_floating_point()]
    if not matrices or any(hasattr(weight, "full_tensor") or weight.is_meta for weight in matrices):
        return None
    return max(map(spectral_norm, matrices))
