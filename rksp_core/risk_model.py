"""How likely a run diverges, from what is known before its first step: a small calibrated model that explains itself.

    P(diverged within the horizon) = sigmoid(c + sum_j w_j (x_j - mean_j) / scale_j),    w_j >= 0 where more is risky

x are the features of a launch (`rksp_core.launch`). The weights were fitted to runs whose outcome is known
(`rksp_core.risk_fit`), and once more to each of some hundred bootstrap samples of those runs: the spread of their
answers is the interval. A launch that is unlike all of those runs gets no probability.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from rksp_core.errors import ConfigError
from rksp_core.launch import FAMILIES, FEATURES, NAMES, Launch

SCHEMA = "rksp.risk_model/1"
INTERVAL = (0.05, 0.95)  # quantiles over the bootstrap samples
DIVERGENCE = "divergence"
BUNDLED = ("divergence.json", "failure.json")  # in the folder risk_models of this package
ARRAYS = ("mean", "scale", "weights", "runs", "diverged")
ROUNDING = 1e-6  # of a standardized feature
REFINEMENTS = 3  # halvings of the bracket, on the scale of the logarithm of the rate


@dataclass(frozen=True)
class Risk:
    """What a model says of one launch.

    Attributes
    ----------
    probability
        Of divergence within the model's horizon, 0..1; None where the launch is too far from the runs it was fitted to.
    interval
        5 % and 95 % quantiles over the bootstrap samples; None with the probability.
    reasons
        What pushed the log-odds away from those of the mean run, the strongest first: (feature, change of log-odds).
    distance, limit
        To the nearest run it was fitted to (`apart_from`), and how far it may be.
    outside
        Why there is no probability, as a sentence; "" where there is one.
    outcome
        What the probability is of, in words.
    """

    probability: float | None
    interval: tuple[float, float] | None
    reasons: tuple[tuple[str, float], ...]
    distance: float
    limit: float
    outside: str = ""
    outcome: str = DIVERGENCE


@dataclass(frozen=True)
class SafeRate:
    """The learning rate at which the risk crosses a threshold.

    ``rate`` is None where it does not cross within the rates that were tried: ``highest`` is then safe, or ``lowest``
    is not (``crossed``). ``interval`` holds the 5 % and 95 % quantiles over the bootstrap samples; an end that lies
    beyond the rates that were tried is None. ``outcome`` is what the risk is of.
    """

    threshold: float
    rate: float | None
    interval: tuple[float | None, float | None]
    lowest: float
    highest: float
    crossed: bool
    outcome: str = DIVERGENCE


@dataclass(frozen=True, eq=False)
class RiskModel:
    """The fitted model; made by `rksp_core.risk_fit.fit`, read from a file by `read`.

    Attributes
    ----------
    mean, scale
        (p,), of the features over the runs; features in the order of `rksp_core.launch.NAMES`.
    weights
        (1 + B, 1 + p): intercept and weights, first of the fit to all runs, then of each bootstrap sample.
    runs
        (n, p): the standardized features of the runs; ``diverged`` (n), 1 or 0, and ``names`` (n) what they are called.
    limit
        Largest distance to the nearest of them at which the model answers.
    horizon
        Steps within which the runs diverged or did not.
    look_ahead_steps
        Steps of the look-ahead that the features come from.
    about
        Whatever says where it comes from, as JSON: the records, their number, how well it did on others.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    runs: np.ndarray
    diverged: np.ndarray
    names: tuple[str, ...]
    limit: float
    horizon: int
    look_ahead_steps: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def risk(self, launch: Launch) -> Risk:
        """Return the risk of a launch.

        Raises
        ------
        ConfigError
            When its optimizer is of no known family, or its rate is not positive.
        """
        x = self._standardized(launch.features())
        apart = apart_from(self.runs, self.diverged.astype(bool), x)
        distance = float(apart.min())
        shares = self.weights[0, 1:] * x
        order = np.argsort(-np.abs(shares))
        reasons = tuple((NAMES[place], float(shares[place])) for place in order)
        if distance > self.limit:
            nearest = self.names[int(apart.argmin())]
            return Risk(None, None, reasons, distance, self.limit, self._outside(x, distance, nearest), self.outcome)
        probabilities = expit(self._log_odds(x))
        low, high = np.quantile(probabilities[1:], INTERVAL)
        interval = float(low), float(high)
        return Risk(float(probabilities[0]), interval, reasons, distance, self.limit, outcome=self.outcome)

    def covers(self, *, optimizer: str, depth: int, width: int) -> bool:
        """Whether there may be a probability for such a model, whatever its look-ahead brings: that need not be made.

        ``optimizer`` may be of no known family.
        """
        if optimizer not in FAMILIES:
            return False
        free = [place for place, feature in enumerate(FEATURES) if not feature.risky]
        nothing = {"losses": (), "gradient_norms": (), "hidden_rms": (None, None), "finite": False, "steps": 1}
        launches = [
            Launch(1.0, optimizer, depth, width, **nothing, normalized=normalized, clipped=False)  # type: ignore[arg-type]
            for normalized in (False, True)  # the look-ahead will tell
        ]
        apart = [self._standardized(launch.features()) - self.runs for launch in launches]
        return bool(np.linalg.norm(np.concatenate(apart)[:, free], axis=1).min() <= self.limit)

    def safe_rate(self, launch_at: Callable[[float], Launch], rates: Sequence[float], threshold: float) -> SafeRate:
        """Return the rate at which the risk crosses ``threshold``: the largest safe one.

        The risk at a rate is taken as the largest of all rates up to it, so that more rate never means less risk, not
        even where a look-ahead at a higher rate happens to go well.

        Parameters
        ----------
        launch_at
            Makes the launch at a rate, with a look-ahead of its own.
        rates
            To begin with, ascending; the bracket that the crossing lies in is then halved `REFINEMENTS` times.
        threshold
            0 < threshold < 1.
        """
        odds = {rate: self._log_odds(self._standardized(launch_at(rate).features())) for rate in rates}
        wanted = math.log(threshold / (1 - threshold))
        for _ in range(REFINEMENTS):
            ascending = sorted(odds)
            highest = np.maximum.accumulate([odds[rate][0] for rate in ascending])
            above = int(np.searchsorted(highest, wanted, side="right"))
            if above in (0, len(ascending)):
                break
            middle = math.sqrt(ascending[above - 1] * ascending[above])
            odds[middle] = self._log_odds(self._standardized(launch_at(middle).features()))
        ascending = sorted(odds)
        curves = np.maximum.accumulate(np.array([odds[rate] for rate in ascending]), axis=0)  # (rates, 1 + B)
        crossings = [_crossing(np.log(ascending), curve, wanted) for curve in curves.T]
        rate, spread = crossings[0], np.sort(crossings[1:])
        low, high = (float(spread[round(q * (len(spread) - 1))]) for q in INTERVAL)
        return SafeRate(
            threshold=threshold,
            rate=_rate(rate),
            interval=(_rate(low), _rate(high)),
            lowest=float(ascending[0]),
            highest=float(ascending[-1]),
            crossed=rate < math.inf,
            outcome=self.outcome,
        )

    @property
    def outcome(self) -> str:
        """What the probability is of, in words: of divergence, unless ``about`` says something else."""
        return str(self.about.get("outcome", DIVERGENCE))

    @property
    def sha256(self) -> str:
        """Names the model: the hash of its content."""
        return hashlib.sha256(_text(self._content()).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of its file, which `read` reads."""
        return _text({"schema": SCHEMA, "sha256": self.sha256, **self._content()}) + "\n"

    @classmethod
    def bundled(cls) -> tuple[RiskModel, ...]:
        """Return the models that come with this package, `BUNDLED`: of divergence, and of failure of either kind."""
        with as_file(files("rksp_core") / "risk_models") as folder:
            return tuple(cls.read(folder / name) for name in BUNDLED)

    @classmethod
    def read(cls, path: Path) -> RiskModel:
        """Read a model.

        Raises
        ------
        ConfigError
            When there is none, it is damaged, or its features are not those of this version.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("schema") != SCHEMA:
                raise ConfigError(
                    f"{path} has schema {document.get('schema')!r}, expected {SCHEMA!r}; make it anew "
                    "with `rksp calibrate`"
                )
            if tuple(document["features"]) != NAMES:
                raise ConfigError(
                    f"{path} knows other features than this version ({', '.join(NAMES)}); make it anew "
                    "with `rksp calibrate`"
                )
            arrays: dict[str, Any] = {name: np.array(document[name], dtype=float) for name in ARRAYS}
            model = cls(
                **arrays,
                names=tuple(document["names"]),
                limit=document["limit"],
                horizon=document["horizon"],
                look_ahead_steps=document["look_ahead_steps"],
                about=document["about"],
            )
            model._check()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"cannot read the risk model {path} ({error}); make it anew with `rksp calibrate`"
            ) from error
        if document.get("sha256") != model.sha256:
            raise ConfigError(f"{path} was changed after it was made; make it anew with `rksp calibrate`")
        return model

    def _check(self) -> None:
        p = len(NAMES)
        shapes = self.mean.shape, self.scale.shape, self.weights.shape[1:], self.runs.shape[1:], self.diverged.shape
        n = len(self.names)
        if shapes != ((p,), (p,), (p + 1,), (p,), (n,)) or len(self.runs) != n or len(self.weights) < 2:
            raise ValueError("its arrays do not fit together")

    def _content(self) -> dict[str, Any]:
        return {
            "features": list(NAMES),
            **{name: _rounded(getattr(self, name)) for name in ARRAYS},
            "names": list(self.names),
            "limit": float(f"{self.limit:.6g}"),
            "horizon": self.horizon,
            "look_ahead_steps": self.look_ahead_steps,
            "about": dict(self.about),
        }

    def _standardized(self, features: Mapping[str, float]) -> np.ndarray:
        return np.asarray((np.array([features[name] for name in NAMES]) - self.mean) / self.scale)

    def _log_odds(self, x: np.ndarray) -> np.ndarray:
        """(p,) -> (1 + B,)."""
        return np.asarray(self.weights[:, 0] + self.weights[:, 1:] @ x)

    def _outside(self, x: np.ndarray, distance: float, nearest: str) -> str:
        low, high = self.runs.min(axis=0), self.runs.max(axis=0)
        beyond = [
            f"{feature.words} is another one"
            if not feature.name.startswith("log_")  # it says yes or no
            else f"{feature.words} is {self._plain(place, x)}, the runs have {self._plain(place, low)} to "
            f"{self._plain(place, high)}"
            for place, feature in enumerate(FEATURES)
            if not feature.risky and not low[place] - ROUNDING <= x[place] <= high[place] + ROUNDING
        ]
        what = "; ".join(beyond) or "no single figure is beyond theirs, but no run combines them so"
        return (
            f"unlike the {len(self.runs)} runs that the risk was calibrated on ({what}; the nearest, {nearest}, is "
            f"{distance:.2g} standard deviations away, {self.limit:.2g} are allowed); calibrate on runs of your own "
            "with `rksp calibrate`"
        )

    def _plain(self, place: int, x: np.ndarray) -> str:
        value = float(x[place] * self.scale[place] + self.mean[place])
        return f"{math.exp(value):.3g}" if NAMES[place].startswith("log_") else f"{value:.2g}"


def apart_from(runs: np.ndarray, diverged: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return how far a launch is from each run, (n,), in standard deviations of the features.

    More of a risky feature never means less risk. So a run that diverged speaks for every launch that has at least as
    much of each of them, one that did not for every launch that has at most as much, and such a launch is not far from
    it by these features, however large the difference is.

    Parameters
    ----------
    runs
        (n, p), standardized.
    diverged
        (n,), truth values.
    x
        (p,), standardized.
    """
    more = x - runs
    ahead = np.where(diverged[:, None], np.minimum(more, 0), np.maximum(more, 0))
    return np.asarray(np.linalg.norm(np.where([feature.risky for feature in FEATURES], ahead, more), axis=1))


def _crossing(log_rates: np.ndarray, odds: np.ndarray, wanted: float) -> float:
    """Return the logarithm of the rate at which ascending odds reach ``wanted``; -inf or inf where they do not."""
    above = int(np.searchsorted(odds, wanted, side="right"))
    if above == 0:
        return -math.inf
    if above == len(odds):
        return math.inf
    share = (wanted - odds[above - 1]) / (odds[above] - odds[above - 1])
    return float(log_rates[above - 1] + share * (log_rates[above] - log_rates[above - 1]))


def _rate(logarithm: float) -> float | None:
    return math.exp(logarithm) if math.isfinite(logarithm) else None


def _rounded(values: np.ndarray) -> Any:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.6g}"))


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
