"""Table 15: GPT-2 by depth; SmolLM2-135M and MiniLM stand in for it.

GPT-2 itself is measured where its folder is given: `training.experiments.paper.pretrained`.
"""

from __future__ import annotations

from training.experiments.paper import pretrained
from training.experiments.paper.section import Section, said

TITLE = "GPT-2 by thirds of its depth"
CHEAP = True
SPECS = ()

# Of the smaller GPT-2, with which the stand-ins are compared, and of the larger one.
PUBLISHED = {
    "spectral_radius": (1.15, 1.23, 1.31),
    "eigenvector_condition": (8.3, 10.1, 11.2),
    "nonlinearity_ratio": (0.52, 0.61, 0.71),
    "near_unit_mass": (0.68, 0.62, 0.58),
}
LARGER = {
    "spectral_radius": (1.12, 1.19, 1.27),
    "eigenvector_condition": (7.5, 9.2, 10.8),
    "nonlinearity_ratio": (0.48, 0.58, 0.68),
    "near_unit_mass": (0.72, 0.65, 0.60),
}
MODELS = ("GPT-2 124M", "smollm2-135m", "minilm-l6")


def section() -> Section:
    """Return the table."""
    models = pretrained.kept()
    small = [model for model in models if model.name in MODELS]
    larger = [model for model in models if model.name == "GPT-2 355M"]
    stand_ins = [model for model in small if model.name in ("smollm2-135m", "minilm-l6")]
    profiles = [model.trained[prompts] for model in stand_ins for prompts in pretrained.PROMPTS]
    return Section(
        name="table_15",
        title=TITLE,
        setting=pretrained.setting([*small, *larger]),
        header=pretrained.HEADER,
        rows=(*pretrained.rows(small, PUBLISHED), *pretrained.rows(larger, LARGER)),
        sentence=said(
            "Neither stand-in shows the trend of the paper: in both, spectral radius and nonlinearity ratio are "
            "lower in the last third than in the first, where the paper has them rise. Near-unit mass falls with "
            "depth in MiniLM, as in the paper, and not in SmolLM2. With random weights MiniLM is the same at every "
            "depth, so its trend was learned.",
            len(stand_ins) == 2,
            not any(pretrained.rises(profile["spectral_radius"]) for profile in profiles),
            not any(pretrained.rises(profile["nonlinearity_ratio"]) for profile in profiles),
            [pretrained.rises(profile["near_unit_mass"]) for profile in profiles] == [True, True, False, False],
            abs(
                pretrained.averages(stand_ins[1].untrained[32]["near_unit_mass"])[2]
                - pretrained.averages(stand_ins[1].untrained[32]["near_unit_mass"])[0]
            )
            < 0.02,
        ),
    )
