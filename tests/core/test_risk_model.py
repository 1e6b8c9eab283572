"""The risk model on planted runs: it finds what was planted, never rewards a higher rate, and knows its limits."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from rksp_core.errors import ConfigError
from rksp_core.launch import LARGEST_RISE, NAMES, Launch
from rksp_core.outcomes import Outcome, read_outcomes
from rksp_core.risk_fit import auroc, fit
from rksp_core.risk_model import RiskModel, apart_from


def launch(rate: float = 0.01, loss_rise: float = 0.0, **changes: object) -> Launch:
    calm = Launch(
        rate,
        "adamw",
        4,
        64,
        (3.0, 3.0 * math.exp(loss_rise)),
        (1.0, 1.0),
        (1.0, 1.0),
        finite=True,
        steps=1,
        normalized=True,
        clipped=False,
    )
    return dataclasses.replace(calm, **changes)


def planted(count: int, seed: int = 0, rate_effect: float = 2.0) -> list[Outcome]:
    """Runs that diverge with log-odds rate_effect (log rate - log .01) + 1.5 loss rise."""
    random = np.random.default_rng(seed)
    runs = []
    for number in range(count):
        rate, rise = math.exp(random.normal(math.log(0.01), 1.0)), random.normal(0, 1)
        odds = rate_effect * math.log(rate / 0.01) + 1.5 * rise
        shape = {"depth": int(random.choice([2, 4, 8])), "width": int(random.choice([32, 64]))}
        diverged = bool(random.random() < _sigmoid(odds))
        runs.append(Outcome(f"run-{number:05d}", launch(rate, rise, **shape), diverged, 800))
    return runs


def _sigmoid(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


@pytest.fixture(scope="module")
def model() -> RiskModel:
    return fit(planted(400))


def test_the_planted_probabilities_are_found():
    found = fit(planted(2000))
    for rate, rise in [(0.005, 0.0), (0.01, 0.0), (0.02, 0.5), (0.02, -0.5)]:
        risk = found.risk(launch(rate, rise))
        expected = _sigmoid(2.0 * math.log(rate / 0.01) + 1.5 * rise)
        assert risk.probability == pytest.approx(expected, abs=0.06)  # 2000 runs leave a standard error of about .015
        assert risk.interval[0] < expected < risk.interval[1]


def test_the_fit_is_that_of_a_library():
    runs = planted(400)
    ours = fit(runs)
    x, y = ours.runs, [run.diverged for run in sorted(runs, key=lambda run: run.name)]
    theirs = LogisticRegression(C=1 / ours.about["ridge"], tol=1e-10, max_iter=10_000).fit(x, y)
    assert (ours.weights[0, 1:] >= 0).sum() >= 2  # constraints that do not bind change nothing
    expected = theirs.predict_proba(x)[:, 1]
    got = [ours.risk(run.launch).probability for run in sorted(runs, key=lambda run: run.name)]
    inside = [value is not None for value in got]
    np.testing.assert_allclose(np.array(got)[inside].astype(float), expected[inside], atol=0.02)


def test_more_rate_is_never_less_risk_even_where_the_runs_say_so():
    upside_down = fit(planted(400, rate_effect=-2.0))
    assert upside_down.weights[:, 1 + NAMES.index("log_learning_rate")].max() == 0
    assert upside_down.weights[:, 1 + NAMES.index("loss_rise")].min() > 0


@given(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0), st.floats(-3, 3))
@settings(max_examples=50)
def test_risk_grows_with_the_rate(model: RiskModel, one: float, other: float, rise: float):
    low, high = (model.risk(launch(rate, rise)).probability for rate in sorted((one, other)))
    if low is not None and high is not None:
        assert low <= high


def test_a_feature_that_is_left_out_has_no_weight():
    fitted = fit(planted(200), left_out=["loss_rise"])
    assert not fitted.weights[:, 1 + NAMES.index("loss_rise")].any()
    assert fitted.weights[:, 1 + NAMES.index("log_learning_rate")].all()


def test_reasons_add_up_to_the_log_odds(model: RiskModel):
    risk = model.risk(launch(0.03, 1.0))
    odds = model.weights[0, 0] + sum(share for _, share in risk.reasons)
    assert risk.probability == pytest.approx(_sigmoid(odds), rel=1e-10)
    assert {name for name, _ in risk.reasons[:2]} == {"log_learning_rate", "loss_rise"}
    assert [abs(share) for _, share in risk.reasons] == sorted((abs(s) for _, s in risk.reasons), reverse=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 768}, "the width is 768, the runs have 32 to 64"),
        ({"depth": 96}, "the depth is 96, the runs have 2 to 8"),
        ({"optimizer": "lion"}, "the optimizer is another one"),
    ],
)
def test_a_launch_unlike_the_runs_gets_no_probability(model: RiskModel, changes: dict[str, object], words: str):
    risk = model.risk(launch(**changes))
    assert risk.probability is None
    assert risk.interval is None
    assert risk.distance > risk.limit
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(risk.outside)


def test_what_is_the_same_in_all_runs_is_known_there_and_nowhere_else():
    runs = [dataclasses.replace(run, launch=dataclasses.replace(run.launch, width=16, depth=3)) for run in planted(200)]
    fitted = fit(runs)
    assert fitted.risk(launch(width=16, depth=3)).probability is not None
    unlike = fitted.risk(launch(width=17, depth=3))
    assert unlike.probability is None
    assert "the width is 17, the runs have 16 to 16" in unlike.outside
    assert "the depth" not in unlike.outside


@pytest.mark.parametrize(("rate", "rise", "expected"), [(100.0, 6.0, 1.0), (1e-9, -6.0, 0.0)])
def test_what_is_riskier_than_all_that_diverged_is_no_unknown(
    model: RiskModel, rate: float, rise: float, expected: float
):
    """Nor what is safer than all that did not: the signs of these effects are known."""
    assert model.risk(launch(rate, rise)).probability == pytest.approx(expected, abs=0.01)


def test_a_run_speaks_for_what_is_beyond_it():
    risky = NAMES.index("loss_rise")
    run, launches = np.zeros((1, len(NAMES))), np.zeros((2, len(NAMES)))
    launches[:, risky] = 3.0, -2.0
    for diverged, expected in ((True, [0.0, 2.0]), (False, [3.0, 0.0])):
        assert [apart_from(run, np.array([diverged]), each)[0] for each in launches] == expected


def test_the_safe_rate_is_where_the_odds_cross(model: RiskModel):
    c, w = model.weights[0, 0], dict(zip(NAMES, model.weights[0, 1:], strict=True))
    x = dict(zip(NAMES, (np.array(list(launch(1.0).features().values())) - model.mean) / model.scale, strict=True))
    others = c + sum(w[name] * x[name] for name in NAMES if name != "log_learning_rate")
    place = NAMES.index("log_learning_rate")
    wanted = math.log(0.2 / 0.8)
    exact = math.exp(model.mean[place] + model.scale[place] * (wanted - others) / w["log_learning_rate"])
    found = model.safe_rate(launch, np.geomspace(1e-4, 1, 5), 0.2)
    assert found.rate == pytest.approx(exact, rel=1e-9)  # odds are linear in the logarithm of the rate
    assert found.interval[0] < exact < found.interval[1]


def test_no_crossing_is_said_by_its_side(model: RiskModel):
    safe = model.safe_rate(launch, [1e-6, 1e-5], 0.5)
    assert (safe.rate, safe.crossed, safe.highest) == (None, False, 1e-5)
    hopeless = model.safe_rate(launch, [10.0, 100.0], 0.5)
    assert (hopeless.rate, hopeless.crossed, hopeless.lowest) == (None, True, 10.0)


def test_a_lucky_look_ahead_at_a_higher_rate_is_not_believed(model: RiskModel):
    def lucky(rate: float) -> Launch:
        return launch(rate, 3.0 if 0.004 < rate < 0.02 else 0.0)

    assert model.safe_rate(lucky, [0.001, 0.003, 0.01, 0.03], 0.5).rate < 0.01


def test_a_look_ahead_that_blew_up_has_the_largest_rise():
    features = launch(finite=False, losses=(3.0, None), hidden_rms=(1.0, None)).features()
    assert features["loss_rise"] == features["gradient_rise"] == features["hidden_rise"] == LARGEST_RISE
    assert launch(loss_rise=50.0).features()["loss_rise"] == LARGEST_RISE


def test_a_model_survives_its_file(model: RiskModel, tmp_path: Path):
    (tmp_path / "risk.json").write_text(model.to_json())
    again = RiskModel.read(tmp_path / "risk.json")
    assert again.sha256 == model.sha256
    assert again.risk(launch(0.02)).probability == pytest.approx(model.risk(launch(0.02)).probability, rel=1e-4)
    assert again.to_json() == model.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "rksp.profile/1"}, "has schema 'rksp.profile/1', expected 'rksp.risk_model/1'"),
        ({"limit": 1000.0}, "was changed after it was made"),
        ({"features": ["luck"]}, "knows other features than this version"),
        ({"mean": [1.0]}, "its arrays do not fit together"),
        ({"runs": None}, "cannot read the risk model"),
    ],
)
def test_a_wrong_file_is_one_sentence(model: RiskModel, tmp_path: Path, change: dict[str, object], message: str):
    path = tmp_path / "risk.json"
    path.write_text(json.dumps(json.loads(model.to_json()) | change))
    with pytest.raises(ConfigError, match=message):
        RiskModel.read(path)


def test_too_few_runs_are_refused():
    with pytest.raises(ConfigError, match=r"^20 runs, \d+ of them diverged, are too few"):
        fit(planted(20))
    calm = [dataclasses.replace(run, diverged=number < 3) for number, run in enumerate(planted(100))]
    with pytest.raises(ConfigError, match=r"^100 runs, 3 of them diverged, are too few"):
        fit(calm)


def test_the_order_of_the_runs_does_not_matter(model: RiskModel):
    assert fit(planted(400)[::-1]).sha256 == model.sha256


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
def test_an_optimizer_of_no_family_is_one_sentence(optimizer: str):
    with pytest.raises(ConfigError, match=f"no risk is known for the optimizer '{optimizer}'; known are adamw"):
        launch(optimizer=optimizer).features()


def test_runs_that_cannot_be_compared_are_refused():
    runs = planted(100)
    with pytest.raises(ConfigError, match=r"^the runs differ in their horizon \(800 to 900\)"):
        fit([*runs[1:], dataclasses.replace(runs[0], horizon=900)])
    other = dataclasses.replace(runs[0].launch, steps=5)
    with pytest.raises(ConfigError, match=r"^the runs differ in their number of look-ahead steps \(1 to 5\)"):
        fit([*runs[1:], dataclasses.replace(runs[0], launch=other)])


def test_the_model_says_how_well_it_does_on_runs_it_was_not_fitted_to(model: RiskModel):
    about = model.about
    assert 0.8 < about["auroc_of_the_learning_rate"] < about["auroc_cross_validated"] < 0.95  # as planted
    random = np.random.default_rng(0)
    noise = [dataclasses.replace(run, diverged=bool(random.random() < 0.5)) for run in planted(400)]
    assert abs(fit(noise).about["auroc_cross_validated"] - 0.5) < 0.1


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    scores, y = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0.0, 1.0, 0.0, 1.0])
    assert auroc(scores, y) == (1 + 0.5 + 1 + 1) / 4  # a tie is half a pair


def test_outcomes_survive_their_file(tmp_path: Path):
    runs = planted(40)
    path = tmp_path / "outcomes.jsonl"
    path.write_text("".join(json.dumps(run.to_dict()) + "\n" for run in runs))
    assert fit(read_outcomes([path])).sha256 == fit(runs).sha256


LINE = planted(1)[0].to_dict()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 holds no outcome of a run"),
        (json.dumps({"schema": "rksp.preflight/1"}), "expected a document of schema 'rksp.outcome/1'"),
        (json.dumps({k: v for k, v in LINE.items() if k != "diverged"}), "'diverged' is missing"),
        (json.dumps(LINE | {"diverged": "yes"}), "diverged is true or false, got 'yes'"),
        (json.dumps(LINE | {"horizon": 0}), "horizon is a count of steps, got 0"),
        (json.dumps(LINE | {"launch": None}), "its launch is null: the report comes from a preflight without --lr"),
        (json.dumps(LINE | {"launch": 3}), "a launch has the keys clipped, depth, .*; got int"),
        (json.dumps(LINE | {"launch": LINE["launch"] | {"depth": 0}}), "a depth, a width and steps of at least 1"),
        (json.dumps(LINE | {"launch": LINE["launch"] | {"losses": "3"}}), "copy it from a preflight report as it is"),
        (json.dumps(LINE | {"launch": LINE["launch"] | {"optimizer": "x"}}), "no risk is known for the optimizer 'x'"),
        (json.dumps(LINE), "comes twice; a run counts once"),
    ],
)
def test_a_wrong_line_is_one_sentence(tmp_path: Path, line: str, message: str):
    path = tmp_path / "outcomes.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        read_outcomes([path])
    assert "\n" not in str(caught.value)
