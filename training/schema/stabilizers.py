"""What keeps a run from diverging, beside KSS; each is off (null) unless named, and they combine.

    stabilizers: {clip: 1.0}
    stabilizers: {surprise: 1.0}
    stabilizers: {sam: {rho: 0.05}}
    stabilizers: {spectral_norm: {iterations: 1}}
    stabilizers: {weight_norm: {}}
    stabilizers: {gradient_penalty: {weight: 0.1, interval: 10}}
    stabilizers: {residual_l2: {weight: 0.01, interval: 10, layer_fraction: 0.5}}
    stabilizers: {jacobian: {weight: 0.01, interval: 10, layer_fraction: 0.5}}
    stabilizers: {activation_variance: {weight: 0.01, interval: 10, layer_fraction: 0.5, target: input}}

The penalties come every ``interval`` steps on a share of the blocks, by default as often and on as many as KSS. Lion
and LAMB are optimizers (`training.schema.optimizer`), muP is the model's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from training.schema.section import Count, Positive, Section


class SAM(Section):
    """The step of the gradient at ``rho`` along the gradient (Foret et al. 2021); doubles the cost of a step."""

    rho: Positive = 0.05


class SpectralNorm(Section):
    """Matrices of the blocks over their largest singular value, by ``iterations`` of the power method a step."""

    iterations: Count = 1


class WeightNorm(Section):
    """Matrices of the blocks as lengths times directions of their rows (Salimans and Kingma 2016)."""


class GradientPenalty(Section):
    """``weight`` |d loss / d h[0]|^2, the squared norm of a sequence's own gradient (Drucker and LeCun 1992)."""

    weight: Positive
    interval: Count = 10


class ResidualL2(Section):
    """``weight`` times the mean square of a block's update."""

    weight: Positive
    interval: Count = 10
    layer_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5


class Jacobian(ResidualL2):
    """``weight`` times the squared Frobenius norm of a block's Jacobian per entry (Hoffman et al. 2019)."""


class ActivationVariance(ResidualL2):
    """``weight`` times the squared change of a token's variance in a block, or its deviation from ``one``."""

    target: Literal["input", "one"] = "input"


class Stabilizers(Section):
    """``clip``: the largest gradient norm (Pascanu et al. 2013); the others: a section each.

    ``surprise``: how many times its usual size a parameter's gradient may enter Adam's moments
    (`rksp_core.surprise.clip_surprise`).
    """

    clip: Positive | None = None
    surprise: Positive | None = None
    sam: SAM | None = None
    spectral_norm: SpectralNorm | None = None
    weight_norm: WeightNorm | None = None
    gradient_penalty: GradientPenalty | None = None
    residual_l2: ResidualL2 | None = None
    jacobian: Jacobian | None = None
    activation_variance: ActivationVariance | None = None

    @model_validator(mode="after")
    def _one_normalization(self) -> Stabilizers:
        if self.spectral_norm is not None and self.weight_norm is not None:
            raise ValueError(
                "stabilizers.spectral_norm and stabilizers.weight_norm both normalize the matrices of the blocks; "
                "name one of them"
            )
        return self
