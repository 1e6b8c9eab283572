"""What the arms of a rescue came to: divergence and failure with exact intervals, final losses seed by seed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from scipy.stats import binomtest

from training.experiments.intervals import Share, fisher, mean
from training.experiments.ranking import LEVEL
from training.experiments.record import Record
from training.experiments.rescue_spec import RescueRun, RescueSpec

COLUMNS = (
    "arm",
    "where",
    "n",
    "diverged",
    "failed",
    "held-out loss",
    "- reference",
    "rollbacks",
    "overhead",
    "observing",
)


def table(spec: RescueSpec, runs: Sequence[RescueRun], records: Sequence[Record]) -> str:
    """Return a Markdown table, one row an arm and point of the grid; the points share seeds, so no row is of several.

    Divergence has its exact interval (Clopper and Pearson 1934), and Fisher's exact p against each control at the same
    points. Losses are compared with those of the reference, and of each control, on the same seeds, where both runs
    finished: mean difference and its t interval, over the pairs. The overhead is that of `rescue_run.overhead`,
    observing what profiles and checkpoints took beside the steps; medians over the runs.
    """
    found = {record["key"]: record for record in records}
    by_arm: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.key in found:
            by_arm[run.arm.name][_where(run)].append(found[run.key])
    others = [name for name in spec.controls if name != spec.reference]
    columns = [*COLUMNS, *(f"{what} {name}" for name in others for what in ("p against", "-"))]
    rows = [columns, ["---"] * len(columns)]
    for arm in spec.arms:
        rows += [_row(arm.name, where, group, by_arm, spec, others) for where, group in by_arm[arm.name].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(
    arm: str,
    where: str,
    records: list[Record],
    by_arm: dict[str, dict[str, list[Record]]],
    spec: RescueSpec,
    others: list[str],
) -> list[str]:
    finished = [record["final"]["loss"] for record in records if record["status"] == "finished"]
    known = [loss for loss in finished if loss is not None]
    ratios = [record["overhead"]["ratio"] for record in records if record["overhead"]["ratio"] is not None]
    observing = [record["seconds"]["observing"] / record["seconds"]["training"] for record in records]
    row = [
        arm,
        where,
        str(len(records)),
        share(_diverged(records), len(records)),
        str(sum(record["failed"] for record in records)),
        f"{statistics.median(known):.3f}" if known else "-",
        difference(records, [record for part in by_arm[spec.reference].values() for record in part]),
        f"{sum(len(record['rollbacks']) for record in records) / len(records):.1f}",
        f"{statistics.median(ratios):+.1%}" if ratios else "-",
        f"{statistics.median(observing):+.0%}",
    ]
    for name in others:
        rivals = by_arm[name].get(where, [])
        row += ["-", "-"] if name == arm or not rivals else [p_value(records, rivals), difference(records, rivals)]
    return row


def share(count: int, total: int) -> str:
    """Return e.g. ``1 of 20: 5 % [0.1, 24.9]``."""
    interval = binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return f"{count} of {total}: {count / total:.0%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def p_value(records: Sequence[Record], rivals: Sequence[Record]) -> str:
    """Return Fisher's exact p, two-sided, of the same share of diverged runs."""
    return f"{fisher(*(Share(_diverged(each), len(each)) for each in (records, rivals))):.2g}"


def difference(records: Sequence[Record], rivals: Sequence[Record]) -> str:
    """Return the mean difference of final losses on the same seed, at the same point where both have one."""
    theirs = {(record["seed"], _place(record)): _final(record) for record in rivals}
    pairs = []
    for record in records:
        seed = record["seed"]
        ours, other = _final(record), theirs.get((seed, _place(record)), theirs.get((seed, "")))
        if ours is not None and other is not None:
            pairs.append(ours - other)
    if not pairs:
        return "-"
    if len(pairs) == 1:
        return f"{pairs[0]:+.3f} (1)"
    found = mean(pairs)  # the percentiles of a bootstrap would cover 84 % with four pairs, not 95 %
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] ({len(pairs)})"


def _final(record: Record) -> float | None:
    loss: float | None = record["final"]["loss"] if record["status"] == "finished" else None
    return loss


def _diverged(records: Sequence[Record]) -> int:
    return sum(record["status"] == "diverged" for record in records)


def _where(run: RescueRun) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in run.point.items())


def _place(record: Record) -> str:
    return ", ".join(f"{key} {value}" for key, value in record["point"].items())
