"""The figures of each step for other programs: Prometheus, TensorBoard, Weights and Biases.

The last two need ``pip install 'rksp[trainer]'``. `training.callbacks.MetricsLog` always
writes them to ``metrics.jsonl``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rksp_core.errors import ConfigError
from training import config as schema
from training.callbacks import Observer
from training.config import Config, Metrics
from training.run import Run
from training.step import Record

# figure of a record: name of the metric, what it is
GAUGES = {
    "step": ("rksp_training_step", "Updates made."),
    "loss": ("rksp_training_loss", "Task loss of the last step."),
    "gradient_norm": ("rksp_training_gradient_norm", "Gradient norm of the last step, before clipping."),
    "learning_rate": ("rksp_training_learning_rate", "Learning rate of the last step, an order's scale included."),
    "kss_weight": ("rksp_training_kss_weight", "Weight alpha of the KSS term."),
    "kss_term": ("rksp_training_kss_term", "Weighted KSS term of the last step; 0 where none was due."),
    "kss_gradient_ratio": ("rksp_training_kss_gradient_ratio", "Norm of the KSS gradient by that of the rest."),
    "kss_skipped_layers": ("rksp_training_kss_skipped_layers", "Layers without a KSS term since the start."),
    "auxiliary_loss": ("rksp_training_auxiliary_loss", "What the model and the penalties add to the loss."),
    "control_generation": ("rksp_training_control_generation", "Generation of the order that holds."),
    "step_seconds": ("rksp_training_step_duration_seconds", "Duration of the last step."),
    "tokens_per_second": ("rksp_training_tokens_per_second", "Tokens of the last step by its duration."),
}


def exporters(config: Config) -> list[Observer]:
    """Return the exporters that the configuration asks for; they write nothing before the first step.

    Raises
    ------
    ConfigError
        When a package is missing or the port is taken.
    """
    metrics = config.metrics
    _refuse_missing_packages(metrics)
    chosen: list[Observer] = []
    if metrics.prometheus is not None:
        chosen.append(Prometheus(config.run_id, metrics.prometheus))
    if metrics.tensorboard:
        chosen.append(TensorBoard())
    if metrics.wandb is not None:
        chosen.append(WandB(metrics.wandb))
    return chosen


def _refuse_missing_packages(metrics: Metrics) -> None:
    for name, wanted in (("tensorboard", metrics.tensorboard), ("wandb", metrics.wandb is not None)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(f"metrics.{name} needs the package {name}; pip install 'rksp[trainer]', or turn it off")


class Prometheus(Collector):
    """Serves the last step's figures; one that is not known has no sample."""

    def __init__(self, run_id: str, settings: schema.Prometheus) -> None:
        self._labels: dict[str, str] = {"run": run_id}
        self._figures: dict[str, float | None] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(settings.port, settings.address, registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {settings.address}:{settings.port} ({error.strerror}); "
                "change metrics.prometheus.port"
            ) from error

    @property
    def port(self) -> int:
        """The port that is served, where the configuration left the choice to the system by 0."""
        return int(self._server.server_port)

    def collect(self) -> Iterator[Metric]:
        """Yield a fresh family for each figure."""
        for figure, (name, help_text) in GAUGES.items():
            family = GaugeMetricFamily(name, help_text, labels=list(self._labels))
            value = self._figures.get(figure)
            if value is not None:
                family.add_metric(list(self._labels.values()), value)
            yield family

    def after(self, run: Run, record: Record | None) -> None:  # noqa: ARG002
        """Hold the figures for the next scrape; the ratio stays until it is measured again."""
        if record is not None:
            figures = record.to_dict()
            ratio = figures["kss_gradient_ratio"]
            figures["kss_gradient_ratio"] = self._figures.get("kss_gradient_ratio") if ratio is None else ratio
            self._figures = figures

    def back(self, run: Run) -> None:
        """Do nothing: what is served is the last step made."""

    def end(self, run: Run) -> None:  # noqa: ARG002
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TensorBoard:
    """Writes scalars to ``<output>/tensorboard``; what a run that is resumed had written behind that step is purged."""

    def __init__(self) -> None:
        self._writer: Any = None

    def after(self, run: Run, record: Record | None) -> None:
        """Write one step."""
        if record is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(run.config.output) / "tensorboard"), purge_step=record.step)
        for figure, value in record.to_dict().items():
            if value is not None and figure != "step":
                self._writer.add_scalar(figure, value, record.step)

    def back(self, run: Run) -> None:
        """Begin a new file with the next step, which purges what was written of it and later."""
        self.end(run)
        self._writer = None

    def end(self, run: Run) -> None:  # noqa: ARG002
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Logs to Weights and Biases; ``offline`` leaves everything below ``<output>/wandb`` and sends nothing."""

    def __init__(self, settings: schema.WandB) -> None:
        self._settings = settings
        self._run: Any = None

    def after(self, run: Run, record: Record | None) -> None:
        """Log one step."""
        if record is None:
            return
        if self._run is None:
            self._run = self._begin(run.config)
        figures = {name: value for name, value in record.to_dict().items() if value is not None}
        self._run.log(figures, step=record.step)

    def back(self, run: Run) -> None:
        """Do nothing: steps only rise there, and those that are made again are left out."""

    def end(self, run: Run) -> None:  # noqa: ARG002
        """Finish the run there."""
        if self._run is not None:
            self._run.finish()

    def _begin(self, config: Config) -> Any:
        import wandb

        return wandb.init(
            project=self._settings.project,
            name=config.run_id,
            id=config.run_id,
            dir=config.output,
            mode=self._settings.mode,
            resume="allow" if self._settings.mode == "online" else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
