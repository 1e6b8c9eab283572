"""Good runs beside bad ones in one process: the latencies of the good, with and without the bad.

The bad: a model that cannot be built, a folder that hangs whoever opens a file in it (a pipe that nobody writes, where
the trainer's configuration and a checkpoint should be), a damaged ledger, and a thousand broken checkpoints.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import yaml

from tests.soak.process import Watch
from tests.soak.report import Report, quantile
from tests.soak.stream import ARGUMENTS, MODEL, Templates
from tests.waiting import until

COUNT, SHORT = 40, 2
BROKEN, SHORT_BROKEN = 1000, 10
GOOD = 3
DELAY = 1.0  # seconds that bad runs may add to the p95 of the good ones: the replay that runs is waited for
LAST_STEP = "rksp_checkpoint_last_processed_step"


def run(report: Report, folder: Path, *, short: bool) -> None:
    templates, count = Templates(folder / "templates"), SHORT if short else COUNT
    figures = {}
    for name, bad in (("beside bad runs", True),) if short else (("alone", False), ("beside bad runs", True)):
        broken = (SHORT_BROKEN if short else BROKEN) if bad else 0
        waits, said = _measure(report, folder / name.replace(" ", "-"), templates, count, broken)
        figures[name] = quantile(waits, 0.95)
        text = f"median {quantile(waits, 0.5):.2f} s, p95 {figures[name]:.2f} s"
        report.figure(f"good runs {name}, complete to visible", text, f"of {len(waits)}")
        for sentence in said:
            report.figure("of a bad run it says", sentence[:200])
    if not short:  # the test-suite shares its machine, so its form asserts no time
        late = figures["beside bad runs"] - figures["alone"]
        report.promise(f"bad runs delay the others by less than {DELAY:g} s", late < DELAY, f"{late:.2f} s")


def _measure(
    report: Report, folder: Path, templates: Templates, count: int, broken: int
) -> tuple[list[float], list[str]]:
    good = [folder / f"good-{number}" for number in range(GOOD)]
    entries: list[dict[str, object]] = [{"folder": str(path)} for path in good]
    for path in good:
        path.mkdir(parents=True)
    bad = _bad_runs(folder, templates, broken) if broken else []
    settings, rng = folder / "settings.yaml", random.Random(0)
    replay = {"noise_groups": 0, "attempts": 2}
    document = {"model": MODEL, "arguments": ARGUMENTS, "replay": replay, "runs": [*bad, *entries]}
    settings.write_text(yaml.safe_dump(document))
    waits = []
    with Watch(folder / "watch", "--config", settings, RKSP_POLL_INTERVAL="1") as watch:
        for path in good:
            templates.write(path, 1)  # starts the worker, which is not what is measured
        until(lambda: all(watch.metric(LAST_STEP, path.name) == 1 for path in good), why="the first of the good runs")
        for step in range(2, 2 + count):
            time.sleep(rng.uniform(0.0, 0.5))
            run = good[step % GOOD]
            templates.write(run, step)
            complete = time.monotonic()
            until(
                lambda run=run, step=step: watch.metric(LAST_STEP, run.name) == step, why=f"step {step} of {run.name}"
            )
            waits.append(time.monotonic() - complete)
        if broken:
            _wait_for_broken(report, watch, broken)
            metrics = watch.metrics()
            report.promise("a damaged ledger suspends its run", metrics['rksp_run_suspended{run="damaged"}'] == 1)
            report.promise("the daemon is well", watch.get("/healthz") == "ok\n")
        said = [line["problem"] for line in watch.logged() if line.get("level") == "error" and "problem" in line]
        report.promise("the daemon ends when told", watch.end() == 0)
    return waits, list(dict.fromkeys(said))


def _wait_for_broken(report: Report, watch: Watch, broken: int) -> None:
    name = 'rksp_checkpoints_failed_total{run="broken"}'
    until(lambda: watch.metrics()[name] == broken, 600, "an end of every broken checkpoint")
    report.promise("every broken checkpoint failed, and no more", watch.metrics()[name] == broken)


def _bad_runs(folder: Path, templates: Templates, broken: int) -> list[dict[str, object]]:
    """Make the bad runs and return their entries."""
    no_model, hanging, hanging_too, damaged, many = (
        folder / name for name in ("no-model", "hanging", "hanging-checkpoint", "damaged", "broken")
    )
    templates.write(no_model, 10)
    templates.write(hanging, 10)
    os.mkfifo(hanging / "config.yaml")
    checkpoint = templates.write(hanging_too, 10)
    (checkpoint / "checkpoint.json").unlink()
    os.mkfifo(checkpoint / "checkpoint.json")
    (hanging_too / "control").mkdir()
    os.mkfifo(hanging_too / "control" / "applied.json")
    templates.write(damaged, 10)
    (damaged / ".rksp").mkdir()
    (damaged / ".rksp" / "damaged.sqlite3").write_bytes(b"this is no ledger" * 1000)
    many.mkdir()
    for step in range(broken):
        (many / f"step-{step}.safetensors").write_bytes(b"\xff" * 64)
    return [
        {"folder": str(no_model), "model": "nowhere:build", "arguments": {}},
        *({"folder": str(path)} for path in (hanging, hanging_too, damaged, many)),
    ]
