"""Figure 2: what the weight of KSS does, over the arms of Table 3."""

from __future__ import annotations

from collections.abc import Mapping

from training.experiments.intervals import Mean, Share
from training.experiments.paper import stabilizers
from training.experiments.paper.drawing import BLUE, GREY, ORANGE, canvas, legend, save
from training.experiments.paper.runs import accuracy, diverged, near_unit_mass
from training.experiments.paper.section import Section, side
from training.experiments.paper.table_03 import PUBLISHED

TITLE = "the weight of KSS"
CHEAP = True
SPECS = (stabilizers.SPEC,)

ARMS = {0.0: "none", 0.10: "KSS 0.10", 0.15: "KSS 0.15", 0.20: "KSS 0.20"}


def section() -> Section:
    """Draw the figure."""
    runs = stabilizers.found()
    shares = {alpha: diverged(runs.get(name, [])) for alpha, name in ARMS.items()}
    accuracies = {alpha: accuracy(runs.get(name, [])) for alpha, name in ARMS.items()}
    masses = {alpha: near_unit_mass(runs.get(name, [])) for alpha, name in ARMS.items()}
    return Section(
        name="figure_2",
        title=TITLE,
        setting=f"{stabilizers.setting()} The paper's points are those of its Table 3.",
        rows=(
            _row("diverged %, from none to alpha 0.20", [each.diverged for each in _published()], shares, 100),
            _row("accuracy %", [each.accuracy for each in _published()], accuracies),
            _row("near-unit mass", [each.near_unit_mass or 0 for each in _published()], masses),
        ),
        sentence=stabilizers.told_apart(dict.fromkeys(ARMS.values())),
        figure=_draw(shares, accuracies, masses),
    )


def _published() -> list[stabilizers.Published]:
    return [row for name in ARMS.values() if (row := PUBLISHED[name]) is not None]


def _row(name: str, theirs: list[float], ours: Mapping[float, Share | Mean], times: float = 1) -> tuple[str, ...]:
    digits = 2 if max(theirs) <= 1 else 1
    values = [times * ours[alpha].value for alpha in ARMS]
    shown = [" / ".join(f"{value:.{digits}f}" for value in each) for each in (theirs, values)]
    first, *_, last = ARMS
    return name, *shown, side(theirs[-1], theirs[0], ours[last], ours[first])


def _draw(shares: dict[float, Share], accuracies: dict[float, Mean], masses: dict[float, Mean]) -> str:
    figure, (left, right) = canvas(8, 3.4, 2)
    alphas, theirs = list(ARMS), _published()
    left.plot(alphas, [each.diverged for each in theirs], "s--", color=GREY, label="the paper, 24 runs each")
    lows, highs = zip(*(share.interval() for share in shares.values()), strict=True)
    values = [share.value for share in shares.values()]
    bars = [
        [100 * (value - low) for value, low in zip(values, lows, strict=True)],
        [100 * (high - value) for value, high in zip(values, highs, strict=True)],
    ]
    left.errorbar(
        alphas, [100 * shares[alpha].value for alpha in ARMS], bars, fmt="o-", color=BLUE, capsize=3, label="ours"
    )
    left.set(xlabel="KSS weight alpha", ylabel="diverged, % of the runs", ylim=(-3, 103), xticks=alphas)
    legend(left)
    right.plot(alphas, [each.accuracy for each in theirs], "s--", color=BLUE, alpha=0.4, label="accuracy, the paper")
    right.plot(alphas, [accuracies[a].value for a in alphas], "o-", color=BLUE, label="accuracy, ours")
    right.set(xlabel="KSS weight alpha", ylim=(-3, 103), xticks=alphas)
    right.set_ylabel("accuracy, %", color=BLUE)
    other = right.twinx()
    other.plot(alphas, [each.near_unit_mass or 0 for each in theirs], "s--", color=ORANGE, alpha=0.4)
    other.plot(alphas, [masses[a].value for a in alphas], "o-", color=ORANGE)
    other.set_ylim(-0.03, 1.03)
    other.set_ylabel("near-unit mass", color=ORANGE, fontsize=9)
    other.tick_params(color=GREY, labelsize=8)
    other.spines[:].set_color(GREY)
    other.spines["top"].set_visible(False)
    right.set_title("solid: ours; dashed: the paper", fontsize=9)
    return save(figure, "figure_2")
