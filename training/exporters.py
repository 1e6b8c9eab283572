"""The figures of each step for other programs: Prometheus, TensorBoard, Weights and Biases.

The last two need ``pip install 'rksp[trainer]'``. `training.callbacks.MetricsLog` always
writes them to ``metrics.jsonl``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rksp_core.errors import ConfigError
from training.callbacks import Observer
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


def exporters(run: Run) -> list[Observer]:
    """Return the exporters that the configuration asks for.

    Raises
    ------
    ConfigError
        When a package is missing or the port is taken.
    """
    metrics = run.config.metrics
    chosen: list[Observer] = []
    if metrics.prometheus is not None:
        chosen.append(Prometheus(run))
    if metrics.tensorboard:
        chosen.append(TensorBoard(run))
    if metrics.wandb is not None:
        chosen.append(WandB(run))
    return chosen


class Prometheus(Collector):
    """Serves the last step's figures; one that is not known has no sample."""

    def __init__(self, run: Run) -> None:
        self._labels, self._figures = {"run": run.config.run_id}, {}
        settings, registry = run.config.metrics.prometheus, CollectorRegistry()
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

    def end(self, run: Run) -> None:  # noqa: ARG002
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TensorBoard:
    """Writes scalars to ``<output>/tensorboard``."""

    def __init__(self, run: Run) -> None:
        _package("tensorboard", "metrics.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run.config.output) / "tensorboard"), purge_step=run.step + 1)

    def after(self, run: Run, record: Record | None) -> None:  # noqa: ARG002
        """Write one step."""
        if record is not None:
            for figure, value in record.to_dict().items():
                if value is not None and figure != "step":
                    self._writer.add_scalar(figure, value, record.step)

    def end(self, run: Run) -> None:  # noqa: ARG002
        """Flush and close."""
        self._writer.close()


class WandB:
    """Logs to Weights and Biases; ``offline`` leaves everything below ``<output>/wandb``."""

    def __init__(self, run: Run) -> None:
        wandb = _package("wandb", "metrics.wandb")
        config = run.config
        self._run = wandb.init(
            project=config.metrics.wandb.project,
            name=config.run_id,
            id=config.run_id,
            dir=config.output,
            mode=config.metrics.wandb.mode,
            resume="allow" if config.metrics.wandb.mode == "online" else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def after(self, run: Run, record: Record | None) -> None:  # noqa: ARG002
        """Log one step."""
        if record is not None:
            figures = {name: value for name, value in record.to_dict().items() if value is not None}
            self._run.log(figures, step=record.step)

    def end(self, run: Run) -> None:  # noqa: ARG002
        """Finish the run there."""
        self._run.finish()


def _package(name: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{setting} needs the package {name}; pip install 'rksp[trainer]', or turn it off") from error
