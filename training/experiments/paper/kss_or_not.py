"""What Tables 7, 8 and 9 share: runs with KSS beside runs without, on the same seeds and rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.experiments.intervals import Mean, Share, fisher, mean
from training.experiments.paper.runs import diverged
from training.experiments.paper.section import side
from training.experiments.record import Record


def at(records: list[Record], rate: float) -> list[Record]:
    """Return the runs of one learning rate."""
    return [record for record in records if record["configuration"]["optimizer.learning_rate"] == rate]


def perplexity(records: list[Record], rate: float) -> Mean:
    """Return the held-out perplexity of the runs of a rate."""
    losses = [record["final"]["loss"] for record in at(records, rate)]
    return mean([None if loss is None else math.exp(loss) for loss in losses])


def effect(pair: Sequence[Share | Mean], *, falls: bool) -> str:
    """Return whether the second of two figures is smaller (or larger), as in the paper."""
    without, with_kss = pair
    return side(-1.0 if falls else 1.0, 0.0, with_kss, without)


def against(none: list[Record], kss: list[Record], rate: float) -> str:
    """Return what the runs say about KSS: divergence over all of them, and the final loss at one rate, seed by seed."""
    shares = diverged(none), diverged(kss)
    return f"{_told(*shares)} {_paired(at(none, rate), at(kss, rate), rate)}"


def _told(none: Share, kss: Share) -> str:
    if not none.runs or not kss.runs:
        return "Too few runs are made to say anything about divergence."
    p = fisher(none, kss)
    verdict = "can be told from" if p < 0.05 else "cannot be told from"
    return f"{kss} diverged with KSS, which {verdict} {none} without (Fisher's exact test: p = {p:.2g})."


def _paired(none: list[Record], kss: list[Record], rate: float) -> str:
    """Return the paired difference of final losses with its t interval."""
    losses = [
        {(record["seed"], *_model(record)): record["final"]["loss"] for record in records if record["final"]["loss"]}
        for records in (none, kss)
    ]
    differences = [losses[1][key] - losses[0][key] for key in losses[0].keys() & losses[1].keys()]
    found = mean(sorted(differences), 3)
    if found.runs < 2:
        return "Too few runs are made to compare the losses."
    sure = ", which is within the noise" if found.low <= 0 <= found.high else ""
    return f"At the rate {rate:g} KSS changes the held-out loss by {found} pairs{sure}."


def _model(record: Record) -> tuple[object, ...]:
    return tuple(record["configuration"].get(f"model.arguments.{name}") for name in ("norm", "width"))
