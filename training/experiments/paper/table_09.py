"""Table 9: KSS in vision transformers.

The digits of scikit-learn (8 x 8) in the place of CIFAR-10: ``training/configs/cifar10_vit.yaml`` is the paper's model,
for who has the data and a GPU.
"""

from __future__ import annotations

from training.experiments.paper.kss_or_not import against, at, effect
from training.experiments.paper.runs import accuracy, arms, diverged, near_unit_mass, progress
from training.experiments.paper.section import Section

TITLE = "KSS in vision transformers"
CHEAP = True
SPECS = ("digits_vit",)
USUAL = 0.003
HEADER = (
    "norm",
    "diverged, accuracy %, near-unit mass: the paper, none -> KSS",
    "diverged: ours, none -> KSS",
    "same sign",
    "accuracy %: ours, none -> KSS",
    "same sign",
    "near-unit mass: ours, none -> KSS",
    "same sign",
)
PUBLISHED = {
    "Pre-LN": "1 of 24, 72.3, 0.42 -> 0 of 24, 75.8, 0.38",
    "RMSNorm": "2 of 24, 70.1, 0.48 -> 0 of 24, 74.2, 0.41",
}


def section() -> Section:
    """Return the table."""
    runs = arms(SPECS[0])
    none = [record for norm in PUBLISHED for record in runs.get(norm, [])]
    kss = [record for norm in PUBLISHED for record in runs.get(f"{norm} + KSS", [])]
    return Section(
        name="table_09",
        title=TITLE,
        setting=(
            "ViT, width 64, 4 blocks, patches of 2 x 2 of 8 x 8 digits, batch 32, 800 steps; rates .003, .25, .5, two "
            f"seeds each; {progress(SPECS[0])}. Accuracy (held out) and near-unit mass at the end: at .003."
        ),
        header=HEADER,
        rows=tuple(_row(norm) for norm in PUBLISHED),
        sentence=against(none, kss, USUAL),
    )


def _row(norm: str) -> tuple[str, ...]:
    runs = arms(SPECS[0])
    pair = [runs.get(norm, []), runs.get(f"{norm} + KSS", [])]
    shares = [diverged(each) for each in pair]
    accuracies = [accuracy(at(each, USUAL)) for each in pair]
    masses = [near_unit_mass(at(each, USUAL)) for each in pair]
    return (
        norm,
        PUBLISHED[norm],
        " -> ".join(map(str, shares)),
        effect(shares, falls=True),
        " -> ".join(map(str, accuracies)),
        effect(accuracies, falls=False),
        " -> ".join(map(str, masses)),
        effect(masses, falls=True),
    )
