"""Fit a risk model to runs whose outcome is known: penalized logistic regression under sign constraints.

    minimize  -sum_i log P(outcome_i | x_i) + (ridge / 2) |w|^2    over c and w,    w_j >= 0 where more is risky

The ridge is the one of the smallest cross-validated log loss over the same runs; no other run is looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from rksp_core.errors import ConfigError
from rksp_core.launch import FEATURES, NAMES, Feature
from rksp_core.outcomes import Outcome
from rksp_core.risk_model import RiskModel, apart_from

Bounds = tuple[float | None, float | None]

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 8
BOOTSTRAP = 200  # samples
REACH = 0.99  # quantile of the distances between a run and its nearest: as far as the model answers
SAME = 0.02  # the scale of what is the same in all runs, so that any other value is far away
LEAST_RUNS = 30  # and so many of either outcome as there are features


def fit(
    outcomes: Sequence[Outcome],
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    left_out: Collection[str] = (),
) -> RiskModel:
    """Return the model that these runs give.

    Its ``about`` says how many they are, and how well runs were predicted by the fits without them (cross-validated):
    the area under the ROC curve, and that of the learning rate alone beside it.

    Parameters
    ----------
    outcomes
        In any order: the result depends on their content and the seed only. Runs of one configuration that differ in
        their seed only count as so many runs, and make the intervals too narrow.
    seed
        Of the folds and the bootstrap.
    about
        What else the model is to say of itself.
    left_out
        Features that get no weight, to see what the others do without them.

    Raises
    ------
    ConfigError
        When there are too few of them, or too few of one outcome, or their horizons or look-aheads differ.
    """
    runs = sorted(outcomes, key=lambda run: run.name)
    y = np.array([run.diverged for run in runs], dtype=float)
    least = len(FEATURES)
    if len(runs) < LEAST_RUNS or min(y.sum(), (1 - y).sum()) < least:
        raise ConfigError(
            f"{len(runs)} runs, {int(y.sum())} of them diverged, are too few to fit a risk to; give at least "
            f"{LEAST_RUNS}, {least} of either outcome"
        )
    horizon = _same("horizon", [run.horizon for run in runs])
    steps = _same("number of look-ahead steps", [run.launch.steps for run in runs])
    raw = np.array([list(run.launch.features().values()) for run in runs])  # (n, p)
    mean, scale = raw.mean(axis=0), raw.std(axis=0)
    scale[scale < SAME] = SAME  # never exactly 0: the mean of equal numbers is rounded
    x = (raw - mean) / scale
    random = np.random.default_rng(seed)
    bounds = [_bounds(feature, left_out) for feature in FEATURES]
    ridge, predicted = best_ridge(x, y, bounds, random)
    weights = [fit_weights(x, y, ridge, bounds)]
    while len(weights) <= BOOTSTRAP:
        chosen = random.integers(0, len(y), len(y))
        if 0 < y[chosen].sum() < len(y):
            weights.append(fit_weights(x[chosen], y[chosen], ridge, bounds))
    return RiskModel(
        mean=mean,
        scale=scale,
        weights=np.array(weights),
        runs=x,
        diverged=y,
        names=tuple(run.name for run in runs),
        limit=_limit(x, y == 1),
        horizon=horizon,
        look_ahead_steps=steps,
        about={
            **(about or {}),
            "runs": len(runs),
            "diverged": int(y.sum()),
            "auroc_cross_validated": round(auroc(predicted, y), 4),
            "auroc_of_the_learning_rate": round(auroc(x[:, NAMES.index("log_learning_rate")], y), 4),
            "ridge": ridge,
            "seed": seed,
        },
    )


def best_ridge(
    x: np.ndarray, y: np.ndarray, bounds: Sequence[Bounds], random: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Return the ridge of the smallest cross-validated log loss, and the log-odds of each run without its fold, (n,).

    x are standardized features, (n, p), y outcomes, 1 or 0, (n,), ``bounds`` those of the p weights. Each fold has its
    share of both outcomes.
    """
    folds = np.empty(len(y), dtype=int)
    for outcome in (0, 1):
        members = random.permutation(np.flatnonzero(y == outcome))
        folds[members] = np.arange(len(members)) % FOLDS
    predicted = {ridge: np.empty(len(y)) for ridge in RIDGES}
    for fold in range(FOLDS):
        left_out = folds == fold
        for ridge, odds in predicted.items():
            w = fit_weights(x[~left_out], y[~left_out], ridge, bounds)
            odds[left_out] = w[0] + x[left_out] @ w[1:]
    best = min(RIDGES, key=lambda ridge: float(np.logaddexp(0, predicted[ridge]).sum() - y @ predicted[ridge]))
    return best, predicted[best]


def fit_weights(x: np.ndarray, y: np.ndarray, ridge: float, bounds: Sequence[Bounds]) -> np.ndarray:
    """Return the intercept and the weights, (1 + p,), of the penalized regression of y (n,) on x (n, p)."""
    design = np.column_stack([np.ones(len(x)), x])
    penalty = np.array([0.0, *[ridge] * x.shape[1]])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        odds = design @ w
        value = float(np.logaddexp(0, odds).sum() - y @ odds + 0.5 * penalty @ w**2)
        return value, design.T @ (expit(odds) - y) + penalty * w

    found = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", bounds=[(None, None), *bounds])
    return np.asarray(found.x)


def auroc(scores: np.ndarray, y: np.ndarray) -> float:
    """Return the share of pairs of a run that diverged (y = 1) and one that did not whose scores are in that order."""
    right, pairs = pairs_in_order(scores, y == 1)
    return right / pairs


def pairs_in_order(scores: np.ndarray, bad: np.ndarray) -> tuple[float, int]:
    """Return how many pairs (a bad run, a good one) have their scores in that order, and how many there are.

    A tie is half a pair. ``bad`` holds truth values, (n,). From the ranks, as Mann and Whitney's U.
    """
    count = int(bad.sum())
    return float(rankdata(scores)[bad].sum() - count * (count + 1) / 2), count * (len(bad) - count)


def _same(what: str, values: Sequence[int]) -> int:
    if len(set(values)) > 1:
        raise ConfigError(
            f"the runs differ in their {what} ({min(values)} to {max(values)}), so their outcomes do not mean the "
            "same; give runs that agree in it"
        )
    return values[0]


def _bounds(feature: Feature, left_out: Collection[str]) -> Bounds:
    if feature.name in left_out:
        return 0.0, 0.0
    return (0.0, None) if feature.risky else (None, None)


def _limit(x: np.ndarray, diverged: np.ndarray) -> float:
    """Return the `REACH` quantile of the distances of the runs, each from the nearest of the others."""
    nearest = [np.delete(apart_from(x, diverged, run), place).min() for place, run in enumerate(x)]
    return float(np.quantile(nearest, REACH))
