"""How well scores order runs, and how honest probabilities are: with intervals, over all runs and within groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rksp_core.risk_fit import pairs_in_order

RESAMPLES = 1000  # of the runs, as in the paper
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure, its bootstrap interval of `LEVEL`, and the number of runs; NaN where it is not defined."""

    value: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        """Return e.g. ``0.951 [0.918, 0.978]``."""
        return "-" if np.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(statistic: Callable[[np.ndarray], float], runs: int, seed: int = 0) -> Estimate:
    """Return a statistic of all runs with a percentile interval.

    Parameters
    ----------
    statistic
        Indices of runs, with repetition -> value; NaN where it is not defined, which is left out.
    """
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(0, runs, runs)) for _ in range(RESAMPLES)]
    value = statistic(np.arange(runs))
    if np.isnan(drawn).all():
        return Estimate(value, np.nan, np.nan, runs)
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), runs)


def auroc(scores: np.ndarray, bad: np.ndarray, groups: Sequence[object] | np.ndarray | None = None) -> float:
    """Return the share of pairs (a bad run, a good one) whose scores are in that order; a tie is half a pair.

    With ``groups``, only pairs of one group count: what is left is what the group itself does not tell. NaN without a
    pair.
    """
    names = np.zeros(len(bad), dtype=int) if groups is None else numbered(groups)
    right = pairs = 0.0
    for name in range(names.max(initial=0) + 1):
        of_group = pairs_in_order(scores[names == name], bad[names == name])
        right, pairs = right + of_group[0], pairs + of_group[1]
    return right / pairs if pairs else float("nan")


def numbered(groups: Sequence[object] | np.ndarray) -> np.ndarray:
    """Return the number of each one's group, (n,); numbers as they are, so that a resample need not count again."""
    if isinstance(groups, np.ndarray) and groups.dtype.kind == "i":
        return groups
    return np.unique([str(group) for group in groups], return_inverse=True)[1]


def calibration_error(probabilities: np.ndarray, bad: np.ndarray, bins: int = 10) -> float:
    """Return the debiased root mean square difference of probability and frequency (Kumar et al. 2019, Sec. 4).

    Bins hold equally many runs. The plain estimate is never 0, not even of perfect probabilities: the variance of each
    bin's frequency is taken off. 0 where that leaves nothing.
    """
    squared = 0.0
    for members in _bins(probabilities, bins):
        if len(members) > 1:
            frequency = bad[members].mean()
            variance = frequency * (1 - frequency) / (len(members) - 1)
            gap = (probabilities[members].mean() - frequency) ** 2
            squared += len(members) / len(bad) * (gap - variance)
    return float(np.sqrt(max(squared, 0.0)))


def expected_calibration_error(probabilities: np.ndarray, bad: np.ndarray, bins: int = 10) -> float:
    """Return the mean absolute difference of probability and frequency over bins of equally many runs, as it is."""
    gaps = [len(m) * abs(probabilities[m].mean() - bad[m].mean()) for m in _bins(probabilities, bins)]
    return float(sum(gaps) / len(bad))


def calibration_by_chance(probabilities: np.ndarray, bins: int = 10, seed: int = 0) -> Estimate:
    """Return `expected_calibration_error` of outcomes drawn with exactly these probabilities: mean and range.

    What perfect probabilities would show on so few runs. The plain error is to be compared with the range; its own
    bootstrap has that bias twice, and would call 8 of 100 honest ones dishonest where 2.5 are meant (48 runs).
    """
    random = np.random.default_rng(seed)
    drawn = random.random((RESAMPLES, len(probabilities))) < probabilities
    errors = [expected_calibration_error(probabilities, outcomes, bins) for outcomes in drawn]
    low, high = np.quantile(errors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(np.mean(errors)), float(low), float(high), len(probabilities))


def reliability(probabilities: np.ndarray, bad: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """Return (mean probability, frequency, runs) of each bin of equally many runs, ascending."""
    return [(float(probabilities[m].mean()), float(bad[m].mean()), len(m)) for m in _bins(probabilities, bins)]


def _bins(probabilities: np.ndarray, bins: int) -> list[np.ndarray]:
    """Return the indices of each bin, of equally many runs, none of them empty."""
    return np.array_split(np.argsort(probabilities, kind="stable"), min(bins, len(probabilities)))
