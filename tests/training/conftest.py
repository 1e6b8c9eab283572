"""A run small enough for a test: width 16, two blocks, a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config import Config, parse_config

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Return a function: sections -> configuration; the run folder is ``output``, below the test's own folder."""

    def make(output: str = "run", arguments: dict[str, Any] | None = None, **sections: Any) -> Config:
        document = {
            "run_id": "small",
            "output": str(tmp_path / output),
            "steps": 20,
            "model": {
                "factory": "training.models.gpt:GPT",
                "arguments": {"vocabulary": 32, "length": 16, "width": 16, "depth": 2, "heads": 2} | (arguments or {}),
            },
            "task": {"batch": 8, "pairs": 2},
            "schedule": {"warmup": 5},
            "checkpoint": {"every": 10},
            "profile": {"every": 0, "samples": 128, "sequences": 8},
        }
        return parse_config(document | sections, "test")

    return make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
