"""Spectral and weight normalization of the matrices of the blocks, by `torch.nn.utils.parametrizations`.

    spectral_norm   W / sigma, sigma = u^T W v from a power iteration (Miyato et al. 2018, arXiv:1802.05957)
    weight_norm     g v / |v| for each row of W (Salimans and Kingma 2016, arXiv:1602.07868)

"The matrices" are the weights of the `nn.Linear` modules in the blocks; embeddings, head and norms stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from rksp_core import find_blocks
from rksp_core.errors import ConfigError
from rksp_core.untouched import evaluating
from training.schema.stabilizers import Stabilizers


def apply_parametrizations(section: Stabilizers, model: nn.Module) -> None:
    """Normalize the matrices of the blocks as ``section`` asks; before the optimizer and DDP are made.

    Spectral normalization draws its first vectors from torch's random state, as building the model did. Its power
    iteration runs once before each forward pass of the model in training mode, and not in eval mode. (Torch's own way,
    at each use of a weight, would iterate again where a checkpointed block is computed anew, and give its gradient at
    another weight than its output.)

    Raises
    ------
    ConfigError
        When there is no such matrix, one cannot be normalized because it is 0, or their size is that of muP.
    """
    if section.spectral_norm is None and section.weight_norm is None:
        return
    method = "weight_norm" if section.spectral_norm is None else "spectral_norm"
    found = _linear_maps(model)
    if not found:
        raise ConfigError(f"stabilizers.{method} needs an nn.Linear in the blocks of the model, and there is none")
    if any(factor != 1 for factor in getattr(model, "learning_rate_factors", dict)().values()):
        raise ConfigError(
            f"stabilizers.{method} takes the size of the matrices away, to which the learning rates of muP belong; "
            "choose another model.arguments.initialization"
        )
    for name, module in found:
        lengths = module.weight.detach().norm(dim=1)
        if not bool((lengths > 0).all() if section.spectral_norm is None else (lengths > 0).any()):
            raise ConfigError(
                f"stabilizers.{method} divides by the norm of {name}.weight, which starts at 0; "
                "choose another model.arguments.initialization"
            )
        if section.spectral_norm is None:
            parametrizations.weight_norm(module)
        else:
            parametrizations.spectral_norm(module, n_power_iterations=section.spectral_norm.iterations)
    if section.spectral_norm is not None:
        model.register_forward_pre_hook(_iterate)


def parametrized(model: nn.Module) -> bool:
    """Return whether the state of the model is more, and named otherwise, than its weights."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the effective weights, under the names that they have in the model without parametrizations.

    They are those of the next forward pass in eval mode; the model stays as it is.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if "parametrizations." not in name}
    with evaluating(model):
        for path, module in model.named_modules():
            if parametrize.is_parametrized(module):
                state |= {f"{path}.{name}".lstrip("."): getattr(module, name) for name in module.parametrizations}
    return state


def _linear_maps(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (f"{block.name}.{name}" if name else block.name, module)
        for block in find_blocks(model)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _iterate(model: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
    """Run the power iterations of a forward pass, and leave the norms in eval mode, in which they run none."""
    if not model.training:
        return
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            norm = module.parametrizations.weight[0]
            norm.train()
            with torch.no_grad():
                module.weight  # noqa: B018 - to look at it is to iterate
            norm.eval()
