"""Table 8: KSS in Pre-LN language models of three sizes on a real text.

Bytes of the King James Bible in the place of the tokens of WikiText-103 and OpenWebText, 0.07 M to 0.5 M parameters in
the place of 25 M to 125 M. The largest rate is the largest of three of which no run diverged.
"""

from __future__ import annotations

from training.experiments.paper.kss_or_not import against, effect, perplexity
from training.experiments.paper.runs import arms, diverged, progress
from training.experiments.paper.section import Section
from training.experiments.paper.table_05 import largest

TITLE = "KSS at three sizes on a real text"
CHEAP = True
SPECS = ("text_widths",)
USUAL = 0.004
HEADER = (
    "size",
    "diverged, perplexity, largest rate: the paper, none -> KSS",
    "diverged: ours, none -> KSS",
    "same sign",
    "perplexity a byte: ours, none -> KSS",
    "same sign",
    "largest rate: ours, none -> KSS",
)
PUBLISHED = {
    "32": ("25M", "2 of 24, 58.4, 3e-4 -> 0 of 24, 52.1, 5e-4"),
    "64": ("85M", "4 of 24, 42.3, 2e-4 -> 1 of 24, 38.5, 4e-4"),
    "96": ("125M", "5 of 24, 48.7, 1.5e-4 -> 2 of 24, 43.2, 3e-4"),
}


def section() -> Section:
    """Return the table."""
    runs = arms(SPECS[0])
    none = [record for width in PUBLISHED for record in runs.get(width, [])]
    kss = [record for width in PUBLISHED for record in runs.get(f"{width} + KSS", [])]
    return Section(
        name="table_08",
        title=TITLE,
        setting=(
            "Pre-LN, widths 32, 64, 96, 4 blocks, bytes of the King James Bible, length 64, batch 8, 800 steps; rates "
            f".004, .25, .5, two seeds each; {progress(SPECS[0])}. Perplexity: held out, a byte, at .004."
        ),
        header=HEADER,
        rows=tuple(_row(width) for width in PUBLISHED),
        sentence=against(none, kss, USUAL),
    )


def _row(width: str) -> tuple[str, ...]:
    runs = arms(SPECS[0])
    pair = [runs.get(width, []), runs.get(f"{width} + KSS", [])]
    shares, perplexities = [diverged(each) for each in pair], [perplexity(each, USUAL) for each in pair]
    return (
        f"width {width} (the paper: {PUBLISHED[width][0]})",
        PUBLISHED[width][1],
        " -> ".join(map(str, shares)),
        effect(shares, falls=True),
        " -> ".join(map(str, perplexities)),
        effect(perplexities, falls=True),
        " -> ".join("none" if rate is None else f"{rate:g}" for rate in map(largest, pair)),
    )
