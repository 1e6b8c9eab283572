"""What keeps a run from diverging, one method a file; `training.schema.stabilizers` shows how a YAML names each."""

from __future__ import annotations

from torch import nn

from training.schema.stabilizers import Stabilizers
from training.stabilizers.activation_variance import ActivationVariance
from training.stabilizers.gradient_penalty import GradientPenalty
from training.stabilizers.jacobian import Jacobian
from training.stabilizers.parametrizations import apply_parametrizations, parametrized, plain_state_dict
from training.stabilizers.penalty import Penalty
from training.stabilizers.residual_l2 import ResidualL2

__all__ = ["PENALTIES", "Penalty", "apply_parametrizations", "build_penalties", "parametrized", "plain_state_dict"]

PENALTIES: dict[str, type[Penalty]] = {
    "gradient_penalty": GradientPenalty,
    "residual_l2": ResidualL2,
    "jacobian": Jacobian,
    "activation_variance": ActivationVariance,
}


def build_penalties(section: Stabilizers, model: nn.Module, seed: int) -> list[Penalty]:
    """Return the penalties that the section names.

    Raises
    ------
    NoBlocksError
        When the model has no residual blocks to penalize.
    """
    named = {name: getattr(section, name) for name in PENALTIES}
    return [
        PENALTIES[name](model, **settings.model_dump(), seed=seed)
        for name, settings in named.items()
        if settings is not None
    ]
