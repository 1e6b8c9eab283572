"""Two processes under the Hugging Face Trainer make the steps of one: orders, terms, clipping, weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "tests.integrations.each_rank"


def said(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank-{rank}.json").read_text())


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    """In float64, with rows of unlike lengths, an order that comes between two micro-batches, and all its levers."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", SCRIPT, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=240)
    one, first, second = said(tmp_path / "one", 0), said(tmp_path / "two", 0), said(tmp_path / "two", 1)
    assert first["weights"] == one["weights"] == [0.0] * 3 + [4.0] * 3
    assert first["terms"] == pytest.approx(one["terms"], rel=1e-10)
    assert first["terms"][3] > 0
    assert first["model"] == second["model"]
    assert first["model"] == pytest.approx(one["model"], rel=1e-10)
    assert (first["obeyed"], second["obeyed"]) == (True, True)
    assert (first["answered"], second["answered"]) == (True, False)
    answer = json.loads((tmp_path / "two" / "control" / "applied.json").read_text())
    assert (answer["status"], answer["step"], answer["active"]["clip"]) == ("applied", 3, 0.5)
