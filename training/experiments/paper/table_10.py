"""Table 10: LLaMA-2-7B by depth; SmolLM2-135M, a Llama of 30 layers, stands in for it.

LLaMA-2 itself is measured where its folder is given: `training.experiments.paper.pretrained`.
"""

from __future__ import annotations

from training.experiments.paper import pretrained
from training.experiments.paper.section import Section, said

TITLE = "LLaMA-2-7B by thirds of its depth"
CHEAP = True
SPECS = ()

PUBLISHED = {
    "nonlinearity_ratio": (0.45, 0.58, 0.72),
    "near_unit_mass": (0.74, 0.68, 0.61),
    "eigenvector_condition": (8.2, 9.5, 10.8),
}
MODELS = ("LLaMA-2-7B", "smollm2-135m")


def section() -> Section:
    """Return the table."""
    models = [model for model in pretrained.kept() if model.name in MODELS]
    smol = next(model for model in models if model.name == "smollm2-135m")
    eta, start = (when[32]["nonlinearity_ratio"] for when in (smol.trained, smol.untrained))
    ranks = smol.trained[8]["rank"]
    return Section(
        name="table_10",
        title=TITLE,
        setting=pretrained.setting(models),
        header=pretrained.HEADER,
        rows=pretrained.rows(models, PUBLISHED),
        sentence=said(
            "SmolLM2 does not begin linear and end nonlinear: its nonlinearity ratio is lower in the last third than "
            "in the first, whether 8 prompts differ or 32, while training raised it in every third. The paper's "
            "protocol has at most 512 different states for 4096 directions (256 with 4 prompts); here such few "
            "states leave fewer than 130 of 576 directions, and near-unit mass is twice that of 32 prompts, so the "
            "figures are as much about the number of prompts as about the model. Condition numbers of about 10 were "
            "found nowhere.",
            not any(pretrained.rises(smol.trained[prompts]["nonlinearity_ratio"]) for prompts in pretrained.PROMPTS),
            all(late > early for late, early in zip(pretrained.averages(eta), pretrained.averages(start), strict=True)),
            max(ranks) < 130,
            pretrained.average(smol.trained[8]["near_unit_mass"])
            > 1.9 * pretrained.average(smol.trained[32]["near_unit_mass"]),
            min(min(smol.trained[prompts]["eigenvector_condition"]) for prompts in pretrained.PROMPTS) > 50,
        ),
    )
