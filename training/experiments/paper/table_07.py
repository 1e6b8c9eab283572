"""Table 7: KSS on the synthetic language.

The paper's model has 350 M parameters (``training/configs/paper_lm_350m.yaml`` is that run), ours 0.2 M: this says
nothing about size. The rates are the usual one, where perplexities are compared, and one at the edge of divergence.
"""

from __future__ import annotations

from training.experiments.paper.kss_or_not import against, effect, perplexity
from training.experiments.paper.runs import arms, diverged, progress
from training.experiments.paper.section import Section

TITLE = "KSS on the synthetic language"
CHEAP = True
SPECS = ("synthetic_lm",)
USUAL = 0.003
PUBLISHED = {"none": (6, 24, 52.1), "KSS 0.15": (3, 24, 46.8)}


def section() -> Section:
    """Return the table."""
    runs = arms(SPECS[0])
    none, kss = (runs.get(name, []) for name in PUBLISHED)
    shares = [diverged(each) for each in (none, kss)]
    usual = [perplexity(each, USUAL) for each in (none, kss)]
    return Section(
        name="table_07",
        title=TITLE,
        setting=(
            "Pre-LN, width 64, 4 blocks, vocabulary 256, length 64, batch 8, 800 steps (the paper: width 1024, 24 "
            "blocks, vocabulary 10 000, length 256); rates .003 and .4, three seeds each; "
            f"{progress(SPECS[0])}. Perplexity: held out, at .003."
        ),
        rows=(
            ("diverged, none -> KSS", "6 of 24 -> 3 of 24", f"{shares[0]} -> {shares[1]}", effect(shares, falls=True)),
            (
                "perplexity, none -> KSS",
                "52.1 -> 46.8",
                f"{usual[0]} -> {usual[1]}",
                effect(usual, falls=True),
            ),
        ),
        sentence=against(none, kss, USUAL),
    )
