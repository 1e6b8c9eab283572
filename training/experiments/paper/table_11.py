"""Table 11: architectures as they start.

The paper does not say how its MoE, Mamba and KAN are initialized, nor how many basis functions its KAN has; ours has 8.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.experiments.intervals import Mean
from training.experiments.paper.architectures import SEEDS, STATES, over_seeds
from training.experiments.paper.section import Section, said, side

TITLE = "architectures, untrained"
CHEAP = True
SPECS = ()

FIELDS = ("nonlinearity_ratio", "near_unit_mass", "spectral_radius")

# Name here: name there, and the three figures of the paper.
PUBLISHED = {
    "Pre-LN": ("Transformer, Pre-LN", (0.52, 0.16, 2.29)),
    "No-Norm": ("Transformer, No-Norm", (0.48, 0.79, 1.11)),
    "8 experts, top-2": ("MoE, top-2 of 8", (0.55, 0.58, 2.12)),
    "Mamba, narrow": ("Mamba", (0.42, 0.12, 0.95)),
    "B = 8": ("KAN", (0.78, 0.52, 2.15)),
}
REFERENCE = "Pre-LN"
HEADER = (
    "architecture",
    "eta_nl, near-unit mass, rho: the paper",
    "ours",
    "each against Pre-LN, same sign",
    "contractive mass, ours",
)


def section() -> Section:
    """Return the table."""
    ours = {name: [over_seeds(name, field) for field in FIELDS] for name in PUBLISHED}
    contractive = {name: over_seeds(name, "contractive_mass") for name in PUBLISHED}
    eta, mass, rho = ({name: each[place].value for name, each in ours.items()} for place in range(3))
    return Section(
        name="table_11",
        title=TITLE,
        setting=(
            f"Untrained, width 256, 6 blocks, N = {STATES}, mean over layers, then over {len(SEEDS)} seeds; "
            "transformers on associative recall, the others on the synthetic language, as in the paper; every matrix "
            "N(0, .02^2) but for those of Mamba and of the splines."
        ),
        header=HEADER,
        rows=tuple(_row(name, ours, str(contractive[name])) for name in PUBLISHED),
        sentence=said(
            "Near-unit mass and spectral radius of the two transformers come out as published, and the others have "
            "more near-unit mass than Pre-LN, as in the paper, but so has Mamba, which starts nowhere near "
            "contractive: its spectral radius is above 1 and its contractive mass 0.1. The nonlinearity ratio of the "
            "transformers is about half of the published one, and Mamba's is the second highest, where the paper has "
            "the lowest.",
            abs(mass["Pre-LN"] - 0.16) < 0.02 and abs(rho["Pre-LN"] - 2.29) < 0.1,
            abs(mass["No-Norm"] - 0.79) < 0.02 and abs(rho["No-Norm"] - 1.11) < 0.02,
            all(mass["No-Norm"] > mass[name] > mass["Pre-LN"] for name in ("8 experts, top-2", "B = 8")),
            mass["Mamba, narrow"] > mass["Pre-LN"] and rho["Mamba, narrow"] > 1.2,
            contractive["Mamba, narrow"].value < 0.15,
            all(0.3 < eta[name] / PUBLISHED[name][1][0] < 0.7 for name in ("Pre-LN", "No-Norm")),
            sorted(eta, key=lambda name: eta[name])[-2] == "Mamba, narrow",
        ),
    )


def _row(name: str, ours: Mapping[str, list[Mean]], contractive: str) -> tuple[str, ...]:
    theirs = PUBLISHED[name][1]
    compared = zip(theirs, PUBLISHED[REFERENCE][1], ours[name], ours[REFERENCE], strict=True)
    signs = [side(*figures) for figures in compared]
    return (
        PUBLISHED[name][0],
        " / ".join(f"{value:.2f}" for value in theirs),
        "; ".join(map(str, ours[name])),
        ", ".join(signs),
        contractive,
    )
