"""What is printed: counts with Wilson intervals, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from training.experiments.early_warning import sequential, signals
from training.experiments.early_warning.choose import (
    ARMED,
    INTERVALS,
    LEAD,
    PRICES,
    SETS,
    SOURCES,
    Cases,
    Table,
    Verdict,
    candidates,
    choose,
    left_out,
)
from training.experiments.early_warning.chosen import Chosen
from training.experiments.early_warning.rules import PROTOTYPE, RESCUE, Rule, first_alarm
from training.experiments.early_warning.series import FORMS, SIGNALS, Series, kind_of, series
from training.experiments.intervals import Share
from training.experiments.record import Record

WITHIN = 100  # steps before an onset
SHOWN = 20  # signals
FALSE_ALARMS = 0.05  # per healthy run: what a set of rules may cost
TEST_PRICE = 1.0  # at which the sequential tests are compared
SELECTED = (
    f"The {SHOWN} that tell most of {len(SIGNALS) * len(FORMS)}, and those that the paper relied on: the best of so "
    "many flatter themselves. Each is of the pairs in which it is known."
)
PRICED = "Rules and thresholds are of other runs, the price is not: who takes the best of the rows flatters it."


def evidence(records: Sequence[Record], plot: Path | None = None) -> tuple[str, Chosen]:
    """Return the report on the runs that rules are chosen on, and the rules."""
    cases = _cases(records)
    lines = [_runs(records), "", *_reach(cases), ""]
    for interval, within in ((10, WITHIN), (10, LEAD * 10), (50, WITHIN)):
        lines += [f"**Onset within {within} steps, profiles every {interval}: AUROC [95 %]**", "", SELECTED, ""]
        lines += [signals.table(cases.runs[interval], within, SHOWN), ""]
    said = "caught two checkpoints ahead at intervals 10 / 20, healthy runs alarmed at any interval"
    lines += [f"**One figure, one threshold, runs left out ({said})**", "", sequential.table(cases, TEST_PRICE), ""]
    table = Table.of(cases, candidates(cases))
    frontier = {name: [left_out(table, _among(table, name), price) for price in PRICES] for name in SETS}
    lines += ["**Sets of rules, on runs that they were not chosen on**", "", PRICED, "", _frontier(cases, frontier), ""]
    sets = {"the prototype's": PROTOTYPE, "the rescue's": RESCUE}
    everything = np.ones(len(cases.healthy), dtype=bool)
    for name, verdicts in frontier.items():
        price = PRICES[_within_budget(cases, verdicts)]
        rules = choose(table, _among(table, name), price, everything)
        sets[name] = tuple(table.offered[place].rule(threshold) for place, threshold in rules)
    keys = tuple(sorted(record["key"] for record in records))
    chosen = Chosen("tuning", keys, Counter(map(kind_of, records)), sets)
    lines += ["**The rules that follow, on the runs that they were chosen on**", "", _outcomes(records, chosen.sets)]
    if plot is not None:
        draw(cases, frontier, plot)
    return "\n".join(lines), chosen


def applied(records: Sequence[Record], chosen: Chosen) -> str:
    """Return what chosen rules do on other runs."""
    again = len({record["key"] for record in records} & set(chosen.keys))
    count = len(chosen.keys)
    said = f"The rules were chosen on {count} runs of the part {chosen.part!r}; {again} of them are among these."
    return "\n".join([_runs(records), said, "", *_reach(_cases(records)), "", _outcomes(records, chosen.sets)])


def can_be_warned(run: Series, interval: int) -> bool:
    """Return whether an event that may give an alarm lies early enough before the onset."""
    return run.onset is not None and bool(
        ((run.steps >= min(ARMED)) & (run.steps <= run.onset - LEAD * interval)).any()
    )


def _cases(records: Sequence[Record]) -> Cases:
    known = [record for record in records if kind_of(record) != "failed"]
    return Cases({interval: [series(record, interval) for record in known] for interval in INTERVALS})


def _runs(records: Sequence[Record]) -> str:
    kinds = Counter(map(kind_of, records))
    return (
        f"{len(records)} runs: {kinds['diverged']} diverged, {kinds['healthy']} learned, {kinds['failed']} finished "
        "without having learned (an alarm there is neither false nor a catch)."
    )


def _reach(cases: Cases) -> list[str]:
    lines = [
        f"Divergences with an event from step {min(ARMED)} on that lies {LEAD} checkpoints before the onset:",
        "",
        "| interval | all | no_norm | normalized |",
        "|---|---|---|---|",
    ]
    for interval, runs in cases.runs.items():
        diverged = [run for run in runs if run.kind == "diverged"]
        classes = (diverged, *_by_norm(diverged))
        cells = [f"{sum(can_be_warned(run, interval) for run in of)} of {len(of)}" for of in classes]
        lines.append(f"| {interval} | {' | '.join(cells)} |")
    return lines


def _by_norm(runs: Sequence[Series]) -> tuple[list[Series], list[Series]]:
    return [run for run in runs if run.norm == "no_norm"], [run for run in runs if run.norm != "no_norm"]


def _among(table: Table, name: str) -> np.ndarray:
    return table.seen_by({metric for source in SETS[name] for metric in SOURCES[source]})


def _frontier(cases: Cases, frontier: Mapping[str, Sequence[Verdict]]) -> str:
    heads = [f"caught at {interval}" for interval in INTERVALS[:3]]
    lines = [f"| what is seen | price | {' | '.join(heads)} | healthy runs alarmed at any interval |", "|---" * 6 + "|"]
    reach = {k: sum(can_be_warned(run, k) for run in runs) for k, runs in cases.runs.items()}
    for name, verdicts in frontier.items():
        for price, verdict in zip(PRICES, verdicts, strict=True):
            found = zip(verdict.caught.sum(axis=1)[:3], list(reach.values())[:3], strict=True)
            cells = [str(Share(int(count), of)) for count, of in found]
            alarmed = str(Share(_alarmed(verdict), int(cases.healthy.sum())))
            lines.append(f"| {name} | {price:g} | {' | '.join(cells)} | {alarmed} |")
    return "\n".join(lines)


def _alarmed(verdict: Verdict) -> int:
    return int(verdict.false.any(axis=0).sum())


def _within_budget(cases: Cases, verdicts: Sequence[Verdict]) -> int:
    """Return the place of the price that catches most at `FALSE_ALARMS`; where none keeps to it, the highest price."""
    bound = FALSE_ALARMS * cases.healthy.sum()
    allowed = [place for place, verdict in enumerate(verdicts) if _alarmed(verdict) <= bound]
    return max(allowed, key=lambda place: (int(verdicts[place].caught.sum()), -place), default=0)


def _outcomes(records: Sequence[Record], sets: Mapping[str, Sequence[Rule]]) -> str:
    """Return, for each set of rules and interval, what is caught how early, and what is alarmed for nothing."""
    heads = (
        "rules",
        "interval",
        f"caught {LEAD} checkpoints ahead, of all",
        "of those that could be",
        "no_norm",
        "normalized",
        "caught before the onset",
        "lead in steps",
        "in checkpoints",
        "alarmed before it has diverged",
        "healthy runs alarmed",
        "failed runs alarmed",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for interval in INTERVALS:
        runs = [series(record, interval) for record in records]
        diverged, healthy, failed = (
            [run for run in runs if run.kind == kind] for kind in ("diverged", "healthy", "failed")
        )
        for name, rules in sets.items():
            alarms = {run.key: first_alarm(rules, run) for run in runs}
            leads = {run.key: _lead(run, alarms[run.key]) for run in diverged}
            ahead = {key for key, lead in leads.items() if lead is not None and lead >= LEAD * interval}
            known = [lead for lead in leads.values() if lead is not None and lead > 0]
            reach = [run for run in diverged if can_be_warned(run, interval)]
            classes = (diverged, reach, *_by_norm(reach))
            cells = [str(Share(sum(run.key in ahead for run in of), len(of))) for of in classes]
            middle = median(known) if known else None
            cells += [
                str(Share(len(known), len(diverged))),
                "-" if middle is None else f"{middle:g}",
                "-" if middle is None else f"{middle / interval:.1f}",
                str(Share(sum(alarms[run.key] is not None for run in diverged), len(diverged))),
                str(Share(sum(alarms[run.key] is not None for run in healthy), len(healthy))),
                str(Share(sum(alarms[run.key] is not None for run in failed), len(failed))),
            ]
            lines.append(f"| {name} | {interval} | {' | '.join(cells)} |")
    lines += ["", "The rules; of a set, any gives the alarm:", ""]
    for name, rules in sets.items():
        lines += [f"* {name}: {'; '.join(map(str, rules)) or 'none is worth its false alarms'}"]
    return "\n".join(lines)


def _lead(run: Series, alarm: int | None) -> int | None:
    return None if alarm is None or run.onset is None else run.onset - alarm


def draw(cases: Cases, frontier: Mapping[str, Sequence[Verdict]], path: Path) -> None:
    """Draw the frontier at the first two intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for column, (panel, interval) in enumerate(zip(panels, INTERVALS[:2], strict=True)):
        reach = sum(can_be_warned(run, interval) for run in cases.runs[interval])
        for name, verdicts in frontier.items():
            points = [
                (_alarmed(verdict) / cases.healthy.sum(), verdict.caught[column].sum() / max(1, reach))
                for verdict in verdicts
            ]
            panel.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, linewidth=1, label=name)
        panel.axvline(FALSE_ALARMS, color="0.8", linewidth=1, zorder=0)
        panel.axhline(0.95, color="0.8", linewidth=1, zorder=0)
        panel.set(xlabel="healthy runs alarmed", ylim=(0, 1.02), xlim=(0, None))
        panel.set_title(f"profiles every {interval} steps, {reach} divergences", fontsize=10)
    panels[0].set_ylabel(f"divergences caught {LEAD} checkpoints ahead")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
