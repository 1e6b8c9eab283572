"""Table 14: other optimizers than AdamW, in the setting of Table 3.

Lion has a tenth of the rates, as its authors advise; LAMB's longer warm-up is half of the horizon. The paper's best
rates are out of .001 to .02, ours out of the three of each arm.
"""

from __future__ import annotations

from training.experiments.paper import stabilizers
from training.experiments.paper.runs import accuracy, arms, diverged, progress
from training.experiments.paper.section import Section
from training.experiments.paper.stabilizers import Published
from training.experiments.record import Record

TITLE = "other optimizers, in the setting of Table 3"
CHEAP = True
LAMB = "lamb_recall"
SPECS = (stabilizers.SPEC, LAMB)

PUBLISHED = {
    "none": Published(66.7, 28.5, 0.85),
    "clip 1.0": Published(58.3, 30.8, 0.83, "< 1"),
    "LAMB": Published(45.8, 36.2, 0.75, "5"),
    "LAMB + warm-up": Published(37.5, 40.8, 0.68, "5"),
    "Lion": Published(45.8, 36.5, 0.78, "15"),
    "KSS 0.15": Published(12.5, 48.2, 0.58, "10.8"),
    "LAMB + KSS": Published(8.3, 52.8, 0.52, "16"),
}
BEST = {
    "none": 0.003,
    "clip 1.0": 0.005,
    "LAMB": 0.01,
    "LAMB + warm-up": 0.02,
    "Lion": 0.001,
    "KSS 0.15": 0.008,
    "LAMB + KSS": 0.015,
}
RATE = "optimizer.learning_rate"


def section() -> Section:
    """Return the table."""
    runs = stabilizers.found() | arms(LAMB)
    rows = stabilizers.rows(PUBLISHED, runs)
    return Section(
        name="table_14",
        title=TITLE,
        setting=f'{stabilizers.setting()} LAMB at the same rates: {progress(LAMB)}. Arm "none" is AdamW.',
        header=(*stabilizers.HEADER, "best rate, the paper", "best rate of three, ours"),
        rows=tuple((*row, str(BEST[row[0]]), best_rate(runs.get(row[0], []))) for row in rows),
        sentence=stabilizers.told_apart(PUBLISHED, runs),
    )


def best_rate(records: list[Record]) -> str:
    """Return the rate at which the fewest runs diverged, of equal ones that with the highest accuracy."""
    rates = sorted({float(record["configuration"][RATE]) for record in records})
    if not rates:
        return "-"
    return f"{min(rates, key=lambda rate: _cost(rate, records)):g}"


def _cost(rate: float, records: list[Record]) -> tuple[float, float]:
    chosen = [record for record in records if record["configuration"][RATE] == rate]
    return diverged(chosen).value, -accuracy(chosen).value
