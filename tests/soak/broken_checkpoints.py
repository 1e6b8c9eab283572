"""Every broken checkpoint of `tests.monitor.broken` in one run folder, and some that change while they are read.

Each gets its class and one sentence; good ones are judged before and after; no code runs; no memory is asked for.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import yaml

from tests.monitor import broken
from tests.soak.process import Memory, Watch, open_rows, rows
from tests.soak.report import Report
from tests.waiting import until

MOMENTS, SHORT_MOMENTS = 60, 1  # of each of three kinds
ROOM = 64.0  # MiB above the peak of good checkpoints that broken ones may cost a process

# What holds root to the permissions of files, as everybody else.
HELD = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")


def run(report: Report, folder: Path, *, short: bool) -> None:
    watched, canary = folder / "run", folder / "canary"
    watched.mkdir()
    found = broken.cases(folder / "templates", canary, every=50 if short else 2, flips=1 if short else 24)
    cases = [case for case in found if not short or _is_one_of_a_kind(case)]
    settings = folder / "settings.yaml"
    replay = {"attempts": 1, "incomplete_after": 2.0, "noise_groups": 0}
    settings.write_text(yaml.safe_dump({"model": broken.MODEL, "arguments": broken.ARGUMENTS, "replay": replay}))
    prefix = ()
    if os.geteuid() == 0:
        if shutil.which(HELD[0]):
            prefix = HELD
        else:
            report.skipped("folders without permission", "root may read everything, and there is no setpriv")
            cases = [case for case in cases if "no permission" not in case.name]
    with Watch(folder / "watch", watched, "--config", settings, prefix=prefix) as watch, Memory(watch) as memory:
        _judge_good_ones(report, watched, 1, "before")
        before = memory.peak_daemon, memory.peak_worker
        made = [(case, case.make(watched, step)) for step, case in enumerate(cases, start=10)]
        _wait(watched)
        _compare(report, watched, made)
        _moments(report, watched, 10_000, SHORT_MOMENTS if short else MOMENTS)
        _judge_good_ones(report, watched, 20_000, "after")
        for name, limit, peak in zip(
            ("daemon", "worker"), before, (memory.peak_daemon, memory.peak_worker), strict=True
        ):
            report.figure(
                f"peak memory of the {name}", f"{peak:.0f} MiB", f"{limit:.0f} MiB with good checkpoints only"
            )
            report.promise(f"the {name} needs less than {ROOM:.0f} MiB more", peak < limit + ROOM, f"{peak:.0f} MiB")
        restarts = watch.metric("rksp_replay_worker_restarts_total")
        report.figure("workers that were started again", f"{restarts:.0f}", f"{len(cases)} broken checkpoints")
        report.promise("the daemon goes on, and ends when told", watch.end() == 0)
        surprises = watch.logged("unexpected") + watch.logged("forged")
        report.promise("nothing surprised it", not surprises, surprises)
    report.promise("no code ran", not canary.exists())


def _is_one_of_a_kind(case: broken.Case) -> bool:
    """Whether the short form tries it: what is done in the end costs a replay, and one format tells of the others."""
    return case.statuses != broken.DONE or case.name.startswith("pt:")


def _judge_good_ones(report: Report, watched: Path, step: int, when: str) -> None:
    paths = []
    for name in broken.FORMATS:
        paths.append(broken.path_in(watched, name, step))
        broken.write(paths[-1], name, broken.weights(step))
    until(lambda: {str(path) for path in paths} <= {path for _, _, path, _, _, _ in rows(watched)})
    _wait(watched)
    status = {path: (status, error) for _, _, path, status, _, error in rows(watched)}
    bad = {path.name: status[str(path)] for path in paths if status[str(path)][0] != "done"}
    report.promise(f"good checkpoints are judged {when}", not bad, bad)


def _wait(watched: Path) -> None:
    """Wait until everything has an outcome, through two scans."""
    for _ in range(2):
        time.sleep(1.0)
        until(lambda: open_rows(watched) == 0, 1200, "an outcome for every checkpoint")


def _compare(report: Report, watched: Path, made: list[tuple[broken.Case, Path]]) -> None:
    outcomes = {path: (status, error) for _, _, path, status, _, error in rows(watched)}
    complaints, classes = [], Counter()
    for case, path in made:
        status, error = outcomes.get(str(path), (broken.UNSEEN, ""))
        classes[status] += 1
        if complaint := case.complaint(status, error):
            complaints.append(complaint)
    report.figure("broken checkpoints", str(len(made)), ", ".join(f"{n} {status}" for status, n in classes.items()))
    report.promise("each has its class and one sentence", not complaints, "\n".join(complaints))


def _moments(report: Report, watched: Path, first: int, count: int) -> None:
    """Remove, replace and cut checkpoints at random instants after they were written."""
    rng, made = random.Random(1), []
    for number in range(3 * count):
        what = ("vanishes", "is replaced", "is cut short")[number % 3]
        name = broken.FORMATS[number % len(broken.FORMATS)] if what == "vanishes" else ("pt", "safetensors")[number % 2]
        path = broken.path_in(watched, name, first + number)
        staging = path.with_name(f".{path.name}.tmp")
        broken.write(staging, name, broken.weights(number)).rename(path)
        time.sleep(rng.uniform(0.0, 1.5))
        if what == "vanishes":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif what == "is replaced":
            broken.write(staging, name, broken.weights(number + 1)).replace(path)
        else:
            os.truncate(path, path.stat().st_size // 2)
        made.append((what, path))
    _wait(watched)
    classes, odd = Counter(), []
    allowed = {
        "vanishes": {"done", "expired"},
        "is replaced": {"done", "expired"},  # expired: written again before it was read
        "is cut short": {"done", "failed", "expired"},
    }
    last: dict[str, tuple[str, str]] = {}
    by_path = {str(path): what for what, path in made}
    for _, _, path, status, _, error in rows(watched):
        if path in by_path:
            classes[f"{status}: {by_path[path]}"] += 1
            last[path] = status, error
            if status not in allowed[by_path[path]]:
                odd.append((by_path[path], path, status, error))
    report.figure(
        "changed at a random instant", str(len(made)), ", ".join(f"{n} {what}" for what, n in sorted(classes.items()))
    )
    report.promise("what vanishes or is replaced is done or expired, and never failed", not odd, odd)
    stale = {
        path: last.get(path)
        for what, path in ((w, str(p)) for w, p in made)
        if what == "is replaced" and last.get(path, ("",))[0] != "done"
    }
    report.promise("what is replaced is judged in its last form", not stale, stale)
