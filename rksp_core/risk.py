"""From a profile to a verdict: a calibrated risk where there is one, else the paper's decision flow. Pure.

The flow (Kim et al. 2026, Fig. 7) is not calibrated. Over the six norms, near-unit mass orders divergence exactly as
well as the flag "this model has no norm layer" (AUROC 0.95 both); among runs of one norm it orders nothing (0.49, 72
runs), where the learning rate does (0.87). So a verdict comes with its reasons, and with that caveat; and a probability
of divergence that was calibrated on runs like this one (`rksp_core.risk_model`) overrules it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from rksp_core.launch import FEATURES
from rksp_core.profile import LayerProfile
from rksp_core.risk_model import Risk

Verdict = Literal["proceed", "monitor", "use_kss", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

LOW_MASS, HIGH_MASS = 0.3, 0.5  # Fig. 7
RATE_FACTOR = 2.0  # "learning rates above twice the standard one"
MASS_NOISE = 0.02  # the largest standard deviation seen over probe batches
LOW_RISK, HIGH_RISK = 0.1, 0.5  # of divergence: below the first a run proceeds, from the second on it asks for KSS
LOSS_LIMIT = 50.0  # the paper's divergence label (Sec. 3.1)

CAVEAT = (
    "This is the paper's decision rule, and it is not calibrated: near-unit mass tells norms apart, but among models "
    "of one norm it orders divergence no better than chance; the learning rate, the depth and the look-ahead say more."
)
CALIBRATED = (
    "The probability is calibrated on runs whose outcome is known; it holds for models, tasks and horizons like theirs."
)

# Width -> peak learning rate of Adam: GPT-3's models (Brown et al. 2020, arXiv:2005.14165, Table 2.1), and Adam's own
# default (Kingma and Ba 2015, arXiv:1412.6980) for widths that table does not reach.
_ADAM_RATES = (
    (256, 1e-3),
    (768, 6e-4),
    (1024, 3e-4),
    (1536, 2.5e-4),
    (2048, 2e-4),
    (2560, 1.6e-4),
    (4096, 1.2e-4),
    (5140, 1e-4),
    (12288, 0.6e-4),
)
_ADAM_LIKE = ("adam", "adamw")


@dataclass(frozen=True)
class Decision:
    """A verdict, its reasons in plain words, and what to hold against them."""

    verdict: Verdict
    reasons: tuple[str, ...]
    caveat: str = field(default=CAVEAT)


def decide(
    layers: Sequence[LayerProfile],
    *,
    normalized: bool | None = None,
    learning_rate: float | None = None,
    standard_rate: float | None = None,
    look_ahead_loss: float | None = None,
    risks: Sequence[Risk] = (),
) -> Decision:
    """Decide by the calibrated risks; without one, by the decision flow of Kim et al. 2026, Fig. 7.

    The largest probability decides: below `LOW_RISK` the run proceeds, from `HIGH_RISK` on it asks for KSS, between it
    asks to monitor. Risk models that have none for this launch are inconclusive, unless its look-ahead was not
    finite: that was seen. What the flow says is then among the reasons only.

    Near-unit mass (mean over the informative layers) below 0.3 proceeds, above 0.5 asks for KSS, between asks to
    monitor. KSS is asked for, too, above twice the standard learning rate and without any norm. The eigenvector
    condition kappa is in Fig. 7 but decides nothing here: it moves by half its value from one probe to the next.

    Parameters
    ----------
    layers
        In depth order.
    normalized
        Whether the blocks hold a normalization module; None when unknown.
    learning_rate, standard_rate
        The planned peak rate and the usual one (`standard_learning_rate`), > 0; None leaves that rule out.
    look_ahead_loss
        The largest loss of a look-ahead at the full rate (infinite or NaN when it blew up); None without one. Fig. 7
        does not have it: a run that is over after a few steps must not be told to proceed.
    risks
        What risk models say of this launch; empty when none was asked.
    """
    flow = _by_flow(layers, normalized, learning_rate, standard_rate, look_ahead_loss)
    if not risks:
        return flow
    beside = f"the paper's rule alone would say {flow.verdict}: {'; '.join(flow.reasons)}"
    probabilities = [risk.probability for risk in risks if risk.probability is not None]
    if not probabilities:
        gone = look_ahead_loss is not None and not math.isfinite(look_ahead_loss)
        return Decision("use_kss" if gone else "inconclusive", (risks[0].outside, beside))
    largest = max(probabilities)
    verdict: Verdict = "proceed" if largest < LOW_RISK else "monitor" if largest < HIGH_RISK else "use_kss"
    said = [risk.outside if risk.probability is None else _in_words(risk, risk.probability) for risk in risks]
    return Decision(verdict, (*said, beside), CALIBRATED)


def _in_words(risk: Risk, probability: float) -> str:
    words = {feature.name: feature.words for feature in FEATURES}
    pushes: dict[str, float] = defaultdict(float)  # the optimizer is several features
    for name, share in risk.reasons:
        pushes[words[name]] += share
    strongest = sorted(pushes.items(), key=lambda push: -abs(push[1]))[:3]
    said = [f"{what} {'raises' if share > 0 else 'lowers'} it" for what, share in strongest if share]
    low, high = risk.interval or (0.0, 1.0)
    return (
        f"the probability of {risk.outcome} is {probability:.0%} ({low:.0%} to {high:.0%}), against the mean run: "
        f"{', '.join(said)}"
    )


def _by_flow(
    layers: Sequence[LayerProfile],
    normalized: bool | None,
    learning_rate: float | None,
    standard_rate: float | None,
    look_ahead_loss: float | None,
) -> Decision:
    informative = [layer for layer in layers if _informative(layer)]
    if 2 * len(informative) <= len(layers):
        return Decision("inconclusive", (_why_uninformative(layers, len(informative)),))
    findings: list[tuple[Verdict, str]] = [_by_mass(informative)]
    if normalized is False:
        findings.append(("use_kss", "no normalization module was found in the blocks, and the paper asks for KSS then"))
    if learning_rate is not None and standard_rate is not None and learning_rate > RATE_FACTOR * standard_rate:
        times = learning_rate / standard_rate
        findings.append(
            (
                "use_kss",
                f"the learning rate {learning_rate:g} is {times:.1f} times the standard one, {standard_rate:.2g}",
            )
        )
    if look_ahead_loss is not None and not look_ahead_loss <= LOSS_LIMIT:
        loss = f"reaches {look_ahead_loss:.3g}" if math.isfinite(look_ahead_loss) else "is not finite"
        findings.append(
            ("use_kss", f"the loss of the look-ahead {loss}: lower the learning rate, or warm up, before anything else")
        )
    verdict = max((found for found, _ in findings), key=VERDICTS.index)
    return Decision(verdict, tuple(reason for _, reason in findings))


def standard_learning_rate(width: int, optimizer: str) -> float | None:
    """Return the usual peak learning rate at this width, or None for an optimizer whose rates have another scale.

    Log-linear between the rows of GPT-3's table (Brown et al. 2020, Table 2.1) and constant outside them.
    """
    if optimizer.lower() not in _ADAM_LIKE:
        return None
    below = max((row for row in _ADAM_RATES if row[0] <= width), default=_ADAM_RATES[0])
    above = min((row for row in _ADAM_RATES if row[0] >= width), default=_ADAM_RATES[-1])
    if below[0] == above[0] or width <= below[0] or width >= above[0]:
        return below[1] if width >= below[0] else above[1]
    share = math.log(width / below[0]) / math.log(above[0] / below[0])
    return float(below[1] * (above[1] / below[1]) ** share)


def _informative(layer: LayerProfile) -> bool:
    """A layer that hardly updates its input has A = I, near-unit mass 1, and says nothing yet (Fixup, ReZero)."""
    return layer.near_unit_mass is not None and not {"degenerate_update", "interpolating"} & set(layer.status)


def _why_uninformative(layers: Sequence[LayerProfile], informative: int) -> str:
    total = len(layers)
    degenerate = sum("degenerate_update" in layer.status for layer in layers)
    interpolating = sum("interpolating" in layer.status for layer in layers)
    if degenerate >= max(interpolating, 1):
        return (
            f"not informative yet: {degenerate} of {total} blocks hardly change their input (zero-initialized residual "
            "branches?), so their spectrum is that of the identity; profile a checkpoint after some hundred steps"
        )
    if interpolating:
        return (
            f"{interpolating} of {total} blocks have too few distinct token states for their width; give a larger "
            "probe (`rksp probe make --sequences`) and more --samples"
        )
    return f"only {informative} of {total} blocks have a spectrum; see the remedies in the table"


def _by_mass(layers: Sequence[LayerProfile]) -> tuple[Verdict, str]:
    mass = math.fsum(layer.near_unit_mass or 0.0 for layer in layers) / len(layers)
    close = [limit for limit in (LOW_MASS, HIGH_MASS) if abs(mass - limit) <= MASS_NOISE]
    noise = f" (within the probe's noise of {close[0]:g}: another probe may decide otherwise)" if close else ""
    text = f"mean near-unit mass {mass:.2f}"
    if mass < LOW_MASS:
        return "proceed", f"{text} is below {LOW_MASS:g}, the low range of the rule: monitoring is optional{noise}"
    if mass > HIGH_MASS:
        return "use_kss", f"{text} is above {HIGH_MASS:g}: high risk by the rule{noise}"
    return "monitor", f"{text} lies between {LOW_MASS:g} and {HIGH_MASS:g}: neither clearly low nor high risk{noise}"
