"""Write the golden files: ``python -m tests.golden.generate``. Look at the diff before you commit it.

They hold what the product said when it was last looked at by a person: a change of any figure is then a decision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rksp_core.moments import Moments
from rksp_core.profiling import profile_layer
from training.config import parse_config
from training.ranks import Ranks
from training.run import build_run
from training.step import advance

FOLDER = Path(__file__).parent
STEPS = 12


def layer_profile() -> dict[str, Any]:
    """A layer of width 24 with noise, from NumPy's own generator, whose stream is fixed."""
    generator = np.random.default_rng(2026)
    operator = 0.9 * np.eye(24) + generator.normal(size=(24, 24)) * 0.08
    x = generator.normal(size=(400, 24)) * np.logspace(0, -2, 24)
    y = x @ operator.T + 0.02 * generator.normal(size=(400, 24))
    moments = Moments(24)
    moments.update(torch.from_numpy(x), torch.from_numpy(y))
    return profile_layer("golden", moments, depth=6).to_dict(eigenvalues=False)


def losses(norm: str) -> list[float]:
    """The first losses of a small run with KSS on."""
    config = parse_config(
        {
            "run_id": "golden",
            "output": "unused",
            "steps": STEPS,
            "model": {
                "factory": "training.models.gpt:GPT",
                "arguments": {"vocabulary": 32, "length": 16, "width": 32, "depth": 2, "heads": 2, "norm": norm},
            },
            "task": {"batch": 8, "pairs": 2},
            "optimizer": {"learning_rate": 0.003},
            "schedule": {"warmup": 4},
            "kss": {"alpha": 0.1, "interval": 3},
        },
        "golden",
    )
    run = build_run(config, Ranks(0, 1, torch.device("cpu")))
    return [advance(run).loss for _ in range(STEPS)]


def documents() -> dict[str, Any]:
    """Return {file name: content}."""
    return {
        "layer.json": layer_profile(),
        "losses.json": {
            norm: losses(norm) for norm in ("pre_ln", "post_ln", "rmsnorm", "deepnorm", "subln", "no_norm")
        },
    }


if __name__ == "__main__":
    for name, content in documents().items():
        (FOLDER / name).write_text(json.dumps(content, indent=1) + "\n")
