"""Training on a GPU: the losses of the CPU, bitwise resumes, and profiles that the watcher's replay repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rksp_core.control import ControlWriter
from rksp_core.orders import KSSSettings, Reason
from rksp_monitor.cli import run
from training.loop import train
from training.ranks import Ranks

pytestmark = pytest.mark.gpu

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"factory": "training.models.gpt:GPT", "arguments": {"heads": 2, "norm": "no_norm"}},
    "moe": {"factory": "training.models.moe:MoE", "arguments": {"experts": 4, "heads": 2}},
    "mamba": {"factory": "training.models.mamba:Mamba", "arguments": {}},
    "kan": {"factory": "training.models.kan:KAN", "arguments": {"heads": 2, "basis": 4}},
}
KSS = {"alpha": 0.1, "interval": 2, "layer_fraction": 1.0}


def _on(device: str) -> Ranks:
    return Ranks(0, 1, torch.device(device))


def _losses(folder: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_trains_like_the_cpu_and_is_read_like_it(name: str, configure, capsys: pytest.CaptureFixture[str]):
    model = MODELS[name]
    model = model | {"arguments": {"vocabulary": 32, "length": 16, "width": 16, "depth": 2} | model["arguments"]}
    sections = {"model": model, "kss": KSS, "profile": {"every": 10, "samples": 128, "sequences": 8}}
    here, there = (configure(device, **sections) for device in ("cpu", "cuda"))
    for config, device in ((here, "cpu"), (there, "cuda")):
        assert train(config, _on(device))["status"] == "finished"
    # float32 sums run in another order on a GPU, and Adam divides small numbers.
    assert _losses(there.output) == pytest.approx(_losses(here.output), rel=1e-2)
    own = json.loads((Path(there.output) / "profiles" / "step-00000010.json").read_text())
    checkpoint = Path(there.output) / "checkpoints" / "step-00000010"
    for device in ("cpu", "cuda"):
        assert run(["profile", str(checkpoint), "--samples", "128", "--device", device, "--format", "json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        for mine, theirs in zip(seen["layers"], own["layers"], strict=True):
            for figure in ("near_unit_mass", "spectral_radius", "sigma_max"):
                assert mine[figure] == pytest.approx(theirs[figure], rel=1e-3), (device, figure)


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_goes_on_where_it_was(configure, form: str, precision: str):
    sections = {"checkpoint": {"every": 5, "format": form}, "kss": KSS, "precision": precision}
    whole, parts = configure("whole", **sections), configure("parts", **sections)
    train(whole, _on("cuda"))
    train(parts, _on("cuda"), until=10)
    train(parts, _on("cuda"), resume=True)
    assert _losses(parts.output) == _losses(whole.output)


@pytest.mark.parametrize(
    "stabilizers",
    [
        {"sam": {"rho": 0.05}},
        {"spectral_norm": {}},
        {"jacobian": {"weight": 0.1}},
        {"gradient_penalty": {"weight": 0.1}},
    ],
    ids=lambda section: next(iter(section)),
)
def test_the_competing_methods_run(configure, stabilizers: dict[str, Any]):
    assert train(configure(stabilizers=stabilizers, steps=4), _on("cuda"))["status"] == "finished"


def test_an_order_is_obeyed(configure):
    config = configure()
    train(config, _on("cuda"), until=5)
    order = KSSSettings(alpha=0.2, interval=1, layer_fraction=1.0)
    ControlWriter(config.control_folder).issue(config.run_id, order, Reason())
    train(config, _on("cuda"), resume=True)
    records = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert [record["kss_term"] > 0 for record in records] == [False] * 5 + [True] * 15
