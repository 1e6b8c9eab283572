"""The time from the rename that completes a checkpoint to the metrics that show it, without the replay itself."""

from __future__ import annotations

import random
import time
from pathlib import Path

import yaml

from tests.soak.process import Watch
from tests.soak.report import Report, quantile
from tests.soak.stream import ARGUMENTS, MODEL, Templates
from tests.waiting import until

COUNT, SHORT = 40, 2
LIMIT = 2.0  # seconds at a poll of one second
LOOK = 0.02  # seconds between two looks at the metrics

LAST_STEP = "rksp_checkpoint_last_processed_step"
REPLAY_SECONDS = "rksp_replay_duration_seconds_sum"


def run(report: Report, folder: Path, *, short: bool) -> None:
    templates = Templates(folder / "templates")
    for hints in (False,) if short else (True, False):
        name = "with file events" if hints else "by polling alone"
        waits, replays = _measure(folder / name.replace(" ", "-"), templates, SHORT if short else COUNT, hints=hints)
        median, late = quantile(waits, 0.5), quantile(waits, 0.95)
        beside = f"of {len(waits)}; the replay itself takes {quantile(replays, 0.5):.2f} s"
        report.figure(f"complete to visible {name}", f"median {median:.2f} s, p95 {late:.2f} s", beside)
        # The short form asserts no time: the test-suite shares its machine.
        report.promise(f"{name}, p95 is under {LIMIT:g} s at a poll of 1 s", short or late < LIMIT, waits)


def _measure(folder: Path, templates: Templates, count: int, *, hints: bool) -> tuple[list[float], list[float]]:
    """Return the seconds to the metrics less the replay's, and the replays' own."""
    watched, settings, rng = folder / "run", folder / "settings.yaml", random.Random(0)
    watched.mkdir(parents=True)
    replay = {"noise_groups": 0}
    settings.write_text(yaml.safe_dump({"model": MODEL, "arguments": ARGUMENTS, "hints": hints, "replay": replay}))
    waits, replays = [], []
    with Watch(folder / "watch", watched, "--config", settings, RKSP_POLL_INTERVAL="1") as watch:
        templates.write(watched, 1)  # starts the worker, which is not what is measured
        until(lambda: watch.metric(LAST_STEP) == 1)
        for step in range(2, 2 + count):
            time.sleep(rng.uniform(0.0, 1.0))  # any phase of the poll
            before = watch.metric(REPLAY_SECONDS)
            complete = time.monotonic()
            templates.write(watched, step)
            while watch.metric(LAST_STEP) != step:
                time.sleep(LOOK)
            visible = time.monotonic()
            replays.append(watch.metric(REPLAY_SECONDS) - before)
            waits.append(visible - complete - replays[-1])
    return waits, replays
