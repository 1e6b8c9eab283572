"""The optimizers, told apart by ``name``."""

from __future__ import annotations

from typing import Literal

from training.schema.section import NotNegative, Positive, Section, Share


class AdamW(Section):
    """AdamW (Loshchilov and Hutter 2019); weight decay falls on matrices only."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Positive = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.01


Optimizer = AdamW
