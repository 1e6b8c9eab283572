"""``python -m training.experiments.risk_at_launch FOLDER``: who diverges, told before the first step (Table 2).

The risk model is fitted to the runs of the part ``tuning``, and judged on ``held_out``, beside the paper's predictors,
the simplest baselines, and itself without one group of features or with one more. ``--other`` judges it on the records
of another sweep instead. Prints Markdown; ``--plot`` draws the reliability.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rksp_core.errors import ConfigError
from rksp_core.launch import NAMES
from rksp_core.risk_fit import best_ridge, fit, fit_weights
from training.command import ANEW, carried_out
from training.experiments import eigenvector_condition
from training.experiments.intervals import Share
from training.experiments.outcomes import LABELS, STEPS, Label, outcome_of
from training.experiments.ranking import (
    Estimate,
    auroc,
    calibration_by_chance,
    calibration_error,
    estimate,
    expected_calibration_error,
    numbered,
    reliability,
)
from training.experiments.record import Record, read_records

GROUPS = {
    "the learning rate": ("log_learning_rate",),
    "the optimizer": ("lion", "sgd", "lion_without_norm", "sgd_without_norm"),
    "the clipping": ("unclipped",),
    "whether there is a norm": ("without_norm", "lion_without_norm", "sgd_without_norm"),
    "depth and width": ("log_depth", "log_width"),
    "the look-ahead": ("loss_rise", "gradient_rise", "hidden_rise"),
}
SPECTRAL = (
    "near_unit_mass_mean",
    "near_unit_mass_min",
    "expansive_mass_mean",
    "spectral_radius_max",
    "log_sigma_max",
    "log_henrici_max",
    "log_kreiss_max",
    "log_growth_max",
)
SPIKE = 2.0  # a loss spike: a step whose loss is so many times the mean of the ten before

MODEL = "risk model"
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


def _kappa(record: Record) -> float | None:
    return record["initial"].get(
        "eigenvector_condition", math.nan
    )  # put there by `read_runs`, where it was made up for


def _mass_times_kappa(record: Record) -> float | None:
    mass, kappa = _initial("near_unit_mass_mean")(record), _kappa(record)
    return None if mass is None or kappa is None else mass * math.log10(kappa)


# Of Table 2, and the simplest there are; larger is said to be riskier. The last four see the run itself.
BASELINES: dict[str, Score] = {
    "near-unit mass": _initial("near_unit_mass_mean"),
    "near-unit mass x log10 eigenvector condition": _mass_times_kappa,
    "eigenvector condition": _kappa,
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
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="report on all runs of another sweep instead")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    return carried_out("risk_at_launch", lambda: _work(arguments), ANEW)


def _work(arguments: argparse.Namespace) -> None:
    records = read_runs(arguments.records)
    tuning = [record for record in records if record["part"] == "tuning"]
    if arguments.other is not None:
        reported = read_runs(arguments.other)
    else:
        reported = [record for record in records if record["part"] == arguments.on]
    if not reported:
        raise ConfigError(f"{arguments.records} holds no runs of the part {arguments.on!r}")
    print(report(tuning, reported, arguments.label, arguments.plot))


def read_runs(path: Path) -> list[Record]:
    """Return the records, with the eigenvector condition where there is one."""
    records = list(read_records(path))
    known = eigenvector_condition.read((path if path.is_dir() else path.parent) / eigenvector_condition.FILE)
    for record in records:
        if record["key"] in known:
            record["initial"]["eigenvector_condition"] = known[record["key"]]
    return records


def report(tuning: Sequence[Record], reported: Sequence[Record], label: Label, plot: Path | None = None) -> str:
    """Return the tables as Markdown."""
    bad = np.array([outcome_of(record, label=label).diverged for record in reported])
    scores = {**predictions(tuning, reported, label), **{name: column(reported, of) for name, of in BASELINES.items()}}
    norms = np.array([record["configuration"]["model.arguments.norm"] for record in reported])
    depths = [record["configuration"]["model.arguments.depth"] for record in reported]
    groupings = None, numbered(norms), numbered(list(zip(norms, depths, strict=True)))
    said = f"{len(reported)} runs, {int(bad.sum())} {label}; the model was fitted to {len(tuning)} others"
    lines = [
        f"{said}. AUROC with 95 % bootstrap intervals; the lead is that of the risk model, on the same resamples.",
        "",
        "| score | all | within norms | within norm and depth | lead, all | lead, within norms |",
        "|---|---|---|---|---|---|",
    ]
    for name, score in scores.items():
        row = [ranked(score, bad, groups) for groups in groupings]
        leads = [_lead(scores[MODEL], score, bad, groups) for groups in groupings[:2]] if name != MODEL else ["", ""]
        lines.append(f"| {name} | {' | '.join(map(str, [*row, *leads]))} |")
    within = {norm: norms == norm for norm in sorted(set(norms))}
    lines += ["", "| norm | runs | bad | risk model | learning rate |", "|---|---|---|---|---|"]
    for norm, members in within.items():
        found = [ranked(scores[name][members], bad[members]) for name in (MODEL, "log learning rate")]
        lines.append(f"| {norm} | {members.sum()} | {bad[members].sum()} | {found[0]} | {found[1]} |")
    known = np.isfinite(scores[MODEL])
    probabilities, outcomes = scores[MODEL][known], bad[known]
    lines += ["", *_calibration(probabilities, outcomes, int((~known).sum()), len(bad))]
    if plot is not None:
        draw(probabilities, outcomes, plot)
    return "\n".join(lines)


def _calibration(probabilities: np.ndarray, bad: np.ndarray, unknown: int, runs: int) -> list[str]:
    lines = [f"{unknown} of {runs} runs are unlike those that were fitted and get no probability."]
    if not len(bad):
        return lines
    plain, chance = expected_calibration_error(probabilities, bad), calibration_by_chance(probabilities)
    debiased = estimate(lambda chosen: calibration_error(probabilities[chosen], bad[chosen]), len(bad))
    said = (
        f"Calibration error: expected {plain:.3f}, where perfect probabilities would show {chance} on so few runs; "
        f"debiased, root mean square {debiased}."
    )
    lines += ["", said, "", "| told | happened | runs |", "|---|---|---|"]
    return lines + [f"| {told:.3f} | {share:.3f} | {count} |" for told, share, count in reliability(probabilities, bad)]


def predictions(tuning: Sequence[Record], reported: Sequence[Record], label: Label) -> dict[str, np.ndarray]:
    """Return the model's probability for each run, NaN where it gives none, and the log-odds of its variants.

    A variant has one group of features less, or the spectra beside them; those of the latter have no sign to keep.
    """
    outcomes = [outcome_of(record, label=label) for record in tuning]
    launches = [outcome_of(record, label=label).launch for record in reported]
    model = fit(outcomes)
    risks = [model.risk(launch).probability for launch in launches]
    found = {MODEL: np.array([math.nan if risk is None else risk for risk in risks])}
    x = np.array([[launch.features()[name] for name in NAMES] for launch in launches])
    for group, names in GROUPS.items():
        smaller = fit(outcomes, left_out=names)
        found[f"without {group}"] = smaller.weights[0, 0] + (x - smaller.mean) / smaller.scale @ smaller.weights[0, 1:]
    fitted = np.array([[outcome.launch.features()[name] for name in NAMES] for outcome in outcomes])
    y = np.array([outcome.diverged for outcome in outcomes], dtype=float)
    for title, spectra in SPECTRA.items():
        with_spectra = [np.column_stack([a, spectra(b)]) for a, b in ((fitted, tuning), (x, reported))]
        found[f"with {title}"] = _log_odds(with_spectra[0], y, with_spectra[1])
    found["the spectra at the start alone"] = _log_odds(_at_start(tuning), y, _at_start(reported))
    return found


def _log_odds(fitted: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the log-odds of the rows of ``x`` by a regression on ``fitted``; an unknown feature counts as the mean."""
    known = np.ma.masked_invalid(fitted)
    mean, scale = known.mean(axis=0).filled(0), known.std(axis=0).filled(0) + 1e-9
    standard, other = (np.nan_to_num((each - mean) / scale) for each in (fitted, x))
    free = [(None, None)] * fitted.shape[1]
    ridge, _ = best_ridge(standard, y, free, np.random.default_rng(0))
    w = fit_weights(standard, y, ridge, free)
    return w[0] + other @ w[1:]


def _spectra(features: Sequence[dict[str, float | None]]) -> np.ndarray:
    """(n, number of `SPECTRAL`); NaN where a feature is not known."""
    return np.array(
        [[math.nan if (value := each.get(name)) is None else value for name in SPECTRAL] for each in features]
    )


def _at_start(records: Sequence[Record]) -> np.ndarray:
    return _spectra([record["initial"].get("features", {}) for record in records])


def _after_look_ahead(records: Sequence[Record]) -> np.ndarray:
    taken = [next(each for each in record["look_ahead"] if each["steps"] == STEPS) for record in records]
    return _spectra([each.get("features", {}) for each in taken])


SPECTRA = {"the spectra at the start": _at_start, "the spectra after the look-ahead": _after_look_ahead}


def draw(probabilities: np.ndarray, bad: np.ndarray, path: Path) -> None:
    """Draw the reliability diagram."""
    from matplotlib.figure import Figure

    rows = reliability(probabilities, bad)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    happened = np.array([share for _, share, _ in rows])
    bounds = np.array([Share(round(share * count), count).interval() for _, share, count in rows])
    bars = np.abs(bounds.T - happened)
    axes.errorbar([told for told, _, _ in rows], happened, bars, fmt="o", color="#1f5fa8", capsize=3, clip_on=False)
    axes.set(xlabel="probability that was told", ylabel="share of runs that diverged", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{len(bad)} runs in {len(rows)} bins, 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=150)


def column(records: Sequence[Record], of: Score) -> np.ndarray:
    """Return one score a run: not finite is the riskiest, NaN was not measured."""
    values = [of(record) for record in records]
    return np.array([math.inf if value is None else value for value in values])


def ranked(scores: np.ndarray, bad: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
    """Return the AUROC over the runs that have a score; `Estimate.runs` says how many they are."""
    known = np.flatnonzero(~np.isnan(scores))
    return estimate(lambda chosen: _auroc_of(scores, bad, groups, known[chosen]), len(known))


def _lead(model: np.ndarray, scores: np.ndarray, bad: np.ndarray, groups: np.ndarray | None) -> Estimate:
    known = np.flatnonzero(~np.isnan(scores) & ~np.isnan(model))

    def of(chosen: np.ndarray) -> float:
        return _auroc_of(model, bad, groups, known[chosen]) - _auroc_of(scores, bad, groups, known[chosen])

    return estimate(of, len(known))


def _auroc_of(scores: np.ndarray, bad: np.ndarray, groups: np.ndarray | None, chosen: np.ndarray) -> float:
    return auroc(scores[chosen], bad[chosen], None if groups is None else groups[chosen])


if __name__ == "__main__":
    sys.exit(main())
