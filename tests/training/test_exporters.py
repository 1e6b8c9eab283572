"""What a trainer says of itself: to a real scrape, to TensorBoard's own reader, to Weights and Biases offline."""

import importlib.util
import json
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from rksp_core.errors import ConfigError
from training.exporters import GAUGES, Prometheus, exporters
from training.loop import train
from training.ranks import Ranks
from training.run import build_run
from training.step import Record, advance

ALONE = Ranks(0, 1, torch.device("cpu"))
KSS = {"alpha": 0.15, "interval": 3}


def test_a_scrape_shows_the_last_step(configure):
    run = build_run(configure(kss=KSS, metrics={"prometheus": {"port": 0}}), ALONE)
    exporter = Prometheus("small", run.config.metrics.prometheus)
    try:
        records = [advance(run) for _ in range(2)]
        for record in records:
            exporter.after(run, record)
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics") as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    finally:
        exporter.end(run)
    assert {family.name for family in families} == {name for name, _ in GAUGES.values()}
    samples = {family.name: family.samples[0] for family in families}
    assert all(sample.labels == {"run": "small"} for sample in samples.values())
    assert samples["rksp_training_step"].value == 2
    assert samples["rksp_training_loss"].value == records[1].loss
    assert samples["rksp_training_kss_gradient_ratio"].value == records[0].kss_gradient_ratio  # none was due since


def test_every_figure_of_a_record_is_exported():
    assert set(GAUGES) == set(Record.__dataclass_fields__)


def test_the_ratio_is_that_of_the_gradients(configure):
    """The gradient of the sum less that of the task alone, against what one more backward pass has found."""
    sections = {"precision": "float64", "metrics": {"kss_ratio_every": 1}, "accumulation": 2}
    both, task = (build_run(configure(**sections, kss={"alpha": alpha, "interval": 1}), ALONE) for alpha in (0.5, 0.0))
    record = advance(both)
    advance(task)
    parts = [(p.grad - q.grad, q.grad) for p, q in zip(both.model.parameters(), task.model.parameters(), strict=True)]
    norms = [torch.cat([part[i].flatten() for part in parts]).norm() for i in range(2)]
    assert record.kss_gradient_ratio == pytest.approx(float(norms[0] / norms[1]), rel=1e-9)
    assert advance(task).kss_gradient_ratio is None


def test_tensorboard_reads_back_what_was_logged(configure):
    pytest.importorskip("tensorboard")
    config = configure(metrics={"tensorboard": True}, steps=6)
    train(config, ALONE, until=4)
    train(config, ALONE, resume=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload().Scalars("loss")
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events] == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-6)


def test_wandb_works_offline(configure, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configure(metrics={"wandb": {"project": "test"}}, steps=3)
    train(config, ALONE)
    [folder] = (Path(config.output) / "wandb").glob("offline-run-*")
    [log] = folder.glob("*.wandb")
    assert log.stat().st_size > 0


def test_a_port_that_is_taken_is_said_before_training(configure):
    run = build_run(configure(metrics={"prometheus": {"port": 0}}), ALONE)
    exporter = Prometheus("small", run.config.metrics.prometheus)
    try:
        config = configure("other", metrics={"prometheus": {"port": exporter.port}})
        with pytest.raises(
            ConfigError, match=r"cannot serve metrics on 127.0.0.1:\d+ .*change metrics.prometheus.port"
        ):
            train(config, ALONE)
    finally:
        exporter.end(run)
    assert not Path(config.output).exists()


def test_a_package_that_is_missing_is_said_before_training(configure, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics.wandb needs the package wandb; pip install"):
        exporters(configure(metrics={"wandb": {}}))
