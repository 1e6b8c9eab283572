"""The decision flow of Kim et al. 2026, Fig. 7, case by case."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.profile import LayerProfile
from rksp_core.risk import VERDICTS, decide, standard_learning_rate
from rksp_core.risk_model import Risk


def layers(*masses: float | None, status: str = "ok", kappa: float = 10.0) -> list[LayerProfile]:
    return [
        LayerProfile(f"h.{i}", 8, 8, 100, 100, near_unit_mass=mass, eigenvector_condition=kappa, status=(status,))
        for i, mass in enumerate(masses)
    ]


@pytest.mark.parametrize(
    ("mass", "verdict"),
    [(0.0, "proceed"), (0.29, "proceed"), (0.3, "monitor"), (0.5, "monitor"), (0.51, "use_kss"), (1.0, "use_kss")],
)
def test_near_unit_mass_decides_at_0_3_and_0_5(mass: float, verdict: str) -> None:
    assert decide(layers(mass)).verdict == verdict


def test_the_mean_over_layers_counts() -> None:
    assert decide(layers(0.0, 0.5)).verdict == "proceed"


@given(st.floats(0, 1), st.floats(1, 1e12))
def test_kappa_never_decides(mass: float, kappa: float) -> None:
    assert decide(layers(mass, kappa=kappa)) == decide(layers(mass))


def test_above_twice_the_standard_rate_kss_is_asked_for() -> None:
    assert decide(layers(0.1), learning_rate=2e-3, standard_rate=1e-3).verdict == "proceed"
    above = decide(layers(0.1), learning_rate=2.1e-3, standard_rate=1e-3)
    assert above.verdict == "use_kss"
    assert "2.1 times the standard one" in above.reasons[-1]
    assert decide(layers(0.1), learning_rate=1.0, standard_rate=None).verdict == "proceed"


def test_without_a_norm_kss_is_asked_for() -> None:
    assert decide(layers(0.1), normalized=False).verdict == "use_kss"
    assert decide(layers(0.1), normalized=None).verdict == "proceed"


@pytest.mark.parametrize("loss", [50.1, math.inf, math.nan])
def test_a_look_ahead_that_blows_up_is_not_told_to_proceed(loss: float) -> None:
    decision = decide(layers(0.1), look_ahead_loss=loss)
    assert decision.verdict == "use_kss"
    assert "lower the learning rate" in decision.reasons[-1]
    assert decide(layers(0.1), look_ahead_loss=50.0).verdict == "proceed"


def test_zero_initialized_branches_are_not_informative_yet() -> None:
    decision = decide(layers(1.0, 1.0, status="degenerate_update"), normalized=False)
    assert decision.verdict == "inconclusive"
    assert decision.reasons[0].startswith("not informative yet")


def test_a_few_uninformative_layers_are_left_out_of_the_mean() -> None:
    mixed = [*layers(0.1, 0.1, 0.1), *layers(1.0, status="degenerate_update")]
    assert decide(mixed).verdict == "proceed"


def test_too_few_tokens_are_inconclusive() -> None:
    decision = decide(layers(0.1, 0.1, status="interpolating"))
    assert decision.verdict == "inconclusive"
    assert "larger probe" in decision.reasons[0]
    assert decide(layers(None, None)).verdict == "inconclusive"


def test_a_mass_within_the_probes_noise_says_so() -> None:
    assert "within the probe's noise of 0.3" in decide(layers(0.29)).reasons[0]
    assert "noise" not in decide(layers(0.2)).reasons[0]


def test_every_decision_carries_the_caveat_and_a_known_verdict() -> None:
    for mass in (0.1, 0.4, 0.9, None):
        decision = decide(layers(mass))
        assert decision.verdict in VERDICTS
        assert "not calibrated" in decision.caveat


def test_standard_rates_are_those_of_gpt3() -> None:
    """Brown et al. 2020, Table 2.1; log-linear between its rows, and no claim for other optimizers."""
    assert standard_learning_rate(768, "adamw") == 6e-4
    assert standard_learning_rate(12288, "Adam") == 0.6e-4
    assert standard_learning_rate(64, "adamw") == 1e-3
    assert standard_learning_rate(50000, "adamw") == 0.6e-4
    between = standard_learning_rate(886, "adamw")
    assert between == pytest.approx(math.sqrt(6e-4 * 3e-4), rel=1e-2)  # 886 is the geometric mean, rounded
    assert standard_learning_rate(768, "sgd") is None


def test_a_calibrated_risk_overrules_the_flow() -> None:
    reasons = (("lion", -3.0), ("sgd", 2.5), ("log_learning_rate", 1.5), ("log_width", 0.1), ("log_depth", 0.0))

    def asked(probability: float | None) -> Risk:
        interval = None if probability is None else (probability / 2, probability)
        return Risk(probability, interval, reasons, 0.0, 1.0, "unlike the runs" if probability is None else "")

    verdicts = [decide(layers(0.9), risks=[asked(p)]).verdict for p in (0.09, 0.1, 0.49, 0.5, None)]
    assert verdicts == ["proceed", "monitor", "monitor", "use_kss", "inconclusive"]
    first, second = decide(layers(0.9), risks=[asked(0.5)]).reasons
    assert first == (
        "the probability of divergence is 50% (25% to 50%), against the mean run: the learning rate raises it, "
        "the optimizer lowers it, the width raises it"
    )
    assert second.startswith("the paper's rule alone would say use_kss: mean near-unit mass 0.90")
    assert decide(layers(0.9), risks=[asked(None)]).reasons[0] == "unlike the runs"
    assert decide(layers(0.9), risks=[asked(0.05), asked(0.6)]).verdict == "use_kss"  # the largest decides
    assert decide(layers(0.9), risks=[asked(None)], look_ahead_loss=math.inf).verdict == "use_kss"  # seen, not inferred
