"""A run as its watcher sees it: some figures every so many steps, and how far each has moved. Nothing looks ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rksp_core.drift import LEAST_EVENTS, MEMORY_KEPT, MEMORY_STEPS
from rksp_core.errors import ConfigError
from rksp_core.features import SPECTRAL
from training.experiments.record import Record

Kind = Literal["diverged", "failed", "healthy"]
Form = Literal["absolute", "baseline", "trailing", "sigmas"]
FORMS: tuple[Form, ...] = get_args(Form)

PLAIN = (
    "second_moment_top_share",
    "momentum_cosine",
    "attention_entropy_min",
    "attention_entropy_mean",
    "probe_loss",
    "probe_loss_tail",
)
# Scales, so that a drift is a factor.
LOGARITHMS = (
    "update_ratio_max",
    "update_ratio_median",
    "surprise_rms",
    "surprise_max",
    "attention_logit_max",
    "logit_max",
    "logit_rms",
    "hidden_rms_first",
    "hidden_rms_last",
    "hidden_rms_ratio",
    "weight_norm_max",
    "weight_norm_head",
)
DISTANCES = ("wasserstein_mean_from_first", "wasserstein_max_from_first")
TRAINER = (
    "loss",
    "loss_worst",
    "gradient_norm",
    "log_gradient_norm",
    "log_gradient_norm_median",
    "log_gradient_norm_worst",
    "gradient_norm_spike",
)
# ``_worst`` and ``_median`` are over the steps since the last event, ``spike`` is the logarithm of their quotient.
SIGNALS = (*SPECTRAL, *DISTANCES, *PLAIN, *(f"log_{name}" for name in LOGARITHMS), "log_sharpness", *TRAINER)
PLACES = {name: place for place, name in enumerate(SIGNALS)}


@dataclass(frozen=True)
class Series:
    """One run at one interval.

    Attributes
    ----------
    kind
        ``diverged``; ``failed``: finished without having learned, where an alarm is neither false nor a catch;
        ``healthy``: finished and learned.
    onset
        Of a diverged run; see `training.experiments.onset`.
    steps
        Of the E events, 0 first.
    forms
        By `FORMS`, (E, `SIGNALS`), NaN where not known: the value; its distance from that of the first event; from the
        trailing average before the event; and that in units of how far the run wanders. All as in `rksp_core.drift`,
        without the noise of the probe.
    """

    key: str
    kind: Kind
    onset: int | None
    norm: str
    optimizer: str
    rate: float
    steps: np.ndarray
    forms: Mapping[Form, np.ndarray]


def kind_of(record: Record) -> Kind:
    """Return how a run ended."""
    if record["labels"]["rksp"] is not None:
        return "diverged"
    return "healthy" if record["learned"] else "failed"


def series(record: Record, interval: int) -> Series:
    """Return a run, thinned to one event every ``interval`` steps.

    Raises
    ------
    ConfigError
        When the record has no profiles at these steps.
    """
    recorded = record["profiles"]["step"]
    if any(step % 10 for step in recorded) or interval % 10:
        raise ConfigError(f"{record['key']} cannot be thinned to {interval} steps; give a multiple of 10")
    places = [place for place, step in enumerate(recorded) if step % interval == 0]
    steps = np.array([recorded[place] for place in places])
    level = np.full((len(steps), len(SIGNALS)), math.nan)
    for name, column in _columns(record).items():
        level[:, PLACES[name]] = [math.nan if column[place] is None else column[place] for place in places]
    for name, values in _of_trainer(record, steps).items():
        level[:, PLACES[name]] = values
    level[:, PLACES["log_sharpness"]] = _sharpness(record, steps)
    drift, sigmas = trailing(steps, level)
    given = record["configuration"]
    return Series(
        key=record["key"],
        kind=kind_of(record),
        onset=record["onset"],
        norm=given["model.arguments.norm"],
        optimizer=given["optimizer.name"],
        rate=given["optimizer.learning_rate"],
        steps=steps,
        forms={"absolute": level, "baseline": level - level[:1], "trailing": drift, "sigmas": sigmas},
    )


def trailing(steps: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return drift and sigmas of values (E, S) at steps (E,), as `rksp_core.drift.measure` has them."""
    drift, sigmas = np.full_like(level, math.nan), np.full_like(level, math.nan)
    if len(steps) == 0:
        return drift, sigmas
    average, variance = level[0].copy(), np.full(level.shape[1], math.nan)
    for event in range(1, len(steps)):
        weight = 1.0 - MEMORY_KEPT ** ((steps[event] - steps[event - 1]) / MEMORY_STEPS)
        share = max(min(weight, 1.0 / LEAST_EVENTS), 1.0 / event)
        moved = level[event] - average
        with np.errstate(divide="ignore", invalid="ignore"):
            sigma = moved / np.sqrt(variance)
        drift[event], sigmas[event] = moved, np.where(np.isfinite(sigma), sigma, math.nan)
        known = np.isfinite(moved)
        average = np.where(known, average + weight * moved, np.where(np.isnan(average), level[event], average))
        square = moved * moved
        variance = np.where(
            known, np.where(np.isnan(variance), square, variance + share * (square - variance)), variance
        )
    return drift, sigmas


def _columns(record: Record) -> dict[str, Sequence[float | None]]:
    profiles = record["profiles"]
    kept = {name: profiles["features"][name] for name in SPECTRAL if name in profiles["features"]}
    kept |= {name: profiles["distances"][name] for name in DISTANCES if name in profiles["distances"]}
    kept |= {name: profiles["indicators"][name] for name in PLAIN if name in profiles["indicators"]}
    for name in LOGARITHMS:
        if name in profiles["indicators"]:
            kept[f"log_{name}"] = [_log(value) for value in profiles["indicators"][name]]
    return kept


def _of_trainer(record: Record, steps: np.ndarray) -> dict[str, list[float]]:
    losses = [math.nan if value is None else value for value in record["steps"]["loss"]]
    norms = [math.nan if (value := _log(each)) is None else value for each in record["steps"]["gradient_norm"]]
    found: dict[str, list[float]] = {name: [] for name in TRAINER}
    previous = 0
    for step in steps:
        since, spans = slice(previous, step), norms[previous:step]
        known = bool(spans) and bool(np.isfinite(spans).any())
        middle, worst = (float(np.nanmedian(spans)), float(np.nanmax(spans))) if known else (math.nan, math.nan)
        found["loss"].append(losses[step - 1] if step else math.nan)
        found["loss_worst"].append(max(losses[since], default=math.nan))
        found["log_gradient_norm"].append(norms[step - 1] if step else math.nan)
        found["gradient_norm"].append(math.exp(norms[step - 1]) if step else math.nan)
        found["log_gradient_norm_median"].append(middle)
        found["log_gradient_norm_worst"].append(worst)
        found["gradient_norm_spike"].append(worst - middle)
        previous = step
    return found


def _sharpness(record: Record, steps: np.ndarray) -> list[float]:
    """Return the logarithm of the last one measured; one that is not positive counts as the smallest of note, 1."""
    known = dict(zip(record["sharpness"]["step"], record["sharpness"]["largest"], strict=True))
    found = []
    for step in steps:
        last = max((each for each in known if each <= step), default=None)
        value = None if last is None else known[last]
        found.append(math.nan if value is None else math.log(max(value, 1.0)))
    return found


def _log(value: float | None) -> float | None:
    return None if value is None else math.log(max(value, 1e-16))
