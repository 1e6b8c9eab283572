"""What the watcher promises, tried on real processes over the command line: ``python -m tests.soak``.

One module an experiment. Each prints its figures beside a baseline of the same run or a limit, and says which of its
promises was broken. The short form of each is part of the test-suite (`tests/monitor/test_soak_short.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from tests.soak import broken_checkpoints, faults, isolation, kills, latency, many

EXPERIMENTS: dict[str, Callable[..., None]] = {
    "broken": broken_checkpoints.run,
    "kills": kills.run,
    "latency": latency.run,
    "faults": faults.run,
    "isolation": isolation.run,
    "many": many.run,
}
