"""Is there more in a figure than its distance from a trailing average? Sequential tests on the best ones.

    absolute, baseline, trailing, sigmas     as `series` has them; ``trailing`` is the EWMA chart (Roberts 1959)
    trailing, 2 (3) in a row                 the smallest of so many events, all of them armed, as in a rule
    CUSUM                                    S <- max(0, S + z - 1/2), z the sigmas, within +-`CLIPPED` (Page 1954)
    change point                             probability that the last `RECENT` events began a new regime, when the
                                             figure has risen (Adams & MacKay 2007, by the package changepoint)

Each is one number an event, so that one threshold makes an alarm of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import changepoint
import numpy as np

from training.experiments.early_warning.choose import ARMED, LEAD, Cases, Table, left_out
from training.experiments.early_warning.series import FORMS, PLACES, Series

FIGURES = {  # figure: whether it falls
    "log_weight_norm_head": False,
    "log_weight_norm_max": False,
    "log_update_ratio_median": False,
    "log_attention_logit_max": False,
    "loss": False,
    "log_gradient_norm_worst": False,
    "log_growth_max": False,
    "log_kreiss_max": False,
    "near_unit_mass_min": True,
    "log_sharpness": False,
}
CLIPPED = 10.0
RECENT = 2
RUN_LENGTH = 50.0  # events that a regime lasts, on average
TESTS = {  # test: the statistic, and at how many events in a row it counts
    **{form: (form, 1) for form in FORMS},
    "trailing, 2 in a row": ("trailing", 2),
    "trailing, 3 in a row": ("trailing", 3),
    "CUSUM": ("CUSUM", 1),
    "change point": ("change point", 1),
}


def table(cases: Cases, price: float) -> str:
    """Return, as Markdown, what each test of each figure catches and alarms on runs that it was not chosen on."""
    lines = []
    for figure, falls in FIGURES.items():
        rows = [[statistics(run, figure, falls=falls) for run in runs] for runs in cases.runs.values()]
        cells = []
        for name, count in TESTS.values():
            caught = np.array(
                [
                    [
                        [peak(found[name], run, interval, armed, count) for run, found in zip(runs, row, strict=True)]
                        for armed in ARMED
                    ]
                    for (interval, runs), row in zip(cases.runs.items(), rows, strict=True)
                ]
            )
            measured = Table.from_peaks(cases, (), caught)
            verdict = left_out(measured, np.arange(len(ARMED)), price, most=1)
            counts = "/".join(str(int(each)) for each in verdict.caught.sum(axis=1)[:2])
            cells.append(f"{counts}, {int(verdict.false.any(axis=0).sum())}")
        lines.append(f"| {figure}{' falls' if falls else ''} | {' | '.join(cells)} |")
    head = [f"| figure | {' | '.join(TESTS)} |", "|---" * (len(TESTS) + 1) + "|"]
    return "\n".join([*head, *lines])


def statistics(run: Series, figure: str, *, falls: bool = False) -> Mapping[str, np.ndarray]:
    """Return the statistics of a figure that `TESTS` names, (E,), larger is worse, -inf where it is not known."""
    sign = -1.0 if falls else 1.0
    found = {form: sign * run.forms[form][:, PLACES[figure]] for form in FORMS}
    found["CUSUM"] = cusum(found["sigmas"])
    found["change point"] = np.where(found["trailing"] > 0, change_points(found["absolute"]), -np.inf)
    return {name: np.where(np.isfinite(values), values, -np.inf) for name, values in found.items()}


def cusum(sigmas: np.ndarray) -> np.ndarray:
    """Return the one-sided cumulative sum; what is not known adds nothing."""
    total, found = 0.0, np.zeros(len(sigmas))
    for event, value in enumerate(sigmas):
        if np.isfinite(value):
            total = max(0.0, total + float(np.clip(value, -CLIPPED, CLIPPED)) - 0.5)
        found[event] = total
    return found


def change_points(values: np.ndarray) -> np.ndarray:
    """Return the probability that one of the last `RECENT` events began a new regime; NaN until three times as many.

    Values are divided by the typical step of the first events, which the prior is about.
    """
    found = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    first = 3 * RECENT
    if len(known) <= first:
        return found
    start = values[known[:first]]
    scale = float(np.median(np.abs(np.diff(start)))) or 1.0
    process = changepoint.Bocpd(prior=changepoint.NormalGamma(0.0, 1.0, 1.0, 1.0), lam=RUN_LENGTH)
    for count, event in enumerate(known):
        lengths = np.asarray(process.step(float(np.clip((values[event] - start[0]) / scale, -1e6, 1e6))))
        if count >= first:
            found[event] = lengths[: RECENT + 1].sum()
    return found


def peak(values: np.ndarray, run: Series, interval: int, armed: int, in_a_row: int) -> float:
    """Return the largest value that the last ``in_a_row`` events all reach, from step ``armed`` to `LEAD` of the onset.

    A rule of `rksp_core.policy` with a threshold below it fires there, one with a threshold above it does not.
    """
    seen = np.where(run.steps >= armed, values, -np.inf)  # events before the arming do not count in a row either
    before = np.full(in_a_row - 1, -np.inf)
    lasting = np.lib.stride_tricks.sliding_window_view(np.concatenate([before, seen]), in_a_row).min(axis=1)
    counts = run.steps > 0
    if run.onset is not None:
        counts &= run.steps <= run.onset - LEAD * interval
    return float(lasting[counts].max(initial=-np.inf))
