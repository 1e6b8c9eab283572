"""When is a run called diverged? Two labels, always recorded together, with the horizon they were judged over.

paper   Kim et al. 2026, Sec. 3.1: loss > 50, or gradient norm > 500, or either not finite, at any one step.
rksp    loss > 50, or either not finite, or gradient norm > 500 on 5 steps in a row. One step above 500 was seen on
        healthy runs (SubLN in its warm-up), so a single spike is no divergence.

The gradient norm is the one before clipping.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

LOSS_LIMIT = 50.0
GRADIENT_LIMIT = 500.0
STEPS_IN_A_ROW = 5


@dataclass(frozen=True)
class Labels:
    """The first step at which each label held (None: not yet), and the steps in a row above the gradient limit."""

    paper: int | None = None
    rksp: int | None = None
    in_a_row: int = 0


def judge(labels: Labels, step: int, loss: float, gradient_norm: float) -> Labels:
    """Return the labels after one more step."""
    broken = not math.isfinite(loss) or not math.isfinite(gradient_norm) or loss > LOSS_LIMIT
    steep = gradient_norm > GRADIENT_LIMIT
    in_a_row = labels.in_a_row + 1 if steep else 0
    paper = step if labels.paper is None and (broken or steep) else labels.paper
    rksp = step if labels.rksp is None and (broken or in_a_row >= STEPS_IN_A_ROW) else labels.rksp
    return dataclasses.replace(labels, paper=paper, rksp=rksp, in_a_row=in_a_row)
