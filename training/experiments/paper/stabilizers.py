"""What Tables 3, 4 and 6 share: arms of one sweep, ``specs/paper/no_norm_recall.yaml``, each against doing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from training.experiments.intervals import Share, fisher
from training.experiments.paper import overhead
from training.experiments.paper.runs import accuracy, arms, diverged, near_unit_mass, progress
from training.experiments.paper.section import same, side
from training.experiments.record import Record

SPEC = "no_norm_recall"
NONE = "none"
HALF = "half the rate"
HEADER = (
    "arm",
    "diverged, the paper",
    "diverged, ours",
    "same sign",
    "accuracy %, the paper",
    "accuracy %, ours",
    "near-unit mass, the paper",
    "near-unit mass, ours",
    "overhead %, the paper",
    "overhead %, ours",
)
ALPHA = 0.05


class Published(NamedTuple):
    """A row of the paper: diverged and accuracy in percent, near-unit mass, overhead in percent; None: not told."""

    diverged: float
    accuracy: float
    near_unit_mass: float | None = None
    overhead: str | None = None


def setting() -> str:
    """Return the scale of the three tables."""
    return (
        "No-Norm, width 64, 4 blocks, associative recall that is learned (8 pairs, 8 queries, length 24), horizon 800, "
        f"rates .005, .007, .01 with four seeds each, 12 runs an arm; {progress(SPEC)} over Tables 3, 4 and 6. "
        "Accuracy: held out, of a diverged run that of its last finite state. Near-unit mass: mean over layers of the "
        "last profile (one in 100 steps) of the runs that got so far. Nothing was tuned."
    )


def found() -> dict[str, list[Record]]:
    """Return the runs of each arm; at half the rate, those at .005 are runs of doing nothing."""
    runs = arms(SPEC)
    shared = [record for record in runs.get(NONE, []) if record["configuration"]["optimizer.learning_rate"] == 0.005]
    return runs | {HALF: runs.get(HALF, []) + shared}


Runs = Mapping[str, list[Record]]


def rows(published: Mapping[str, Published | None], runs: Runs | None = None) -> tuple[tuple[str, ...], ...]:
    """Return a row for each arm; None: the paper has no such arm. ``runs``: other ones than `found`."""
    runs, costs = runs or found(), overhead.read()
    nothing, theirs = diverged(runs.get(NONE, [])), PUBLISHED_NONE
    return tuple(_row(name, each, runs.get(name, []), nothing, theirs, costs) for name, each in published.items())


PUBLISHED_NONE = Published(66.7, 28.5, 0.85)


def _row(
    name: str,
    theirs: Published | None,
    records: list[Record],
    nothing: Share,
    their_nothing: Published,
    costs: Mapping[str, str],
) -> tuple[str, ...]:
    share = diverged(records)
    effect = same(None)
    if theirs is not None and name != NONE:
        effect = side(theirs.diverged, their_nothing.diverged, share, nothing)
    paper = ("-",) * 4
    if theirs is not None:
        mass, cost = theirs.near_unit_mass, theirs.overhead
        paper = (f"{theirs.diverged} %", str(theirs.accuracy), "-" if mass is None else f"{mass:.2f}", cost or "-")
    ours = (str(share), str(accuracy(records)), str(near_unit_mass(records)), costs.get(name, "-"))
    return (
        name,
        paper[0],
        ours[0],
        effect,
        *(cell for pair in zip(paper[1:], ours[1:], strict=True) for cell in pair),
    )


def told_apart(names: Mapping[str, object], runs: Runs | None = None) -> str:
    """Return which arms diverged less or more often than doing nothing, as far as Fisher's test can tell."""
    runs = runs or found()
    nothing = diverged(runs.get(NONE, []))
    shares = {name: diverged(runs.get(name, [])) for name in names if name != NONE}
    apart = {name: share for name, share in shares.items() if share.runs and fisher(share, nothing) < ALPHA}
    fewer = [name for name, share in apart.items() if share.value < nothing.value]
    more = [name for name, share in apart.items() if share.value > nothing.value]
    parts = [f"{kind}: {', '.join(each) or 'none'}" for kind, each in (("fewer", fewer), ("more", more))]
    return (
        f"Against {nothing} without a remedy, Fisher's exact test (p < {ALPHA}, {len(shares)} comparisons, not "
        f"corrected) finds {'; '.join(parts)}; the others cannot be told from doing nothing with so few runs."
    )
