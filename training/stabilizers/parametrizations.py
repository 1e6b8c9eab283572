"""Spectral and weight normalization of the matrices of the blocks, by `torch.nn.utils.parametrizations`.

    spectral_norm   W / sigma, sigma = u^T W v from a power iteration (Miyato et al. 2018, arXiv:1802.05957)
    weight_norm     g v / |v| for each row of W (Salimans and Kingma 2016, arXiv:1602.07868)

The matrices are the weights of the `nn.Linear` modules in the blocks; embeddings, convolutions, head and norms stay as
they are. A block with other matrices (the experts of a mixture, the splines of a KAN) is refused: torch would take a
stack of them for one.
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
        When a block has no such matrix or others, one is 0 and cannot be normalized, or their size is that of muP.
    """
    if section.spectral_norm is None and section.weight_norm is None:
        return
    method = "weight_norm" if section.spectral_norm is None else "spectral_norm"
    found = _linear_maps(model, method)
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


def _linear_maps(model: nn.Module, method: str) -> list[tuple[str, nn.Linear]]:
    found = []
    for block in find_blocks(model):
        for name, module in block.module.named_modules(prefix=block.name):
            if isinstance(module, nn.Linear):
                found.append((name, module))
            elif not isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d):
                for other, parameter in module.named_parameters(prefix=name, recurse=False):
                    if parameter.dim() >= 2:
                        raise ConfigError(
                            f"stabilizers.{method} normalizes the weights of nn.Linear modules, and {other} "
                            f"{tuple(parameter.shape)} is none; choose another stabilizer for this model"
                        )
    if not found:
        raise ConfigError(f"stabilizers.{method} needs an nn.Linear in the blocks of the model, and there is none")
    return found


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
