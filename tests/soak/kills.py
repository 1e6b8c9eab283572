"""kill -9 of the daemon, and of its worker, at random instants of a run that goes on.

Nothing is lost, no generation is issued twice with different content, the ledger stays sound, and what is remembered
in the end is what a watcher that nobody disturbed remembers of the same run.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.soak.process import Watch, documents, ledger, open_rows, rows
from tests.soak.report import Report
from tests.soak.stream import ARGUMENTS, MODEL, POLICY, Templates, Trainer, Writer, copy_of
from tests.waiting import until

KILLS, SHORT = 200, 1
LONGEST = 4.0  # seconds that a process lives at most; its worker is ready after about 3

# What depends on the hour, or on how often it was tried, and not on the run.
# Those of time; and the generation: what the other watcher sees all at once, and late, gives fewer orders.
VOLATILE = {"at", "ordered_at", "ordered_until", "issued_at", "expires_at", "generation"}


def run(report: Report, folder: Path, *, short: bool) -> None:
    count = SHORT if short else KILLS
    watched, rng = folder / "run", random.Random(0)
    settings = folder / "settings.yaml"
    replay = {"attempts": 10 * count, "noise_groups": 0}
    settings.write_text(yaml.safe_dump({"model": MODEL, "arguments": ARGUMENTS, "policy": POLICY, "replay": replay}))
    watched.mkdir()
    caught: Counter[str] = Counter()
    with Trainer(watched, "run") as trainer, _writer(folder, watched, short) as written:
        for _ in range(count):
            with _start(folder, watched, settings) as watch:
                time.sleep(rng.uniform(0.3, LONGEST))
                watch.end(signal.SIGKILL)
            caught[_what_it_did(watched)] += 1
        report.figure("the daemon was killed", f"{count} times", _counted(caught))
        with _start(folder, watched, settings) as watch:
            caught = _kill_workers(watch, watched, count, rng)
            report.figure("the worker was killed", f"{count} times", _counted(caught))
            written.__exit__()
            until(lambda: open_rows(watched) == 0 and len(rows(watched)) == written.checkpoints + written.profiles, 900)
            report.promise("the daemon outlives its workers and ends when told", watch.end() == 0)
    _nothing_is_lost(report, watched, written)
    _no_order_is_given_twice(report, trainer)
    _as_if_undisturbed(report, folder, watched, settings)


def _writer(folder: Path, watched: Path, short: bool) -> Writer:
    return Writer(watched, Templates(folder / "templates"), every=0.5 if short else 1.5)


def _start(folder: Path, watched: Path, settings: Path) -> Watch:
    # Without a delay a checkpoint whose worker was killed is tried again before the next one: the order of the steps,
    # and so the drift, is that of an undisturbed watcher. (With one, later steps are judged meanwhile.)
    delay = {"RKSP_REPLAY__RETRY_DELAY": "1e-12"}
    return Watch(folder / "watch", watched, "--enforce", "--config", settings, **delay)


def _what_it_did(watched: Path) -> str:
    """Return what the ledger says the killed daemon was doing."""
    with contextlib.suppress(ValueError):
        if any(status == "processing" for _, _, _, status, _, _ in rows(watched)):
            return "in the middle of an event"
    return "between two events"


def _kill_workers(watch: Watch, watched: Path, count: int, rng: random.Random) -> Counter[str]:
    """Kill workers, some while they start; never two starts in a row, after which the watcher waits for a minute."""
    caught: Counter[str] = Counter()
    started = True
    for _ in range(count):
        until(watch.workers, 120, "a worker was started again")
        worker = watch.workers()[0]
        if not started:
            until(lambda pid=worker: _has_started(watch, pid), 60, "the start of a worker")
        time.sleep(rng.uniform(0.0, LONGEST))
        started = _has_started(watch, worker)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        caught[_what_it_did(watched) if started else "starting"] += 1
        until(lambda gone=worker: gone not in watch.workers(), 60)
    return caught


def _has_started(watch: Watch, worker: int) -> bool:
    return any(line["pid"] == worker for line in watch.logged("replay worker started"))


def _nothing_is_lost(report: Report, watched: Path, written: Writer) -> None:
    seen = rows(watched)
    outcomes = Counter((kind, status) for kind, _, _, status, _, _ in seen)
    wanted = Counter({("checkpoint", "done"): written.checkpoints, ("profile", "done"): written.profiles})
    report.promise(
        f"each of {written.checkpoints} checkpoints and {written.profiles} profiles was judged, and has one row",
        outcomes == wanted,
        outcomes,
    )
    attempts = [tries for kind, _, _, _, tries, _ in seen if kind == "checkpoint"]
    report.figure(
        "attempts at a checkpoint", f"at most {max(attempts)}, {sum(attempts)} in all", f"{len(attempts)} of them"
    )
    with ledger(watched) as database:
        report.promise(
            "the ledger is sound", (said := database.execute("PRAGMA integrity_check").fetchone()[0]) == "ok", said
        )


def _no_order_is_given_twice(report: Report, trainer: Trainer) -> None:
    generations = [generation for generation, _ in trainer.orders]
    contents: dict[int, set[bytes]] = {}
    for generation, content in trainer.orders:
        contents.setdefault(generation, set()).add(content)
    report.figure(
        "orders seen by the trainer", str(len(contents)), f"the last has generation {max(generations, default=0)}"
    )
    report.promise("orders were given", len(contents) > 1, generations)
    twice = {generation: texts for generation, texts in contents.items() if len(texts) > 1}
    report.promise("no generation was issued twice with different content", not twice, twice)
    report.promise("generations rose strictly", generations == sorted(set(generations)), generations)
    report.promise("the trainer obeyed each order once", trainer.obeyed == sorted(set(trainer.obeyed)), trainer.obeyed)


def _as_if_undisturbed(report: Report, folder: Path, watched: Path, settings: Path) -> None:
    """Let another watcher judge a copy of the run in one go, and compare what the two remember."""
    control = copy_of(watched, folder / "control" / "run")
    with Watch(folder / "control", control, "--once", "--enforce", "--config", settings) as watch:
        report.promise("an undisturbed watcher judges a copy of the run", watch.process.wait(900) == 0)
    ours, theirs = _settled(documents(watched)), _settled(documents(control))
    for name in sorted(theirs.keys() | ours.keys()):
        same = ours.get(name) == theirs.get(name)
        pair = [each.get(name) or {} for each in (ours, theirs)]
        apart = [key for key in pair[0].keys() | pair[1].keys() if pair[0].get(key) != pair[1].get(key)]
        found = "; ".join(f"{key}: {pair[0].get(key)} instead of {pair[1].get(key)}"[:900] for key in sorted(apart))
        report.promise(f"{name} is as if nobody had disturbed the watcher", same, found)


def _settled(document: Any) -> Any:
    """Return a document without what depends on the hour."""
    if isinstance(document, Mapping):
        return {key: _settled(value) for key, value in document.items() if key not in VOLATILE}
    return [_settled(value) for value in document] if isinstance(document, list) else document


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.most_common())
