"""Table 5: the largest stable learning rate of each norm, with KSS and without.

As in the paper a rate is stable when less than a fifth of its runs diverge, which of two runs is none; the largest is
the last below the first that is not. Long before a normalized model diverges it stops learning, so the largest rate at
which all runs learn (held-out loss at most half of chance) stands beside it.
"""

from __future__ import annotations

from collections import defaultdict

from training.experiments.paper.runs import arms, diverged, progress
from training.experiments.paper.section import Section, same
from training.experiments.record import Record

TITLE = "the largest stable learning rate, with KSS and without"
CHEAP = True
SPECS = ("rates_recall",)
HEADER = (
    "norm",
    "stable: the paper, without -> with KSS",
    "stable: ours, without -> with KSS",
    "same sign",
    "learned: ours, without -> with KSS",
    "runs",
)
PUBLISHED = {"Pre-LN": (0.005, 0.008), "RMSNorm": (0.003, 0.005), "No-Norm": (0.002, 0.005)}
STABLE = 0.2  # share of a rate's runs that diverge, below which it is stable


def section() -> Section:
    """Return the table."""
    return Section(
        name="table_05",
        title=TITLE,
        setting=(
            "Width 64, 4 blocks, associative recall that is learned, horizon 800, KSS with alpha .15; rates a factor "
            f"of 1.3 to 4 apart, two seeds each; {progress(SPECS[0])}."
        ),
        header=HEADER,
        rows=tuple(_row(norm) for norm in PUBLISHED),
        sentence=_sentence(),
    )


def largest(records: list[Record], *, learned: bool = False) -> float | None:
    """Return the last rate before the first that is not stable, or that is not learned; None when the first is not."""
    by_rate: dict[float, list[Record]] = defaultdict(list)
    for record in records:
        by_rate[record["configuration"]["optimizer.learning_rate"]].append(record)
    best = None
    for rate, runs in sorted(by_rate.items()):
        if not (all(run["learned"] for run in runs) if learned else diverged(runs).value < STABLE):
            break
        best = rate
    return best


def _row(norm: str) -> tuple[str, ...]:
    runs = arms(SPECS[0])
    without, with_kss = runs.get(norm, []), runs.get(f"{norm} + KSS", [])
    stable = [largest(each) for each in (without, with_kss)]
    agree = None if None in stable or stable[0] == stable[1] else stable[1] > stable[0]  # type: ignore[operator]
    paper = PUBLISHED[norm]
    return (
        norm,
        f"{paper[0]} -> {paper[1]}",
        " -> ".join("none" if each is None else f"{each:g}" for each in stable),
        same(agree),
        " -> ".join(
            f"{each:g}" if each else "none" for each in (largest(x, learned=True) for x in (without, with_kss))
        ),
        f"{len(without)} + {len(with_kss)}",
    )


def _sentence() -> str:
    runs = arms(SPECS[0])
    pairs = {norm: [largest(runs.get(name, [])) or 0.0 for name in (norm, f"{norm} + KSS")] for norm in PUBLISHED}
    words = {
        word: [norm for norm, (a, b) in pairs.items() if (b > a) - (b < a) == sign]
        for word, sign in (("raises", 1), ("lowers", -1), ("leaves where it is", 0))
    }
    told = "; ".join(f"it {word} that of {', '.join(norms)}" for word, norms in words.items() if norms)
    beyond = [norm for norm, (a, _) in pairs.items() if a > (largest(runs.get(norm, []), learned=True) or 0.0)]
    stopped = f" Without KSS, a stable rate is not yet one that learns: {', '.join(beyond)}." if beyond else ""
    return f"KSS and the largest stable rate: {told}. Two runs a rate do not tell one rate from the next.{stopped}"
