"""Every metric that rksp exports, as a table, and the endpoint that serves them.

The daemon puts values on a `Board`; `Collector` builds fresh families from it at each scrape, so the series of a run
that was removed end, and nothing is registered globally.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as BaseCollector
from prometheus_client.samples import Sample

from rksp_core.drift import Drift
from rksp_core.profile import ModelProfile, finite_or_none

Summary = Mapping[str, Mapping[str, float | None]]
Reader = Callable[[Summary, Drift], float | None]
WEIGHTS = "weight_norms"  # beside the fields of a profile's summary

BUILD_INFO, RUN_INFO, REPLAY = "rksp_build_info", "rksp_run_info", "rksp_replay_duration_seconds"
REPLAY_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True)
class Definition:
    """One row of the table. ``read`` says how a judged event sets it, ``layer`` which field a per-layer one shows."""

    name: str
    kind: Literal["gauge", "counter", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ("run",)
    read: Reader | None = None
    layer: str | None = None


def _over_layers(name: str, aggregate: str) -> Reader:
    return lambda summary, _: summary[name][aggregate]


def _of_weights(where: str) -> Reader:
    return lambda summary, _: summary[WEIGHTS][where]


def _gauge(name: str, text: str, read: Reader | None = None) -> Definition:
    return Definition(name, "gauge", text, read=read)


def _counter(name: str, text: str) -> Definition:
    return Definition(name, "counter", text)


def _layer(name: str, text: str, source: str) -> Definition:
    return Definition(name, "gauge", text, ("run", "layer"), layer=source)


METRICS: tuple[Definition, ...] = (
    Definition(BUILD_INFO, "info", "Versions of rksp, Python and the platform.", ()),
    Definition(RUN_INFO, "info", "The run that is watched: its model, probe and mode."),
    _gauge(
        "rksp_near_unit_mass_ratio",
        "Share of eigenvalues with modulus in [0.90, 1.05], mean over layers.",
        _over_layers("near_unit_mass", "mean"),
    ),
    _gauge(
        "rksp_near_unit_mass_min_ratio",
        "Share of eigenvalues with modulus in [0.90, 1.05], minimum over layers.",
        _over_layers("near_unit_mass", "min"),
    ),
    _gauge("rksp_sigma_max", "Largest singular value of the operator over layers.", _over_layers("sigma_max", "max")),
    _gauge(
        "rksp_henrici_departure_ratio",
        "Departure from normality relative to the Frobenius norm, maximum over layers.",
        _over_layers("henrici_departure", "max"),
    ),
    _gauge(
        "rksp_expansive_mass_ratio",
        "Share of eigenvalues with modulus above 1.05, mean over layers.",
        _over_layers("expansive_mass", "mean"),
    ),
    _gauge("rksp_spectral_radius_max", "Largest spectral radius over layers.", _over_layers("spectral_radius", "max")),
    _gauge(
        "rksp_kreiss_constant_max",
        "Kreiss constant at the reference radius, maximum over layers.",
        _over_layers("kreiss_constant", "max"),
    ),
    _gauge(
        "rksp_kreiss_constant_mean",
        "Kreiss constant at the reference radius, mean over layers.",
        _over_layers("kreiss_constant", "mean"),
    ),
    _gauge(
        "rksp_nonlinearity_ratio",
        "Share of the update that no linear operator explains, mean over layers.",
        _over_layers("nonlinearity_ratio", "mean"),
    ),
    _gauge(
        "rksp_reliable_modes_ratio",
        "Share of eigenvalues that pass the residual filter, mean over layers.",
        _over_layers("reliable_modes_ratio", "mean"),
    ),
    _gauge(
        "rksp_weight_norm_max",
        "Largest spectral norm of a weight matrix in the blocks; absent where a profile does not hold it.",
        _of_weights("blocks"),
    ),
    _gauge(
        "rksp_weight_norm_head",
        "Largest spectral norm of a linear map outside the blocks; absent where a profile does not hold it.",
        _of_weights("head"),
    ),
    _gauge(
        "rksp_near_unit_mass_drift",
        "Mean near-unit mass minus that of the run's first profile.",
        lambda _, drift: drift.from_baseline("near_unit_mass_mean"),
    ),
    _gauge(
        "rksp_kreiss_constant_drift",
        "Natural logarithm of the largest Kreiss constant over that of the run's first profile.",
        lambda _, drift: drift.from_baseline("log_kreiss_max"),
    ),
    _gauge(
        "rksp_drift_sigmas",
        "Smallest near-unit mass minus its trailing average, in trailing standard deviations.",
        lambda _, drift: drift.sigmas_from_trailing.get("near_unit_mass_min"),
    ),
    _gauge(
        "rksp_wasserstein_drift",
        "Wasserstein distance of the eigenvalues' moduli from those of the run's first profile, maximum over layers.",
        lambda _, drift: drift.moved("wasserstein_max", "baseline"),
    ),
    _gauge("rksp_divergence_probability_ratio", "Calibrated probability of divergence; absent until there is one."),
    _gauge("rksp_risk_level", "Level of the policy: 0 ok, 1 elevated, 2 high, 3 critical; absent until it judged."),
    _gauge("rksp_kss_desired_weight", "Weight of the regularizer that the policy asks for; 0 is off."),
    _gauge("rksp_kss_applied_weight", "Weight of the regularizer that the trainer acknowledged as active."),
    _gauge("rksp_learning_rate_desired_ratio", "Share of its learning rate that the policy asks for; 1 is its own."),
    _gauge("rksp_learning_rate_applied_ratio", "Share of its learning rate that the trainer acknowledged as active."),
    _gauge("rksp_surprise_desired_limit", "Limit of surprise that the policy asks for; absent while it asks for none."),
    _gauge("rksp_surprise_applied_limit", "Limit of surprise that the trainer acknowledged as active; absent without."),
    _gauge("rksp_control_desired_generation", "Generation of the last order that was issued; 0 before the first."),
    _gauge(
        "rksp_control_applied_generation", "Generation that the trainer acknowledged as active; 0 before the first."
    ),
    _gauge("rksp_control_acknowledgement_overdue", "1 while an order waits too long for the trainer's answer, else 0."),
    _counter("rksp_control_rollbacks_total", "How often the trainer said that an order took it back to a checkpoint."),
    _gauge("rksp_control_held", "1 while a person holds the policy back or ordered something else, else 0."),
    _gauge(
        "rksp_run_suspended",
        "1 while the run, or its checkpoints, cannot be watched and are tried again, for the reason in the log.",
    ),
    _gauge("rksp_run_last_scan_timestamp_seconds", "Time at which the run's folder was last looked through."),
    _gauge("rksp_checkpoint_last_processed_step", "Training step of the newest event that was judged."),
    _gauge("rksp_checkpoint_last_processed_timestamp_seconds", "Time at which an event was last judged."),
    _gauge("rksp_checkpoint_last_seen_timestamp_seconds", "Time at which a new event was last seen."),
    _gauge("rksp_checkpoint_backlog", "Events that are complete and wait to be processed."),
    _counter("rksp_checkpoints_processed_total", "Checkpoints and profile files that were judged."),
    _counter("rksp_checkpoints_failed_total", "Checkpoints and profile files given up after the last attempt."),
    _counter("rksp_checkpoints_skipped_total", "Checkpoints and profile files left out, for the reason in the log."),
    _counter("rksp_checkpoints_expired_total", "Checkpoints and profile files that vanished before they were read."),
    Definition(REPLAY, "histogram", "Time to replay the probe through one checkpoint."),
    _counter("rksp_replay_worker_restarts_total", "Replay workers started again after a crash or a time limit."),
    _counter("rksp_notifications_sent_total", "Events of the run that a webhook or a hook accepted."),
    _counter("rksp_notifications_failed_total", "Events of the run that a webhook or a hook did not accept."),
    _counter("rksp_notifications_dropped_total", "Events of the run given up before a webhook or a hook was asked."),
    _layer("rksp_layer_near_unit_mass_ratio", "Near-unit mass of one layer.", "near_unit_mass"),
    _layer("rksp_layer_spectral_radius", "Spectral radius of one layer.", "spectral_radius"),
    _layer("rksp_layer_kreiss_constant", "Kreiss constant of one layer at the reference radius.", "kreiss_constant"),
)

_BY_NAME = {definition.name: definition for definition in METRICS}
_FAMILIES: Mapping[str, Callable[..., Metric]] = {
    "info": InfoMetricFamily,
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}


@dataclass
class _Run:
    """The series of one run, by the name of their definition; a gauge that is not known yet has none.

    Samples are made when a value changes, not when somebody asks: a scrape of fifty runs only strings them together.
    """

    counters: dict[str, int]
    buckets: list[int] = field(default_factory=lambda: [0] * (len(REPLAY_BUCKETS) + 1))
    seconds: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)


class Board:
    """The current values of every run, written by the daemon and read at each scrape."""

    def __init__(self, build: Mapping[str, str], *, per_layer: bool = False) -> None:
        self._build = _info_samples(BUILD_INFO, [], build)
        self._per_layer = per_layer
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def add_run(self, run: str, info: Mapping[str, str]) -> None:
        """Start the series of a run, with every counter at 0."""
        entry = _Run({definition.name: 0 for definition in METRICS if definition.kind == "counter"})
        entry.samples = {name: _counter_samples(run, name, 0) for name in entry.counters}
        entry.samples[REPLAY] = _histogram_samples(run, entry)
        entry.samples[RUN_INFO] = _info_samples(RUN_INFO, [run], info)
        with self._lock:
            self._runs[run] = entry

    def describe_run(self, run: str, info: Mapping[str, str]) -> None:
        """Replace what the info metric of a run says."""
        with self._lock:
            self._runs[run].samples[RUN_INFO] = _info_samples(RUN_INFO, [run], info)

    def remove_run(self, run: str) -> None:
        """End the series of a run."""
        with self._lock:
            self._runs.pop(run, None)

    def set(self, run: str, name: str, value: float | None) -> None:
        """Set a gauge; None removes its series."""
        if _BY_NAME[name].kind != "gauge":
            raise KeyError(name)
        with self._lock:
            samples = self._runs[run].samples
            if value is None:
                samples.pop(name, None)
            elif name not in samples or samples[name][0].value != value:  # `Exposition` need not look at it again
                samples[name] = _gauge_samples(name, {(run,): value})

    def count(self, run: str, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            entry = self._runs[run]
            entry.counters[name] += amount
            entry.samples[name] = _counter_samples(run, name, entry.counters[name])

    def observe_replay(self, run: str, seconds: float) -> None:
        """Add one duration to the histogram."""
        with self._lock:
            entry = self._runs[run]
            entry.buckets[bisect_left(REPLAY_BUCKETS, seconds)] += 1
            entry.seconds += seconds
            entry.samples[REPLAY] = _histogram_samples(run, entry)

    def show(self, run: str, profile: ModelProfile, drift: Drift) -> None:
        """Set every gauge that a judged event sets; what it does not know has no series."""
        weights = dataclasses.asdict(profile.weights)
        summary = {**profile.summary, WEIGHTS: {where: finite_or_none(norm) for where, norm in weights.items()}}
        for definition in METRICS:
            if definition.read is not None:
                self.set(run, definition.name, definition.read(summary, drift))
        if not self._per_layer:
            return
        layers = {
            definition.name: _gauge_samples(
                definition.name,
                {
                    (run, layer.layer): value
                    for layer in profile.layers
                    if (value := getattr(layer, definition.layer)) is not None
                },
            )
            for definition in METRICS
            if definition.layer is not None
        }
        with self._lock:
            self._runs[run].samples |= layers

    def families(self) -> list[Metric]:
        """Return the metric families, in the order of the table."""
        with self._lock:
            return [self._family(definition) for definition in METRICS if definition.layer is None or self._per_layer]

    def _family(self, definition: Definition) -> Metric:
        family = _empty(definition)
        series = (entry.samples.get(definition.name, ()) for entry in self._runs.values())
        family.samples = list(itertools.chain.from_iterable(series)) if definition.labels else self._build
        return family


def _empty(definition: Definition) -> Metric:
    """Return the family of a definition, without samples."""
    # The library gives the metric of an info the suffix, and wants the name without it.
    name = definition.name.removesuffix("_info") if definition.kind == "info" else definition.name
    return _FAMILIES[definition.kind](name, definition.help, labels=definition.labels)


def _gauge_samples(name: str, values: Mapping[tuple[str, ...], float]) -> list[Sample]:
    gauge = cast("GaugeMetricFamily", _empty(_BY_NAME[name]))
    for labels, value in values.items():
        gauge.add_metric(labels, value)
    return gauge.samples


def _counter_samples(run: str, name: str, value: int) -> list[Sample]:
    counter = cast("CounterMetricFamily", _empty(_BY_NAME[name]))
    counter.add_metric([run], value)
    return counter.samples


def _info_samples(name: str, labels: Sequence[str], info: Mapping[str, str]) -> list[Sample]:
    about = cast("InfoMetricFamily", _empty(_BY_NAME[name]))
    about.add_metric(labels, dict(info))
    return about.samples


def _histogram_samples(run: str, entry: _Run) -> list[Sample]:
    histogram = cast("HistogramMetricFamily", _empty(_BY_NAME[REPLAY]))
    histogram.add_metric([run], _cumulative(entry.buckets), entry.seconds)
    return histogram.samples


class Collector(BaseCollector):
    """Gives a registry the families of a board."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        """Return fresh families."""
        return self._board.families()

    def describe(self) -> Iterable[Metric]:
        """Return the families without values: by these names a client may ask for some (``?name[]=``)."""
        return [_empty(definition) for definition in METRICS]


def registry_of(board: Board) -> CollectorRegistry:
    """Return a registry of its own that holds the board's metrics and nothing else."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(board))
    return registry


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    total, rows = 0, []
    for bound, count in zip((*map(str, REPLAY_BUCKETS), "+Inf"), buckets, strict=True):
        total += count
        rows.append((bound, float(total)))
    return rows
