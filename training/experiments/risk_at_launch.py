"""``python -m training.experiments.risk_at_launch FOLDER``: who diverges, told before the first step (Table 2).

The risk model is fitted to the runs of the part ``tuning``, and judged on ``held_out``, beside the paper's predictors,
the simplest baselines, and itself without one group of features at a time. Prints Markdown; ``--plot`` draws the
reliability.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rksp_core.errors import ConfigError, RkspError
from rksp_core.launch import NAMES
from rksp_core.risk_fit import fit
from training.experiments.outcomes import LABELS, Label, outcome_of
from training.experiments.ranking import Estimate, auroc, calibration_error, estimate, reliability
from training.experiments.record import Record, read_records

GROUPS = {
    "the learning rate": ("log_learning_rate",),
    "the optimizer": ("lion", "sgd"),
    "depth and width": ("log_depth", "log_width"),
    "the look-ahead": ("loss_rise", "gradient_rise", "hidden_rise"),
}
SPIKE = 2.0  # a loss spike: a step whose loss is so many times the mean of the ten before


Score = Callable[[Record], float | None]


def _initial(name: str) -> Score:
    return lambda record: record["initial"]["features"].get(name)


def _early_norms(record: Record) -> np.ndarray:
    """Return the logarithms of the gradient norms of the first hundred steps, infinite where they were not finite."""
    norms = record["steps"]["gradient_norm"][:100]
    return np.log([math.inf if norm is None else max(norm, 1e-30) for norm in norms])


def _variance(record: Record) -> float | None:
    norms = _early_norms(record)
    return float(np.var(norms)) if np.isfinite(norms).all() else None


def _spikes(record: Record) -> float:
    losses = [math.inf if loss is None else loss for loss in record["steps"]["loss"][:500]]
    means = [np.mean(losses[step - 10 : step]) for step in range(10, len(losses))]
    return float(sum(loss > SPIKE * mean for loss, mean in zip(losses[10:], means, strict=True)))


def _rate(record: Record) -> float:
    return float(record["configuration"]["optimizer.learning_rate"])


# Of Table 2, and the simplest there are; larger is said to be riskier. The last four see the run itself.
BASELINES: dict[str, Score] = {
    "near-unit mass": _initial("near_unit_mass_mean"),
    "spectral radius, largest": _initial("spectral_radius_max"),
    "Kreiss constant, largest": _initial("log_kreiss_max"),
    "log learning rate": lambda record: math.log(_rate(record)),
    "learning rate x depth": lambda record: _rate(record) * record["configuration"]["model.arguments.depth"],
    "has no norm": lambda record: float(record["configuration"]["model.arguments.norm"] == "no_norm"),
    "gradient norm at step 1": lambda record: _early_norms(record)[0],
    "gradient norm at step 100, or the last": lambda record: _early_norms(record)[-1],
    "variance of log gradient norm, steps 1-100": _variance,
    "loss spikes, steps 1-500": _spikes,
}


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments.risk_at_launch")
    parser.add_argument("records", type=Path, metavar="FOLDER", help="of a sweep, or its records.jsonl.gz")
    parser.add_argument("--label", choices=LABELS, default="diverged")
    parser.add_argument("--on", default="held_out", metavar="PART", help="the part that is reported (held_out)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    try:
        records = list(read_records(arguments.records))
        tuning, reported = ([r for r in records if r["part"] == part] for part in ("tuning", arguments.on))
        if not reported:
            raise ConfigError(f"{arguments.records} holds no runs of the part {arguments.on!r}")
        print(report(tuning, reported, arguments.label, arguments.plot))
    except RkspError as error:
        print(f"risk_at_launch: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def report(tuning: Sequence[Record], reported: Sequence[Record], label: Label, plot: Path | None = None) -> str:
    """Return the tables as Markdown."""
    bad = np.array([outcome_of(record, label=label).diverged for record in reported])
    scores = {**predictions(tuning, reported, label), **{name: _column(reported, of) for name, of in BASELINES.items()}}
    norms = [record["configuration"]["model.arguments.norm"] for record in reported]
    matched = [
        (norm, record["configuration"]["model.arguments.depth"]) for norm, record in zip(norms, reported, strict=True)
    ]
    known = np.isfinite(scores["risk model"])
    said = f"{len(reported)} runs, {int(bad.sum())} {label}; the model was fitted to {len(tuning)} others"
    lines = [
        f"{said}. AUROC with 95 % bootstrap intervals.",
        "",
        "| score | all | within norms | within norm and depth |",
        "|---|---|---|---|",
    ]
    for name, score in scores.items():
        row = [_auroc(score, bad, groups) for groups in (None, norms, matched)]
        lines.append(f"| {name} | {' | '.join(map(str, row))} |")
    within = {norm: np.array([each == norm for each in norms]) for norm in sorted(set(norms))}
    lines += ["", "| norm | runs | bad | risk model | learning rate |", "|---|---|---|---|---|"]
    for norm, members in within.items():
        found = [_auroc(scores[name][members], bad[members], None) for name in ("risk model", "log learning rate")]
        lines.append(f"| {norm} | {members.sum()} | {bad[members].sum()} | {found[0]} | {found[1]} |")
    probabilities, outcomes = scores["risk model"][known], bad[known]
    error = estimate(lambda chosen: calibration_error(probabilities[chosen], outcomes[chosen]), len(outcomes))
    unknown = f"{int((~known).sum())} of {len(bad)} runs are unlike those that were fitted and get no probability"
    lines += ["", f"Calibration error (debiased, root mean square): {error}; {unknown}."]
    if plot is not None:
        draw(probabilities, outcomes, plot)
    return "\n".join(lines)


def predictions(tuning: Sequence[Record], reported: Sequence[Record], label: Label) -> dict[str, np.ndarray]:
    """Return the model's probability for each run, NaN where it gives none, and its log-odds without each group."""
    outcomes = [outcome_of(record, label=label) for record in tuning]
    launches = [outcome_of(record, label=label).launch for record in reported]
    model = fit(outcomes)
    risks = [model.risk(launch).probability for launch in launches]
    found = {"risk model": np.array([math.nan if risk is None else risk for risk in risks])}
    x = np.array([[launch.features()[name] for name in NAMES] for launch in launches])
    for group, names in GROUPS.items():
        smaller = fit(outcomes, left_out=names)
        found[f"without {group}"] = smaller.weights[0, 0] + (x - smaller.mean) / smaller.scale @ smaller.weights[0, 1:]
    return found


def draw(probabilities: np.ndarray, bad: np.ndarray, path: Path) -> None:
    """Draw the reliability diagram."""
    from matplotlib.figure import Figure

    rows = reliability(probabilities, bad)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot([p for p, _, _ in rows], [f for _, f, _ in rows], "o-", color="#1f5fa8", clip_on=False)
    axes.set(xlabel="probability that was told", ylabel="share of runs that diverged", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{len(bad)} runs, {len(rows)} bins", fontsize=10)
    figure.savefig(path, dpi=150)


def _column(records: Sequence[Record], of: Callable[[Record], float | None]) -> np.ndarray:
    values = [of(record) for record in records]
    return np.array([math.inf if value is None else value for value in values])


def _auroc(scores: np.ndarray, bad: np.ndarray, groups: Sequence[object] | None) -> Estimate:
    known = np.flatnonzero(~np.isnan(scores))
    score, outcome = scores[known], bad[known]
    names = None if groups is None else [groups[place] for place in known]

    def of(chosen: np.ndarray) -> float:
        return auroc(score[chosen], outcome[chosen], None if names is None else [names[place] for place in chosen])

    return estimate(of, len(known))


if __name__ == "__main__":
    sys.exit(main())
