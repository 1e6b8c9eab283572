"""Figure 4: the nonlinearity ratio of each layer of pretrained models.

The paper has four of them, whose figures it does not print but in Tables 10 and 15; SmolLM2-135M and MiniLM stand in.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from training.experiments.paper import pretrained
from training.experiments.paper.drawing import COLOURS, canvas, legend, save
from training.experiments.paper.section import Section, said, same

TITLE = "the nonlinearity ratio over the depth of pretrained models"
CHEAP = True
SPECS = ()

FIELD = "nonlinearity_ratio"
PROMPTS = 32


def section() -> Section:
    """Draw the figure."""
    models = pretrained.kept()
    found = {
        model.name: {prompts: _rank(model.trained[prompts][FIELD]) for prompts in pretrained.PROMPTS}
        for model in models
    }
    rows = [
        (
            f"{model.name}, {prompts} prompts: Spearman's correlation with depth",
            "1 in each of four models",
            f"{found[model.name][prompts][0]:.2f} (p = {found[model.name][prompts][1]:.2g}), n = {model.depth} layers",
            same(found[model.name][prompts][0] > 0 if found[model.name][prompts][1] < 0.05 else None),
        )
        for model in models
        for prompts in pretrained.PROMPTS
    ]
    own = [found[name][prompts] for name in ("smollm2-135m", "minilm-l6") for prompts in pretrained.PROMPTS]
    smol, mini = (next(model for model in models if model.name == name) for name in ("smollm2-135m", "minilm-l6"))
    ratios = smol.trained[PROMPTS][FIELD]
    falls, flat = (pretrained.averages(model.untrained[PROMPTS][FIELD]) for model in (smol, mini))
    return Section(
        name="figure_4",
        title=TITLE,
        setting=pretrained.setting(models),
        rows=tuple(rows),
        sentence=said(
            "In no model does the ratio rise with depth beyond what chance gives; in SmolLM2 it stays about 0.5, but "
            "for single layers, and drops in the last three. With random weights it falls in SmolLM2, and is flat in "
            "MiniLM.",
            not any(correlation > 0 and p < 0.05 for correlation, p in own),
            0.45 < float(np.median(ratios)) < 0.55 and max(ratios[-3:]) < 0.8 * float(np.median(ratios)),
            falls[2] < falls[1] < falls[0],
            max(flat) - min(flat) < 0.02,
        ),
        figure=_draw(models),
    )


def _rank(values: list[float]) -> tuple[float, float]:
    found = stats.spearmanr(range(len(values)), values)
    return float(found.statistic), float(found.pvalue)


def _draw(models: list[pretrained.Pretrained]) -> str:
    figure, (axes,) = canvas(6, 3.6)
    for model, colour in zip(models, COLOURS, strict=False):
        depth = np.linspace(0, 1, model.depth)
        axes.plot(depth, model.trained[PROMPTS][FIELD], "o-", markersize=4, color=colour, label=model.name)
        axes.plot(depth, model.trained[8][FIELD], ":", color=colour, label=f"{model.name}, 8 prompts")
        axes.plot(depth, model.untrained[PROMPTS][FIELD], "--", color=colour, label=f"{model.name}, random weights")
    axes.set(xlabel="depth, from the first layer to the last", ylabel="nonlinearity ratio", ylim=(0, 1))
    legend(axes, ncols=2, loc="upper right")
    return save(figure, "figure_4")
