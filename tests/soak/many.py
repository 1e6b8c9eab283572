"""5 000 small checkpoints of 50 runs in one process: their order, its memory, and how it answers scrapes meanwhile.

The whole backlog is there at the start, with profiles between the checkpoints. The resident memory is written as
``many-memory.csv`` and drawn as ``many-memory.png`` beside the report's other output.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from tests.soak.beside import Beside
from tests.soak.process import Memory, Watch, ledger
from tests.soak.report import Report, quantile
from tests.soak.scrapes import Scraper, slow_clients
from tests.soak.stream import ARGUMENTS, MODEL, Templates, write_profile
from tests.waiting import until

RUNS, CHECKPOINTS, PROFILES = 50, 100, 20  # of each run
SHORT = 3, 4, 2
SLOW = 50  # clients that hang
TAKEN_UP = 100  # scrapes at the beginning that are told apart, some ten seconds of them
SCRAPE_LIMIT = 0.05  # seconds, p99
SPREAD = 3  # checkpoints that one run may be ahead of another while all have some waiting
GROWTH = 1.1, 10.0  # the memory at the end is at most this factor and so many MiB above that at the start

DONE = "rksp_checkpoints_processed_total"


def run(report: Report, folder: Path, *, short: bool) -> None:
    runs, checkpoints, profiles = SHORT if short else (RUNS, CHECKPOINTS, PROFILES)
    folders = _write(folder, runs, checkpoints, profiles)
    settings, total = folder / "settings.yaml", runs * (checkpoints + profiles)
    replay = {"noise_groups": 0}
    document = {"model": MODEL, "arguments": ARGUMENTS, "replay": replay, "runs": [{"folder": f"{folder}/runs/*"}]}
    settings.write_text(yaml.safe_dump(document))
    began = time.monotonic()
    with Watch(folder / "watch", "--config", settings, RKSP_POLL_INTERVAL="2") as watch:
        until(lambda: watch.get("/readyz"))
        with Memory(watch, interval=0.1 if short else 1.0) as memory, Progress(watch) as progress:
            alone, beside = _scrape_meanwhile(watch, total, lambda: progress.total)
        report.figure("events judged", str(total), f"{runs} runs, in {time.monotonic() - began:.0f} s")
        with Scraper(watch.address, every=0.02) as idle:
            time.sleep(0.5 if short else 5.0)
        _say_scrapes(
            report,
            (
                ("while all runs are taken up", alone.seconds[:TAKEN_UP]),
                ("while replays run", alone.seconds[TAKEN_UP:]),
                (f"beside {SLOW} clients that hang", beside.seconds),
                ("when all is done", idle.seconds),
            ),
            [problem for scraper in (alone, beside, idle) for problem in scraper.failed],
            short=short,
        )
        problems = [line for line in watch.logged() if line.get("level") == "error"]
        report.promise("nothing went wrong", not problems, problems[:3])
        report.promise("the daemon ends when told", watch.end() == 0)
    _say_order(report, folders, checkpoints, profiles)
    _say_fairness(report, progress, checkpoints + profiles, profiles)
    _say_memory(report, memory, short=short)


def _write(folder: Path, runs: int, checkpoints: int, profiles: int) -> list[Path]:
    templates, folders = Templates(folder / "templates"), []
    for number in range(runs):
        folders.append(folder / "runs" / f"run-{number:02d}")
        for position in range(1, checkpoints + 1):
            # Steps of differing length: 990 comes before 1000 as a number, and after it as a name.
            templates.write(folders[-1], 90 * position).rename(folders[-1] / "checkpoints" / f"step-{90 * position}")
        for position in range(1, profiles + 1):
            write_profile(folders[-1], position)
    return folders


class Progress(Beside):
    """Samples how many events of each run were judged."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self.samples: list[list[int]] = []

    def run(self) -> None:
        while not self._over.wait(0.5):
            try:
                values = self._watch.metrics()
            except OSError:
                continue
            self.samples.append([int(value) for name, value in values.items() if name.startswith(DONE + "{")])

    @property
    def total(self) -> int:
        return sum(self.samples[-1]) if self.samples else 0


def _scrape_meanwhile(watch: Watch, total: int, progress: Callable[[], int]) -> tuple[Scraper, Scraper]:
    """Scrape during the first half of the work as it is, and during the second beside clients that hang."""
    with Scraper(watch.address) as alone:
        until(lambda: progress() >= total // 2, 3600, "half of the work")
    with slow_clients(watch.address, SLOW), Scraper(watch.address) as beside:
        until(lambda: progress() >= total, 3600, "the work")
    return alone, beside


def _say_scrapes(
    report: Report, scrapes: Sequence[tuple[str, Sequence[float]]], failed: Sequence[str], *, short: bool
) -> None:
    report.promise("each scrape was answered", not failed, failed[:3])
    for name, seconds in scrapes:
        if not seconds:
            report.skipped(f"a scrape {name}", "it was over too soon")
            continue
        p50, p99 = (quantile(seconds, share) * 1e3 for share in (0.5, 0.99))
        report.figure(f"a scrape {name}", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", f"{len(seconds)} scrapes")
        # The short form asserts no time: the test-suite shares its machine.
        fast = short or p99 < SCRAPE_LIMIT * 1e3
        report.promise(f"a scrape {name} has a p99 under {SCRAPE_LIMIT * 1e3:.0f} ms", fast, f"{p99:.1f} ms")


def _say_order(report: Report, folders: Sequence[Path], checkpoints: int, profiles: int) -> None:
    """Compare the order in which each run was judged with that of its steps, and look for what is missing."""
    wanted = {
        "checkpoint": [90 * position for position in range(1, checkpoints + 1)],
        "profile": [*range(1, profiles + 1)],
    }
    odd = []
    for folder in folders:
        with ledger(folder) as database:
            for kind, steps in wanted.items():
                query = "SELECT step FROM events WHERE kind = ? AND status = 'done' ORDER BY judged, id"
                found = [step for (step,) in database.execute(query, (kind,))]
                if found != steps:
                    odd.append((folder.name, kind, found[:20]))
    report.promise("every run was judged whole, in the order of its steps", not odd, odd[:3])


def _say_fairness(report: Report, progress: Progress, each: int, profiles: int) -> None:
    """Say how far apart the runs were, once their profiles were judged and while none was finished."""
    midway = [counts for counts in progress.samples if counts and min(counts) > profiles and max(counts) < each]
    spreads = [max(counts) - min(counts) for counts in midway]
    if not spreads:
        report.skipped("fairness", "it was over too soon to be looked at")
        return
    report.figure(
        "the fastest run is ahead of the slowest by",
        f"{quantile(spreads, 0.5)} events in the median",
        f"at most {max(spreads)}, in {len(spreads)} samples",
    )
    report.promise(f"no run is ahead by more than {SPREAD} checkpoints", max(spreads) <= SPREAD, max(spreads))


def _say_memory(report: Report, memory: Memory, *, short: bool) -> None:
    """Compare the memory after the first tenth, once everything was imported and built, with that of the end."""
    busy = [sample for sample in memory.samples if sample[2] > 0]
    tenth = max(1, len(busy) // 10)
    for name, column in (("daemon", 1), ("worker", 2)):
        parts = busy[tenth : 2 * tenth], busy[len(busy) // 2 : len(busy) // 2 + tenth], busy[-tenth:]
        start, middle, end = (quantile([sample[column] for sample in part or busy], 0.5) for part in parts)
        slope = (end - start) / max(1e-9, busy[-1][0] - busy[0][0]) * 3600
        report.figure(
            f"memory of the {name}",
            f"{start:.0f}, {middle:.0f}, {end:.0f} MiB",
            f"start, middle, end; {slope:+.0f} MiB an hour",
        )
        factor, room = GROWTH
        report.promise(f"the memory of the {name} stays flat", short or end <= start * factor + room, (start, end))
    if report.output is not None:
        _draw(memory.samples, report.output)


def _draw(samples: Sequence[tuple[float, float, float]], output: Path) -> None:
    from matplotlib.figure import Figure

    output.mkdir(parents=True, exist_ok=True)
    with (output / "many-memory.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("seconds", "daemon_mib", "workers_mib"), *samples])
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    seconds, daemon, workers = zip(*samples, strict=True)
    axes.plot(seconds, daemon, label="daemon")
    axes.plot(seconds, workers, label="replay worker")
    axes.set(xlabel="seconds", ylabel="resident memory in MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(output / "many-memory.png", dpi=120)
