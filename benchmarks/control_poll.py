"""What obedience costs: one poll of a control folder that has not changed, beside one training step.

    python benchmarks/control_poll.py

Prints the best of 20 batches of 1000 polls (no order yet; an order that was applied), and of 20 steps of
``training/configs/recall_small.yaml``, in one process on one core. The best, as other processes only ever add time.
The target is 20 microseconds a step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rksp_core.control import ControlListener, ControlWriter  # noqa: E402
from rksp_core.orders import KSSSettings, Reason  # noqa: E402
from training.config import read_config  # noqa: E402
from training.ranks import Ranks  # noqa: E402
from training.run import build_run  # noqa: E402
from training.step import advance  # noqa: E402

TARGET = 20e-6


def main() -> None:
    torch.set_num_threads(1)
    run = build_run(read_config(ROOT / "training/configs/recall_small.yaml"), Ranks(0, 1, torch.device("cpu")))
    advance(run)
    with tempfile.TemporaryDirectory() as folder:
        listener = ControlListener(folder, "benchmark")
        empty = seconds(lambda: listener.poll(0), 1000)
        order = ControlWriter(folder).issue("benchmark", KSSSettings(alpha=0.1), Reason(), expires_in=3600)
        assert listener.poll(0) == order
        listener.acknowledge(order, 0)
        obeyed = seconds(lambda: listener.poll(0), 1000)
    step = seconds(lambda: advance(run), 1)
    print(f"poll, no order           {empty * 1e6:8.2f} us   {empty / step:.2e} of a step")
    print(f"poll, order that holds   {obeyed * 1e6:8.2f} us   {obeyed / step:.2e} of a step")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"one training step        {step * 1e6:8.0f} us   ({parameters:,} parameters)")
    print(f"target: under {TARGET * 1e6:.0f} us a step: {'met' if max(empty, obeyed) < TARGET else 'MISSED'}")


def seconds(call: Callable[[], object], count: int) -> float:
    """Return the time of one call in the fastest of 20 batches of ``count`` calls."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - began) / count)
    return min(times)


if __name__ == "__main__":
    main()
