"""When a divergence began: some time before the label says that there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MARGIN = 0.5  # nats above the best loss so far
FACTOR = 10.0  # times the usual gradient norm
WINDOW = 50  # steps whose median is the usual gradient norm
SMOOTHED = 11  # steps whose median is the loss so far
CALM = 5  # steps in a row without trouble before a trouble counts as another one


def onset(losses: Sequence[float | None], gradient_norms: Sequence[float | None], diverged_at: int) -> int:
    """Return the first step of the trouble that ended in divergence at step ``diverged_at``, 1..diverged_at.

    A step is in trouble when one of these holds:

    * its loss is more than `MARGIN` above the lowest running median (of `SMOOTHED` steps) of the losses before it;
    * its gradient norm is more than `FACTOR` times the median of the `WINDOW` steps before it;
    * either is not finite.

    Going back from the divergence, the trouble began after the last `CALM` steps in a row that were free of it, or at
    step 1 where there are none. The step of divergence itself is always in trouble. A spike that healed is thus no
    onset, and a run that never got on its feet has its onset at the start.

    A gradient norm that stays high, with the loss as it was, becomes the usual one after `WINDOW` / 2 steps, so such a
    trouble is dated late. A median over the steps without trouble would not be; it dates all 48 diverged tuning runs of
    benchmarks/data/risk alike. What is stored there was dated as it is here, so this stays.

    Parameters
    ----------
    losses, gradient_norms
        Of steps 1, 2, .. up to ``diverged_at`` at least; None where not finite. The gradient norm is before clipping.
    """
    loss, norm = (
        np.array([math.nan if v is None else v for v in values], float) for values in (losses, gradient_norms)
    )
    calm = 0
    for step in range(diverged_at - 1, 0, -1):
        calm = 0 if _in_trouble(loss, norm, step - 1) else calm + 1
        if calm == CALM:
            return step + CALM
    return 1


def _in_trouble(loss: np.ndarray, norm: np.ndarray, index: int) -> bool:
    if not (np.isfinite(loss[index]) and np.isfinite(norm[index])):
        return True
    before = slice(max(0, index - WINDOW), index)
    usual = np.nanmedian(norm[before]) if index and np.isfinite(norm[before]).any() else math.inf
    return bool(loss[index] > _best(loss[:index]) + MARGIN or norm[index] > FACTOR * usual)


def _best(loss: np.ndarray) -> float:
    """Return the lowest running median; of the first steps there is only one of fewer."""
    loss = loss[np.isfinite(loss)]
    if len(loss) == 0:
        return math.inf
    if len(loss) <= SMOOTHED:
        return float(np.median(loss))
    return float(np.median(np.lib.stride_tricks.sliding_window_view(loss, SMOOTHED), axis=1).min())
