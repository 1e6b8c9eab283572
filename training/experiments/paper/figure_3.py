"""Figure 3: near-unit mass and nonlinearity ratio over the size of a model.

The paper has pretrained models of four sizes and prints no figures of theirs but those of Tables 10 and 15. Here there
are two pretrained models, which make no trend, and the Pre-LN architecture at four sizes, untrained.
"""

from __future__ import annotations

import numpy as np

from training.experiments.paper import pretrained, table_10, table_15
from training.experiments.paper.architectures import MODELS, SEEDS, over_seeds
from training.experiments.paper.drawing import BLUE, GREY, ORANGE, canvas, legend, save
from training.experiments.paper.section import Section, said, same

TITLE = "near-unit mass and nonlinearity ratio over the size of a model"
CHEAP = True
SPECS = ()

SIZES = ("Pre-LN, d = 64, L = 4", "Pre-LN, d = 128, L = 6", "Pre-LN", "Pre-LN, d = 512, L = 8")
FIELDS = {"near_unit_mass": "near-unit mass", "nonlinearity_ratio": "nonlinearity ratio"}
SIGN = {"near_unit_mass": -1, "nonlinearity_ratio": 1}  # of the slope that the paper draws
PROMPTS = 32

# Parameters and thirds, as the paper prints them: GPT-2 124M, 355M and LLaMA-2-7B.
PRINTED = ((124e6, table_15.PUBLISHED), (355e6, table_15.LARGER), (6.7e9, table_10.PUBLISHED))


def section() -> Section:
    """Draw the figure."""
    models = pretrained.kept()
    printed = {field: [(size, float(np.mean(table[field]))) for size, table in PRINTED] for field in FIELDS}
    sizes = {field: [(_parameters(name), over_seeds(name, field).value) for name in SIZES] for field in FIELDS}
    trained = {
        field: [(model.parameters, pretrained.average(model.trained[PROMPTS][field])) for model in models]
        for field in FIELDS
    }
    rows = []
    for field, label in FIELDS.items():
        direction = "falls" if SIGN[field] < 0 else "rises"
        for name, points in (
            ("GPT-2 124M, 355M, LLaMA-2-7B: means of the thirds that it prints", printed),
            (f"{', '.join(model.name for model in reversed(models))}: {PROMPTS} prompts", trained),
            (f"untrained Pre-LN, 0.2M to 26M, {len(SEEDS)} seeds each", sizes),
        ):
            ordered = sorted(points[field])
            slope = _slope(ordered)
            rows.append(
                (
                    f"{label}, {name}",
                    direction,
                    " / ".join(f"{value:.2f}" for _, value in ordered) + f"; {slope:+.3f} a decade",
                    same(slope * SIGN[field] > 0),
                )
            )
    slopes = {
        (kind, field): _slope(points[field])
        for kind, points in enumerate((printed, trained, sizes))
        for field in FIELDS
    }
    return Section(
        name="figure_3",
        title=TITLE,
        setting=(
            f"Pretrained models as in Tables 10 and 15, {PROMPTS} prompts; untrained Pre-LN transformers of width 64, "
            "128, 256 and 512 on associative recall; slopes of straight lines over the logarithm of the number of "
            "parameters, no interval, as there are two to four points of different families."
        ),
        rows=tuple(rows),
        sentence=said(
            "The paper's own tables contradict its figure: from GPT-2 124M to LLaMA-2-7B the near-unit mass that it "
            "prints rises and the nonlinearity ratio falls. Of our two pretrained models the larger has more "
            "near-unit mass and a lower ratio, too, but they differ in much more than size; untrained, neither "
            "depends much on it.",
            slopes[0, "near_unit_mass"] > 0 > slopes[0, "nonlinearity_ratio"],
            slopes[1, "near_unit_mass"] > 0 > slopes[1, "nonlinearity_ratio"],
            all(abs(slopes[2, field]) < 0.04 for field in FIELDS),
        ),
        figure=_draw(printed, trained, sizes),
    )


def _parameters(name: str) -> float:
    return float(sum(each.numel() for each in MODELS[name]().parameters()))


def _slope(points: list[tuple[float, float]]) -> float:
    """Return the slope of the least squares line over log10 of the parameters."""
    x, y = np.array(points).T
    return float(np.polyfit(np.log10(x), y, 1)[0])


def _draw(*series: dict[str, list[tuple[float, float]]]) -> str:
    figure, both = canvas(8, 3.4, 2)
    styles = (
        ("s", GREY, "the paper, Tables 10 and 15"),
        ("o", BLUE, "pretrained, ours"),
        ("^", ORANGE, "untrained, ours"),
    )
    for axes, (field, label) in zip(both, FIELDS.items(), strict=True):
        for (marker, colour, name), points in zip(styles, series, strict=True):
            x, y = np.array(sorted(points[field])).T
            axes.semilogx(x, y, f"{marker}-", color=colour, label=name, linewidth=1)
        axes.set(xlabel="parameters", ylabel=label, ylim=(0, 1))
    legend(both[1])
    return save(figure, "figure_3")
