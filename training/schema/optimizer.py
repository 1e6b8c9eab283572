"""The optimizers, told apart by ``name``; in all of them weight decay falls on matrices only.

    optimizer: {name: adamw, learning_rate: 0.001, betas: [0.9, 0.999], epsilon: 1.0e-8, weight_decay: 0.01}
    optimizer: {name: lion, learning_rate: 0.0001, betas: [0.9, 0.99], weight_decay: 0.1}
    optimizer: {name: lamb, learning_rate: 0.01, betas: [0.9, 0.999], epsilon: 1.0e-6, weight_decay: 0.01}
    optimizer: {name: sgd, learning_rate: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.0}

LAMB with warm-up is ``lamb`` beside ``schedule: {warmup: 1000}``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from training.schema.section import NotNegative, Positive, Section, Share


class AdamW(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Positive = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.01


class Lion(Section):
    """Lion (Chen et al. 2023): a rate 3-10 times smaller than AdamW's, and a decay as many times larger."""

    name: Literal["lion"] = "lion"
    learning_rate: Positive = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: NotNegative = 0.1


class Lamb(Section):
    """LAMB (You et al. 2020): the rate is the share of its own norm by which a parameter moves in a step."""

    name: Literal["lamb"] = "lamb"
    learning_rate: Positive = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-6
    weight_decay: NotNegative = 0.01


class SGD(Section):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum; the decay is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs an optimizer.momentum above 0, got 0; 0.9 is usual")
        return self


Optimizer = Annotated[AdamW | Lion | Lamb | SGD, Field(discriminator="name")]
