"""Architectures as they start, at the paper's size (d = 256, L = 6): Tables 11 and 16 to 18, Figures 1, 3 and 6.

As in the paper, transformers are profiled on associative recall (length 64, vocabulary 256, 4 pairs) and the others on
the synthetic language (length 256, vocabulary 10 000). Every matrix starts as N(0, .02^2), the reading that reproduces
most of Table 1, but for Mamba's and for those of the splines, which start as in their own papers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from rksp_core import ModelProfile, profile_model
from training.experiments.intervals import Mean, Share, fisher, mean
from training.experiments.paper.runs import accuracy, arms, diverged, near_unit_mass, progress
from training.experiments.paper.section import same, side
from training.experiments.record import Record
from training.models.gpt import GPT
from training.models.kan import KAN
from training.models.mamba import Mamba
from training.models.moe import MoE
from training.tasks import PROBE, Task
from training.tasks.associative_recall import AssociativeRecall
from training.tasks.synthetic_lm import SyntheticLM

SEEDS = (32100, 32101, 32102)  # of weights and probe
STATES = 2048
RECALL, LANGUAGE = (256, 64), (10_000, 256)  # vocabulary, length
START = "gpt2_unscaled"


def _gpt(norm: str, width: int = 256, depth: int = 6, about: tuple[int, int] = RECALL) -> Callable[[], nn.Module]:
    return lambda: GPT(*about, width=width, depth=depth, norm=norm, initialization=START)


def _moe(experts: int, top_k: int) -> Callable[[], nn.Module]:
    return lambda: MoE(*LANGUAGE, width=256, depth=6, experts=experts, top_k=top_k, initialization=START)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Pre-LN": _gpt("pre_ln"),
    "No-Norm": _gpt("no_norm"),
    "8 experts, top-1": _moe(8, 1),
    "8 experts, top-2": _moe(8, 2),
    "8 experts, top-4": _moe(8, 4),
    "16 experts, top-2": _moe(16, 2),
    "Mamba, narrow": lambda: Mamba(*LANGUAGE, width=256, depth=6),
    "Mamba, twice as wide": lambda: Mamba(*LANGUAGE, width=512, depth=6),
    "Pre-LN on the language": _gpt("pre_ln", about=LANGUAGE),
    "B = 4": lambda: KAN(*LANGUAGE, width=256, depth=6, basis=4, initialization=START),
    "B = 8": lambda: KAN(*LANGUAGE, width=256, depth=6, basis=8, initialization=START),
    "Pre-LN, d = 64, L = 4": _gpt("pre_ln", 64, 4),
    "Pre-LN, d = 128, L = 6": _gpt("pre_ln", 128, 6),
    "Pre-LN, d = 512, L = 8": _gpt("pre_ln", 512, 8),
}


class Published(NamedTuple):
    """A row of Tables 16 to 18: near-unit mass, rho and a third figure; diverged of 24; accuracy in percent."""

    near_unit_mass: float
    spectral_radius: float
    third: float
    diverged: int
    accuracy: float | None = None


@functools.cache
def untrained(name: str, seeds: tuple[int, ...] = SEEDS) -> tuple[ModelProfile, ...]:
    """Return the profiles of an untrained model, one a seed, on 2048 token states."""
    return tuple(_profile(MODELS[name], seed) for seed in seeds)


def over_seeds(name: str, field: str, digits: int = 2) -> Mean:
    """Return the mean over layers of a field of the profile, over the seeds."""
    return mean([profile.summary[field]["mean"] for profile in untrained(name)], digits)


def header(third: str, reference: str) -> tuple[str, ...]:
    """Return the columns of Tables 16 to 18."""
    return (
        "model",
        f"near-unit mass, rho, {third}: the paper",
        "ours, untrained",
        f"near-unit mass against {reference}, same sign",
        "diverged, the paper",
        "diverged, ours",
        f"against {reference}, same sign",
        "accuracy %, the paper",
        "accuracy %, ours",
        "near-unit mass after training, ours",
    )


def setting(spec: str) -> str:
    """Return the scale of Tables 16 to 18."""
    return (
        f"Spectra: untrained, width 256 (twice as wide: 512), 6 blocks, N = {STATES}, mean over layers, then over "
        f"{len(SEEDS)} seeds. Runs: width 32 (64), 4 blocks, the synthetic language with 64 tokens and length 64, "
        f"rates .003, .25 and .5, two seeds each, horizon 400; {progress(spec)}. Accuracy: held out, of a diverged run "
        "that of its last finite state."
    )


def rows(spec: str, published: Mapping[str, Published], third: str, reference: str) -> tuple[tuple[str, ...], ...]:
    """Return a row for each model; one with KSS starts as the one without.

    Parameters
    ----------
    third
        Field of the profile that stands beside near-unit mass and rho.
    reference
        The model that the others are compared with.
    """
    runs = arms(spec)
    return tuple(_row(name, published, third, reference, runs) for name in published)


def told_apart(spec: str, names: Mapping[str, object], reference: str) -> str:
    """Return which models diverged more or less often than the reference, as far as Fisher's test can tell."""
    shares = {name: diverged(records) for name, records in arms(spec).items() if name in names}
    base = shares.pop(reference, Share(0, 0))
    apart = [f"{name} ({share})" for name, share in shares.items() if fisher(share, base) < 0.05]
    return (
        f"Against {base} of {reference}, Fisher's exact test (p < 0.05, {len(shares)} comparisons, not corrected) "
        f"tells apart: {', '.join(apart) or 'none'}."
    )


def _row(
    name: str, published: Mapping[str, Published], third: str, reference: str, runs: Mapping[str, list[Record]]
) -> tuple[str, ...]:
    theirs, their_reference = published[name], published[reference]
    records, base = runs.get(name, []), diverged(runs.get(reference, []))
    share, ours, agree = diverged(records), "as without KSS", same(None)
    if name in MODELS:
        mass = over_seeds(name, "near_unit_mass")
        ours = f"{mass}; {over_seeds(name, 'spectral_radius')}; {over_seeds(name, third)}"
        agree = side(theirs[0], their_reference[0], mass, over_seeds(reference, "near_unit_mass"))
    return (
        name,
        f"{theirs.near_unit_mass:.2f}; {theirs.spectral_radius:.2f}; {theirs.third:.2f}",
        ours,
        agree,
        f"{theirs.diverged} of 24",
        str(share),
        side(theirs.diverged, their_reference.diverged, share, base),
        "-" if theirs.accuracy is None else str(theirs.accuracy),
        str(accuracy(records)),
        str(near_unit_mass(records)),
    )


def _profile(make: Callable[[], nn.Module], seed: int) -> ModelProfile:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    vocabulary, length = model.vocabulary, model.length
    task: Task
    if (vocabulary, length) == RECALL:
        task = AssociativeRecall(vocabulary, length, 4, seed)
    else:
        task = SyntheticLM(vocabulary, length, 20_000, 2_000, seed)
    return profile_model(model, task.batch(PROBE, 0, STATES // length).inputs, samples=STATES)
