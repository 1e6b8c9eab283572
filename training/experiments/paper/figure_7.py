"""Figure 7: the paper's decision by near-unit mass, and what became of runs in each of its branches.

The runs are those of the part ``tuning`` of ``specs/risk.yaml``: a language that is learned, configurations over norm,
rate, depth, width, initialization and optimizer. Nothing of the paper's rule was chosen on them. Its other criterion,
the condition of the eigenvectors, has no threshold in the paper and is half noise; it is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.experiments.intervals import Share, fisher
from training.experiments.paper.contents import ROOT
from training.experiments.paper.drawing import BLUE, GREEN, GREY, ORANGE, RED, canvas, save
from training.experiments.paper.runs import diverged
from training.experiments.paper.section import Section, same
from training.experiments.record import PACKED, Record, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "the decision by near-unit mass"
CHEAP = True
SPECS = ()

RUNS = ROOT / "benchmarks" / "data" / "risk" / PACKED
SAFE, RISKY = 0.3, 0.5
NORMALIZED = ("pre_ln", "rmsnorm")


def section() -> Section:
    """Draw the figure."""
    records = [record for record in read_records(RUNS) if record["part"] == "tuning"]
    known = [record for record in records if "near_unit_mass_mean" in record["initial"].get("features", {})]
    branches = {
        f"near-unit mass below {SAFE}: proceed": [each for each in known if _mass(each) < SAFE],
        f"from {SAFE} to {RISKY}: by context": [each for each in known if SAFE <= _mass(each) <= RISKY],
        f"above {RISKY}: high risk": [each for each in known if _mass(each) > RISKY],
    }
    shares = {name: diverged(chosen) for name, chosen in branches.items()}
    proceed, _, risky = shares.values()
    skip = diverged([each for each in known if each["configuration"]["model.arguments.norm"] in NORMALIZED])
    others = diverged([each for each in known if each["configuration"]["model.arguments.norm"] not in NORMALIZED])
    p = fisher(proceed, risky)
    told = "tells the two apart" if p < 0.05 else "does not tell the two apart"
    return Section(
        name="figure_7",
        title=TITLE,
        setting=(
            f"The part tuning of specs/risk.yaml, of whose 644 runs the 43 that cost most are not made: {len(known)} "
            f"runs, of which {diverged(known).count} diverged, on a language that is learned, from rates that are safe "
            "to rates that are hopeless; the mass is that before the first step, its mean over the layers."
        ),
        header=("branch", "the paper", "diverged, ours", "same sign"),
        rows=(
            *(
                (name, verdict, str(share), sign)
                for (name, share), verdict, sign in zip(
                    shares.items(),
                    ("safe", "-", "likely to diverge"),
                    ("-", "-", same(None if p >= 0.05 else risky.value > proceed.value)),
                    strict=True,
                )
            ),
            ("Pre-LN and RMSNorm: skip KSS at usual rates", "safe", str(skip), "-"),
            (
                "other norms, and none",
                "use KSS",
                str(others),
                same(None if fisher(others, skip) >= 0.05 else others.value > skip.value),
            ),
        ),
        sentence=(
            f"Fisher's exact test of the branch above {RISKY} against that below {SAFE} {told} (p = {p:.2g}). The "
            "rates of the sweep were placed about the edge of each norm and optimizer, so that neither a norm nor "
            "its spectrum tells the outcome: what is asked is whether the rule ranks runs that one does not know "
            "already."
        ),
        figure=_draw(shares),
    )


def _mass(record: Record) -> float:
    return float(record["initial"]["features"]["near_unit_mass_mean"])


def _draw(shares: dict[str, Share]) -> str:
    figure, (axes,) = canvas(7.6, 3.4)
    axes.set_axis_off()
    axes.set(xlim=(0, 3), ylim=(-0.3, 3))
    _box(axes, 1.5, 2.6, "profile the model before the first step", BLUE)
    for place, ((name, share), colour) in enumerate(zip(shares.items(), (GREEN, ORANGE, RED), strict=True)):
        x = place + 0.5
        axes.annotate("", (x, 1.95), (1.5, 2.4), arrowprops={"arrowstyle": "->", "color": GREY})
        _box(axes, x, 1.7, name.replace(": ", ":\n"), colour)
        axes.annotate("", (x, 0.95), (x, 1.42), arrowprops={"arrowstyle": "->", "color": GREY})
        low, high = share.interval() if share.runs else (0.0, 1.0)
        counts = f"{share.count} of {share.runs} runs diverged"
        axes.text(x, 0.85, counts, ha="center", va="top", fontsize=9)
        axes.barh(0.35, 0.8 * share.value, 0.16, left=x - 0.4, color=colour)
        axes.barh(0.35, 0.8, 0.16, left=x - 0.4, fill=False, edgecolor=GREY, linewidth=0.8)
        axes.plot([x - 0.4 + 0.8 * low, x - 0.4 + 0.8 * high], [0.2, 0.2], color="0.3", linewidth=1.5)
        axes.text(x, 0.12, f"{100 * low:.0f} to {100 * high:.0f} %", ha="center", va="top", fontsize=8, color="0.3")
    axes.text(0.1, -0.22, "bar: share of the runs; line: its 95 % interval", fontsize=8, color="0.3")
    return save(figure, "figure_7")


def _box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)
