"""Table 1: the norms at initialization, and what becomes of them.

The spectra are those of untrained models of the size that reproduces most of the paper's rows: width 256, 6 blocks, 4
heads, a layer is a whole block, associative recall of length 64 with uniform fillers, N = 2048; three seeds, and two
readings of what the paper leaves open:

    normal    every matrix and embedding N(0, .02^2), no division by sqrt(2L); eps relative
    literal   what each norm's own paper prescribes, else GPT-2's rule; eps = 1e-5 absolute, as in Eq. 9

What becomes of them was seen on smaller models and a task that they learn: ``specs/paper/norms_recall.yaml``.
"""

from __future__ import annotations

import torch

from rksp_core.capture import capture
from rksp_core.dmd import EpsMode, whitened_dmd
from rksp_core.spectrum import spectral_masses
from training.experiments.intervals import Mean, Share, fisher, mean
from training.experiments.paper.runs import accuracy, arms, diverged, progress
from training.experiments.paper.section import Section, said, side
from training.models.gpt import GPT
from training.tasks import PROBE
from training.tasks.associative_recall import AssociativeRecall

TITLE = "the norms at initialization, and what becomes of them"
CHEAP = True
SPECS = ("norms_recall",)

VOCABULARY, LENGTH, PAIRS, SEQUENCES = 256, 64, 4, 32
WIDTH, DEPTH, HEADS = 256, 6, 4
SEEDS = (31960, 31961, 31962)
READINGS: dict[str, tuple[str, EpsMode]] = {
    "normal": ("gpt2_unscaled", "relative"),
    "literal": ("published", "absolute"),
}

# Norm here: name in the spec; near-unit mass, expansive mass, rho, diverged %, runs, accuracy % of the paper.
PUBLISHED = {
    "pre_ln": ("Pre-LN", (0.16, 0.54, 2.29), 0.0, 25, "7.5"),
    "post_ln": ("Post-LN", (0.66, 0.31, 7.48), 0.0, 69, "1.4"),
    "rmsnorm": ("RMSNorm", (0.16, 0.54, 2.28), 0.0, 12, "13.1"),
    "deepnorm": ("DeepNorm", (0.00, 1.00, 3.94), 0.0, 12, "20.0"),
    "subln": ("SubLN", (0.13, 0.54, 2.23), 0.0, 12, "9.0"),
    "no_norm": ("No-Norm", (0.80, 0.19, 1.11), 96.4, 84, "54.2 (3 runs)"),
    "deepnorm_pre_ln": ("DeepNorm in the place of Pre-LN, no published form", (0.00, 1.00, 3.94), 0.0, 12, "20.0"),
}
REFERENCE = "pre_ln"
RATE, HIGHEST = "optimizer.learning_rate", 0.01
HEADER = (
    "norm",
    "near-unit, expansive mass, rho: the paper",
    "ours, normal",
    "ours, literal",
    "near-unit mass against Pre-LN, same sign (normal, literal)",
    "diverged, the paper",
    "diverged, ours",
    "same sign",
    "accuracy %, the paper",
    "accuracy %, ours",
)
Spectra = tuple[Mean, Mean, Mean]  # near-unit mass, expansive mass, rho: over layers, then over seeds


def section() -> Section:
    """Return the table."""
    spectra = {(norm, reading): spectra_of(norm, *READINGS[reading]) for norm in PUBLISHED for reading in READINGS}
    return Section(
        name="table_01",
        title=TITLE,
        setting=(
            "Spectra: untrained, width 256, 6 blocks, 4 heads, N = 2048 states of associative recall (length 64), mean "
            f"over layers, then over {len(SEEDS)} seeds; normal: every matrix N(0, .02^2); literal: each norm's own "
            "prescription, eps absolute. Runs: width 64, 4 blocks, recall that is learned, rates .001, .003, .01, two "
            f"seeds each, horizon 800; {progress(SPECS[0])}."
        ),
        header=HEADER,
        rows=tuple(_row(norm, spectra) for norm in PUBLISHED),
        sentence=_sentence(spectra),
    )


def spectra_of(norm: str, initialization: str, eps_mode: EpsMode) -> Spectra:
    """Return near-unit mass, expansive mass and rho of untrained models."""
    found = [_layers(norm, initialization, eps_mode, seed) for seed in SEEDS]
    return tuple(mean([float(each[place]) for each in found]) for place in range(3))  # type: ignore[return-value]


def _layers(norm: str, initialization: str, eps_mode: EpsMode, seed: int) -> tuple[float, ...]:
    """Return the means over the layers for one model and one probe, both functions of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(VOCABULARY, LENGTH, WIDTH, DEPTH, HEADS, norm, initialization)
    probe = AssociativeRecall(VOCABULARY, LENGTH, PAIRS, seed).batch(PROBE, 0, SEQUENCES).inputs
    layers = []
    for _, moments in capture(model, probe):
        eigenvalues = torch.linalg.eigvals(whitened_dmd(moments, eps_mode=eps_mode).matrix)
        masses = spectral_masses(eigenvalues)
        layers.append((masses["near_unit_mass"], masses["expansive_mass"], float(eigenvalues.abs().max())))
    return tuple(float(values.mean()) for values in torch.tensor(layers, dtype=torch.float64).T)


def _row(norm: str, spectra: dict[tuple[str, str], Spectra]) -> tuple[str, ...]:
    name, published, paper_diverged, paper_runs, paper_accuracy = PUBLISHED[norm]
    runs = arms(SPECS[0])
    records, reference = runs.get(name, []), diverged(runs.get(PUBLISHED[REFERENCE][0], []))
    share = diverged(records)
    signs = [
        side(published[0], PUBLISHED[REFERENCE][1][0], *(spectra[each, r][0] for each in (norm, REFERENCE)))
        for r in READINGS
    ]
    return (
        name,
        " / ".join(f"{value:.2f}" for value in published),
        *(" / ".join(f"{each.value:.2f}" for each in spectra[norm, reading]) for reading in READINGS),
        ", ".join(signs),
        f"{paper_diverged} % of {paper_runs}",
        str(share),
        side(paper_diverged, PUBLISHED[REFERENCE][2], share, reference),
        paper_accuracy,
        str(accuracy(records)),
    )


def _sentence(spectra: dict[tuple[str, str], Spectra]) -> str:
    runs = arms(SPECS[0])
    bare = diverged(runs.get("No-Norm", []))
    others = diverged([record for name, records in runs.items() if name != "No-Norm" for record in records])
    hot = [each for records in runs.values() for each in records if each["configuration"][RATE] == HIGHEST]
    learned = Share(sum(record["learned"] for record in hot), len(hot))
    told = said(
        "Read so that every matrix starts alike, both masses come out within .03 of the paper's for Pre-LN, Post-LN, "
        "RMSNorm, SubLN and No-Norm (SubLN's rho does not), and DeepNorm's row only for a form that nobody published; "
        "read literally, No-Norm's near-unit mass is 1.00 and Post-LN's .83, so the table is as much about the "
        "initialization as about the norms.",
        all(_close(norm, spectra) for norm in PUBLISHED if norm != "deepnorm"),
        not _close("deepnorm", spectra),
        spectra["subln", "normal"][2].low > PUBLISHED["subln"][1][2] + 1,
        f"{spectra['no_norm', 'literal'][0].value:.2f} {spectra['post_ln', 'literal'][0].value:.2f}" == "1.00 0.83",
    )
    p = fisher(bare, others)
    return (
        f"{told} Without a norm {bare} diverged, with one {others} (Fisher's exact test: p = {p:.2g}). Not to diverge "
        f"is not to train: at the rate {HIGHEST}, with a norm or without, {learned} learned the task."
    )


def _close(norm: str, spectra: dict[tuple[str, str], Spectra]) -> bool:
    """Return whether both masses of the reading ``normal`` are the paper's within .03, about twice the seeds' noise."""
    found = spectra[norm, "normal"][:2]
    return all(abs(ours.value - paper) <= 0.03 for ours, paper in zip(found, PUBLISHED[norm][1][:2], strict=True))
