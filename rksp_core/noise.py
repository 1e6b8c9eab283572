"""How much of a profile is the choice of the probe: standard errors of its figures, from the probe's own sequences.

A drift is only worth as much as it exceeds what another probe of the same kind would have said. Profiles of several
probes would tell; leaving out parts of the one probe tells nearly as much at no further data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rksp_core import batch as batches
from rksp_core.batch import Batch
from rksp_core.features import SPECTRAL, figures
from rksp_core.profiling import profile_model


def profile_noise(
    model: nn.Module, batch: Batch, *, groups: int = 4, samples: int = 2048, **options: Any
) -> dict[str, float]:
    """Return the standard error of each spectral feature and distance of a profile: delete-a-group jackknife.

    Sequences are dealt out to g groups in turn; a profile without each group gives ``theta_j``, and

        se^2 = (g - 1)/g sum_j (theta_j - mean theta)^2                            (Shao & Wu 1989, Eq. 2.1)

    Whole sequences are left out, because the tokens of one depend on each other, and each profile draws the same share
    of its tokens as the whole one. With few groups the error of the error is large, 1/sqrt(2(g - 1)): 40 % for g = 4.
    A mass counts modes over a threshold, and a minimum or maximum over layers may change its layer: there a jackknife
    is only rough, and rather too large (a small GPT against the spread over ten probes: masses .8 to 2.5 times, all
    else .9 to 1.7 times).
    The error of a distance is that of its quantiles, averaged as the distance is: two probes of one model lie about 0.8
    of ``sqrt(2) se`` apart, for W1 is an average of absolute differences and never 0.

    Parameters
    ----------
    groups
        g, at least 2; no more than there are sequences. Costs g profiles of (g - 1)/g of the probe each.
    samples, **options
        As for `rksp_core.profile_model`.

    Returns
    -------
    dict
        By the names of `rksp_core.features`; one that is unknown in any of the profiles is left out. Empty for fewer
        than two sequences.

    Raises
    ------
    ValueError
        When ``groups`` is below 2.
    RkspError
        As `rksp_core.profile_model` does.
    """
    if groups < 2:
        raise ValueError(f"groups must be at least 2, got {groups}")
    count = batches.sequences(batch)
    groups = min(groups, count)
    if groups < 2:
        return {}
    dealt = torch.arange(count) % groups
    without = []
    for group in range(groups):
        kept = dealt != group
        share = max(2, round(samples * int(kept.sum()) / count))
        without.append(figures(profile_model(model, batches.select(batch, kept), samples=share, **options)))
    numbers = {
        name: float(_standard_error([each.numbers[name] for each in without]))
        for name in SPECTRAL
        if all(name in each.numbers for each in without)
    }
    layers = [layer for layer in without[0].curves if all(layer in each.curves for each in without)]
    errors = [float(_standard_error([each.curves[layer] for each in without]).mean()) for layer in layers]
    return numbers | ({"wasserstein_mean": sum(errors) / len(errors), "wasserstein_max": max(errors)} if errors else {})


def _standard_error(without: Sequence[Any]) -> np.ndarray[Any, Any]:
    values = np.array(without)  # groups x ...
    deviations = values - values.mean(axis=0)
    error: np.ndarray[Any, Any] = np.sqrt((len(values) - 1) / len(values) * np.square(deviations).sum(axis=0))
    return error
