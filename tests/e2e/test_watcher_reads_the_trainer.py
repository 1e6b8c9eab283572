"""The profile that the watcher takes of a checkpoint is the one that the trainer took of itself at that step.

So every architecture, normalization, precision and format of the trainer is one that `rksp` reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rksp_monitor.cli import run
from training.config import parse_config
from training.loop import train
from training.ranks import Ranks

WORDS = {"vocabulary": 32, "length": 16, "width": 16, "depth": 2}
RECALL = {"batch": 8, "pairs": 2}
DIGITS = {"name": "images", "data": "digits", "batch": 8}
CASES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt-pt": {"checkpoint": {"every": 2, "format": "pt"}},
    "gpt-dcp": {"checkpoint": {"every": 2, "format": "dcp"}},
    "gpt-dcp-async": {"checkpoint": {"every": 2, "format": "dcp", "asynchronous": True}},
    "gpt-deepnorm": {"arguments": {"norm": "deepnorm"}},
    "gpt-fixup": {"arguments": {"norm": "no_norm", "initialization": "fixup"}},
    "gpt-mup": {"arguments": {"initialization": "mup", "base_width": 8}},
    "gpt-spectral-norm": {"stabilizers": {"spectral_norm": {}}},
    "gpt-weight-norm": {"stabilizers": {"weight_norm": {}}},
    "gpt-weight-norm-dcp": {"stabilizers": {"weight_norm": {}}, "checkpoint": {"every": 2, "format": "dcp"}},
    "gpt-checkpointed-lamb": {"activation_checkpointing": True, "optimizer": {"name": "lamb"}},
    "moe": {"factory": "training.models.moe:MoE", "arguments": {"experts": 4, "heads": 2}},
    "mamba": {"factory": "training.models.mamba:Mamba"},
    "kan": {"factory": "training.models.kan:KAN", "arguments": {"heads": 2, "basis": 4}},
    "vit": {"factory": "training.models.vit:ViT", "task": DIGITS},
}
VIT = {"image": 8, "channels": 1, "classes": 10, "patch": 2, "width": 16, "depth": 2, "heads": 2}


@pytest.mark.parametrize("name", CASES)
def test_profiles_agree(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    sections = dict(CASES[name])
    factory = sections.pop("factory", "training.models.gpt:GPT")
    given = VIT if name == "vit" else WORDS | ({"heads": 2} if "gpt" in name else {})
    document = {
        "run_id": name,
        "output": str(tmp_path / "run"),
        "steps": 2,
        "model": {"factory": factory, "arguments": given | sections.pop("arguments", {})},
        "task": RECALL,
        "checkpoint": {"every": 2},
        "profile": {"every": 2, "samples": 128, "sequences": 8},
        "kss": {"alpha": 0.1, "interval": 1},
    }
    train(parse_config(document | sections, "test"), Ranks(0, 1, torch.device("cpu")))
    own = json.loads((tmp_path / "run" / "profiles" / "step-00000002.json").read_text())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert run(["profile", str(checkpoint), "--samples", "128", "--device", "cpu", "--format", "json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["step"] == own["step"] == 2
    assert len(seen["layers"]) == len(own["layers"]) == 2
    for mine, theirs in zip(seen["layers"], own["layers"], strict=True):
        for figure in ("near_unit_mass", "spectral_radius", "sigma_max", "henrici_departure"):
            # Normalized weights are multiplied out once more in float32, in another order.
            assert mine[figure] == pytest.approx(theirs[figure], rel=1e-4), (name, figure)
