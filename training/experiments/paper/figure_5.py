"""Figure 5: near-unit mass taken for the probability of divergence.

The runs are those of Table 1 and of Table 3 without a remedy: associative recall, six norms. The paper's error is the
expected calibration error; ours is the same over ten bins of equally many runs.
"""

from __future__ import annotations

import numpy as np

from training.experiments.paper import stabilizers
from training.experiments.paper.drawing import BLUE, GREY, ORANGE, canvas, legend, save
from training.experiments.paper.runs import arms
from training.experiments.paper.section import Section, same
from training.experiments.ranking import (
    auroc,
    calibration_by_chance,
    estimate,
    expected_calibration_error,
    numbered,
    reliability,
)

TITLE = "near-unit mass as a probability of divergence"
CHEAP = True
SPECS = ("norms_recall", stabilizers.SPEC)

ERROR = 0.283  # the paper's
BINS = np.linspace(0, 1, 21)


def section() -> Section:
    """Draw the figure."""
    records = [record for records in arms(SPECS[0]).values() for record in records]
    records += stabilizers.found().get(stabilizers.NONE, [])
    masses = np.array([record["initial"]["features"]["near_unit_mass_mean"] for record in records], dtype=float)
    bad = np.array([record["labels"]["rksp"] is not None for record in records])
    count = len(records)
    norms = [record["configuration"]["model.arguments.norm"] for record in records]
    groups = numbered(norms)
    ranked = estimate(lambda chosen: auroc(masses[chosen], bad[chosen]), count)
    within = estimate(lambda chosen: auroc(masses[chosen], bad[chosen], groups[chosen]), count)
    error, chance = expected_calibration_error(masses, bad), calibration_by_chance(masses)
    bare = sum(norm == "no_norm" for norm, diverged in zip(norms, bad, strict=True) if diverged)
    return Section(
        name="figure_5",
        title=TITLE,
        setting=(
            "Runs without a remedy: those of Table 1 (six norms, rates .001 to .01) and of Table 3 (No-Norm, .005 to "
            f".01); width 64, 4 blocks, associative recall that is learned, horizon 800; {count} runs, "
            f"{int(bad.sum())} of them diverged."
        ),
        rows=(
            (
                "expected calibration error",
                str(ERROR),
                f"{error:.3f}, n = {count}",
                same(error > chance.high or None),
            ),
            ("AUROC", "0.995 (Table 2)", f"{ranked}, n = {count}", same(ranked.value > 0.5)),
            ("AUROC within norms", "-", f"{within}, n = {count}", "-"),
        ),
        sentence=(
            f"Probabilities that are right would show an error of {chance} by chance with so many runs. {bare} of "
            f"the {int(bad.sum())} runs that diverged have no norm, so what the score ranks is norms; what it knows "
            "beyond that is the AUROC within them."
        ),
        figure=_draw(masses, bad, error),
    )


def _draw(masses: np.ndarray, bad: np.ndarray, error: float) -> str:
    figure, (left, right) = canvas(8, 3.4, 2)
    rows = reliability(masses, bad)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    left.plot([p for p, _, _ in rows], [share for _, share, _ in rows], "o-", color=BLUE, clip_on=False)
    left.set(xlabel="near-unit mass at initialization", ylabel="share of runs that diverged", xlim=(0, 1), ylim=(0, 1))
    left.set_title(f"{len(bad)} runs in {len(rows)} bins; error {error:.2f}", fontsize=9)
    kinds = [masses[~bad], masses[bad]]
    right.hist(kinds, BINS, stacked=True, color=[BLUE, ORANGE], label=["finished", "diverged"])
    right.set(xlabel="near-unit mass at initialization", ylabel="runs", xlim=(0, 1))
    right.yaxis.get_major_locator().set_params(integer=True)
    legend(right)
    return save(figure, "figure_5")
