"""How long after its rename a step folder is seen complete: with file events, and by polling alone at one second.

    python benchmarks/discovery_delay.py

Renames 20 folders of the bundled trainer's kind into ``checkpoints/``, at moments spread over the poll interval, and
prints median and longest delay until `watch` yields each one complete, for events and polling in the same run; and the
same for a ``.safetensors`` file written in place, which has to settle first.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rksp_monitor.discovery import FileEvents, Scanner, watch  # noqa: E402

COUNT, INTERVAL = 20, 1.0
WEIGHTS = {"weight": torch.zeros(1000)}


def main() -> None:
    print(f"{COUNT} checkpoints, polled every {INTERVAL:.0f} s" + " " * 12 + "median     longest")
    for what, write in (("renamed folder", renamed), ("file in place", in_place)):
        for hints in (True, False):
            found = delays(write, hints=hints)
            how = "with events" if hints else "polling only"
            print(f"{what:16}{how:22}{statistics.median(found):10.3f} s{max(found):10.3f} s")


def delays(write: Callable[[Path, int], None], *, hints: bool) -> list[float]:
    """Return the seconds from each write to the scan that sees it complete."""
    stop, wake = threading.Event(), threading.Event()
    written: dict[int, float] = {}
    seen: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        run = Path(name)
        (run / "checkpoints").mkdir()
        events = stack.enter_context(FileEvents()) if hints else None

        def trainer() -> None:
            for step in range(COUNT):
                time.sleep(1.5 + step / COUNT)  # another moment of the interval each time
                write(run, step)
                written[step] = time.monotonic()

        threading.Thread(target=trainer, daemon=True).start()
        for sightings in watch(Scanner(run), stop=stop, wake=wake, interval=INTERVAL, events=events):
            now = time.monotonic()
            for sighting in sightings:
                if sighting.complete:
                    seen.setdefault(sighting.step, now)
            if len(seen) == COUNT:
                break
    return [max(0.0, seen[step] - written[step]) for step in range(COUNT)]


def renamed(run: Path, step: int) -> None:
    staging = run / "checkpoints" / f".step-{step:08d}.tmp"
    staging.mkdir()
    save_file(WEIGHTS, staging / "model.safetensors")
    time.sleep(0.02)  # the trainer syncs its files, which takes longer than a tick of the file system's clock
    (staging / "checkpoint.json").write_text('{"schema": "rksp.checkpoint/2"}')
    staging.rename(run / "checkpoints" / f"step-{step:08d}")


def in_place(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}.safetensors").write_bytes(save(WEIGHTS))


if __name__ == "__main__":
    main()
