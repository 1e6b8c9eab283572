"""Table 13: muP, with KSS and without, in the setting of Table 3.

Width 64 takes the rates of width 32. At twice the rate, the runs at .01 are those of muP. The paper says neither its
base width nor how much higher the higher rate is.
"""

from __future__ import annotations

from training.experiments.paper import stabilizers
from training.experiments.paper.runs import arms, progress
from training.experiments.paper.section import Section
from training.experiments.paper.stabilizers import Published
from training.experiments.record import Record

TITLE = "muP, with KSS and without"
CHEAP = True
MUP = "mup_recall"
SPECS = (stabilizers.SPEC, MUP)

HIGHER = "muP at twice the rate"
PUBLISHED = {
    "none": Published(66.7, 28.5, 0.85),
    "muP": Published(41.7, 35.8, 0.72, "< 1"),
    HIGHER: Published(50.0, 38.2, 0.78, "< 1"),
    "KSS 0.15": Published(12.5, 48.2, 0.58, "10.8"),
    "muP + KSS": Published(8.3, 51.5, 0.52, "11.2"),
}


def section() -> Section:
    """Return the table."""
    runs = found()
    learned = [record["learned"] for records in arms(MUP).values() for record in records]
    return Section(
        name="table_13",
        title=TITLE,
        setting=f"{stabilizers.setting()} muP from width 32: {progress(MUP)}.",
        header=stabilizers.HEADER,
        rows=stabilizers.rows(PUBLISHED, runs),
        sentence=(
            f"{stabilizers.told_apart(PUBLISHED, runs)} muP brings an initialization with which small models do not "
            f"learn the task: {sum(learned)} of its {len(learned)} runs did, so that to survive says little."
        ),
    )


def found() -> dict[str, list[Record]]:
    """Return the runs of each arm."""
    runs = arms(MUP)
    shared = [record for record in runs.get("muP", []) if record["configuration"]["optimizer.learning_rate"] == 0.01]
    return stabilizers.found() | runs | {HIGHER: runs.get(HIGHER, []) + shared}
