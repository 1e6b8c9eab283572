"""The paper's tables: the page is what the kept results render to, shares have the intervals of textbooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rksp_core import profile_model
from rksp_core.errors import ConfigError
from training.experiments import intervals
from training.experiments.paper import __main__ as command
from training.experiments.paper import contents, overhead, runs, table_01
from training.experiments.paper.page import markdown, page
from training.experiments.paper.section import Section, read_section, said, same, write_section
from training.experiments.plan import PlannedRun, plan
from training.experiments.record import PACKED, SCHEMA
from training.experiments.spec import read_spec
from training.models.gpt import GPT
from training.tasks import PROBE
from training.tasks.associative_recall import AssociativeRecall

PAGE = contents.ROOT / "docs" / "paper.md"
SPECS = sorted(contents.SPECS.glob("*.yaml"))
COUNTED = [f"table_{number:02}" for number in (*range(3, 11), *range(12, 16))]  # the others profile models, or draw
SECTION = Section(
    name="table_03",
    title="stabilizers",
    setting="Width 64, 12 runs.",
    rows=(("none", "66.7 %", str(intervals.Share(8, 12)), same(None)), ("KSS 0.15", "12.5 %", "1 of 12", same(True))),
    sentence="Too few to say.",
    figure="docs/images/report.png",
)


def test_the_page_is_what_the_kept_results_render_to() -> None:
    assert PAGE.read_text() == page(PAGE.parent)


@pytest.mark.parametrize("name", [name for name in COUNTED if contents.result_of(name).exists()])
def test_a_kept_result_is_what_its_kept_runs_say(name: str) -> None:
    assert contents.chapter(name).section() == read_section(contents.result_of(name))


@pytest.mark.parametrize("name", contents.names())
def test_each_chapter_says_what_it_is(name: str) -> None:
    one = contents.chapter(name)
    assert one.__doc__
    assert one.TITLE
    assert isinstance(one.CHEAP, bool)
    for spec in one.SPECS:
        assert contents.spec_of(spec) in SPECS


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_specs_of_the_paper_can_be_planned(path: Path) -> None:
    spec = read_spec(path)
    assert spec.name == path.stem
    assert {run.part for run in plan(spec)} == {"untouched"}  # nothing is chosen on them


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_records_of_the_paper_are_runs_of_their_plan(path: Path) -> None:
    kept = contents.records_of(path.stem)
    if kept.exists():
        planned = {run.key for run in plan(read_spec(path))}
        assert {record["key"] for record in runs.read_records(kept)} <= planned


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_section(tmp_path / "one.json", SECTION)
    assert read_section(tmp_path / "one.json") == SECTION
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(ConfigError, match="compute it again"):
        read_section(tmp_path / "one.json")


def test_a_figure_is_found_from_where_the_page_lies() -> None:
    text = markdown(SECTION, contents.ROOT / "docs")
    assert "![stabilizers](images/report.png)" in text
    assert "| none | 66.7 % | 8 of 12: 67 % [39, 86] | - |" in text


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="needs 4 cells"):
        Section("table_03", "stabilizers", "", (("none", "66.7 %"),), "")


def test_a_sentence_whose_claim_fails_is_not_printed() -> None:
    assert said("More than half diverged.", 8 / 12 > 0.5) == "More than half diverged."
    with pytest.raises(ConfigError, match="claim 2 of 2 no longer holds: rewrite 'More than half"):
        said("More than half diverged.", True, False)


def test_a_share_has_the_interval_of_wilson() -> None:
    """Wilson 1927: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964."""
    z2 = 1.959963984540054**2
    for count, n in ((0, 45), (8, 12), (12, 12)):
        p = count / n
        half = (z2 * p * (1 - p) / n + (z2 / n) ** 2 / 4) ** 0.5
        wanted = [(p + z2 / (2 * n) + sign * half) / (1 + z2 / n) for sign in (-1, 1)]
        assert intervals.Share(count, n).interval() == pytest.approx(wanted, abs=1e-10)
    assert str(intervals.Share(0, 0)) == "no run"


def test_the_lady_tastes_no_tea() -> None:
    """Fisher 1935: three of four cups right; (16 + 1) / 70 on either side."""
    assert intervals.fisher(intervals.Share(3, 4), intervals.Share(1, 4)) == pytest.approx(34 / 70)


def test_a_mean_has_the_interval_of_student() -> None:
    found = intervals.mean([1.0, None, 3.0])
    assert (found.value, found.runs) == (2.0, 2)
    assert found.high - found.value == pytest.approx(12.706204736)  # t of one degree of freedom, times 1
    assert str(intervals.mean([0.5], digits=1)) == "0.5, n = 1"
    assert str(intervals.mean([None])) == "no run"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A sweep of two arms and four runs of three steps, kept below the test's own folder."""
    arguments = "{vocabulary: 32, length: 16, width: 16, depth: 2, heads: 2}"
    (tmp_path / "tiny.yaml").write_text(
        f"base: {{steps: 3, model: {{factory: 'training.models.gpt:GPT', arguments: {arguments}}},"
        " task: {batch: 4, pairs: 2}}\n"
        "groups: [{name: none}, {name: clip, settings: {stabilizers.clip: 1.0}}]\n"
        "seeds: {each: 2, untouched: [31000, 31001]}\n"
        "split: {tuning: 0, held_out: 0, untouched: 1}\n"
        "measure: {profile: {every: 2, samples: 32, sequences: 4}, look_ahead: []}\n"
    )
    monkeypatch.setattr(contents, "SPECS", tmp_path)
    monkeypatch.setattr(contents, "DATA", tmp_path / "kept")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return "tiny"


def test_runs_are_made_kept_and_grouped(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.make_runs(tiny, 1, None) == 0
    found = runs.arms(tiny)
    assert list(found) == ["none", "clip"]
    assert {record["seed"] for record in found["clip"]} == {31000, 31001}  # the same for every arm
    assert str(runs.diverged(found["none"])) == "0 of 2: 0 % [0, 66]"
    assert runs.progress(tiny) == "4 runs"
    record = found["none"][0]
    assert record["steps"]["every"] == runs.EVERY
    assert runs.stripped(record) is record
    assert runs.last(record, "near_unit_mass_mean") is not None
    for path in (tmp_path / "runs" / "sweeps" / "paper" / "tiny" / "records").iterdir():
        path.unlink()
    (tmp_path / "runs" / "sweeps" / "paper" / "tiny" / PACKED).unlink()
    kept = contents.records_of(tiny).read_bytes()
    assert runs.make_runs(tiny, 1, None) == 0  # goes on from what is kept, which holds all of them
    assert "4 of 4 runs have a record in" in capsys.readouterr().out
    assert contents.records_of(tiny).read_bytes() == kept


def made_up(spec: str, diverges: Callable[[PlannedRun], bool]) -> None:
    """Keep a record of every planned run of a shipped spec; who diverges does so at step 50, with loss 4 before."""
    planned = plan(read_spec(contents.spec_of(spec)))
    records = []
    for run in planned:
        gone = diverges(run)
        kss = float(run.settings.get("kss.alpha", 0.0))
        records.append(
            {
                "schema": SCHEMA,
                "key": run.key,
                "group": run.group,
                "seed": run.seed,
                "configuration": {"optimizer.learning_rate": 0.001} | dict(run.settings),
                "steps": {"loss": [4.0] * 30, "gradient_norm": [1.0] * 30},
                "profiles": {"step": [0] if gone else [0, 800], "features": {"near_unit_mass_mean": [0.9, 0.5 - kss]}},
                "labels": {"paper": None, "rksp": 50 if gone else None},
                "learned": not gone,
                "final": {"loss": 4.0 if gone else 1.0 - kss + run.seed % 10 / 100, "accuracy": 0.1 if gone else 0.6},
            }
        )
    runs.keep(spec, records)


@pytest.fixture
def kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "DATA", tmp_path)


def cells(section: Section, row: str) -> dict[str, str]:
    return dict(zip(section.header, next(each for each in section.rows if each[0] == row), strict=True))


@pytest.mark.usefixtures("kept_apart")
def test_arms_stand_beside_doing_nothing() -> None:
    """KSS saves all, clipping saves none, doing nothing loses the eight runs above .005."""

    def diverges(run: PlannedRun) -> bool:
        hot = run.settings["optimizer.learning_rate"] > 0.005
        return run.group.startswith("clip") or (run.group in ("none", "L2 on residuals") and hot)

    made_up("no_norm_recall", diverges)
    third = contents.chapter("table_03").section()
    assert cells(third, "none")["diverged, ours"] == "8 of 12: 67 % [39, 86]"
    assert cells(third, "none")["same sign"] == "-"
    assert cells(third, "KSS 0.15")["same sign"] == "yes"
    assert cells(third, "KSS 0.15")["near-unit mass, ours"] == "0.35 [0.35, 0.35], n = 12"
    assert cells(third, "clip 0.5")["same sign"] == "no (within chance)"
    assert cells(third, "half the rate")["diverged, ours"] == "0 of 12: 0 % [0, 24]"  # four of them from "none"
    assert "fewer: KSS 0.10, KSS 0.15, KSS 0.20, half the rate; more: none;" in third.sentence
    assert "Lion" in contents.chapter("table_04").section().sentence
    sixth = contents.chapter("table_06").section()
    assert cells(sixth, "L2 on residuals")["same sign"] == "-"  # as many as without
    assert sixth.rows[-1][2].endswith("n = 6 arms")


def test_spectra_at_initialization_are_those_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 32, "DEPTH": 2, "SEQUENCES": 8, "SEEDS": (5,)}.items():
        monkeypatch.setattr(table_01, name, value)
    torch.manual_seed(5)
    model = GPT(256, 64, width=32, depth=2, heads=4, norm="no_norm", initialization="gpt2_unscaled")
    probe = AssociativeRecall(256, 64, 4, 5).batch(PROBE, 0, 8).inputs
    for mode in ("relative", "absolute"):
        summary = profile_model(model, probe, eps_mode=mode).summary
        wanted = [summary[name]["mean"] for name in ("near_unit_mass", "expansive_mass", "spectral_radius")]
        found = table_01.spectra_of("no_norm", "gpt2_unscaled", mode)
        assert [each.value for each in found] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.usefixtures("kept_apart")
def test_norms_stand_beside_pre_ln(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spectra are the paper's own; No-Norm diverges, and so does nothing else."""

    def spectra(norm: str, initialization: str, _: str) -> tuple[intervals.Mean, ...]:
        figures = {"literal": (1.0, 0, 0) if norm == "no_norm" else (0.83, 0, 0), "normal": table_01.PUBLISHED[norm][1]}
        value = figures["literal" if initialization == "published" else "normal"]
        if norm in ("deepnorm", "subln") and initialization != "published":
            value = (value[0] + (norm == "deepnorm"), value[1], 9.0)
        return tuple(intervals.Mean(each, each, each, 3, error=0.0) for each in value)

    monkeypatch.setattr(table_01, "spectra_of", spectra)
    made_up("norms_recall", lambda run: run.group == "No-Norm")
    found = table_01.section()
    assert cells(found, "No-Norm")["diverged, ours"] == "6 of 6: 100 % [61, 100]"
    assert cells(found, "No-Norm")["same sign"] == "yes"
    assert cells(found, "Post-LN")["same sign"] == "-"  # the paper has no difference to compare
    assert cells(found, "No-Norm")["near-unit mass against Pre-LN, same sign (normal, literal)"] == "yes, yes"
    assert "with one 0 of 30: 0 % [0, 11]" in found.sentence


def test_an_arm_is_timed_beside_doing_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ARMS": ("SAM 0.05",), "PAIRS": 2, "STEPS": 1, "FILE": tmp_path / "overhead.json"}.items():
        monkeypatch.setattr(overhead, name, value)
    assert overhead.read() == {}
    assert overhead.main() == 0
    assert overhead.read()["SAM 0.05"].endswith("n = 2 pairs")


@pytest.mark.usefixtures("kept_apart")
def test_the_largest_stable_rate_is_the_last_below_the_first_that_is_not() -> None:
    def diverges(run: PlannedRun) -> bool:
        rate = run.settings["optimizer.learning_rate"]
        one_of_two = run.settings["model.arguments.norm"] != "no_norm" and rate == 0.128 and run.seed % 2 == 0
        return rate > (0.3 if "KSS" in run.group else 0.2) or (one_of_two and "KSS" not in run.group)

    made_up("rates_recall", diverges)
    found = contents.chapter("table_05").section()
    assert cells(found, "Pre-LN")["stable: ours, without -> with KSS"] == "0.032 -> 0.256"
    assert cells(found, "Pre-LN")["same sign"] == "yes"
    assert cells(found, "No-Norm")["same sign"] == "-"
    assert "it raises that of Pre-LN, RMSNorm; it leaves where it is that of No-Norm" in found.sentence


@pytest.mark.usefixtures("kept_apart")
@pytest.mark.parametrize("name", ["table_07", "table_08", "table_09"])
def test_kss_stands_beside_the_same_runs_without(name: str) -> None:
    made_up(contents.chapter(name).SPECS[0], lambda run: run.settings["optimizer.learning_rate"] > 0.3)
    found = contents.chapter(name).section()
    assert "which cannot be told from" in found.sentence
    assert "changes the held-out loss by -0.150 [-0.150, -0.150]" in found.sentence  # kss.alpha, in `made_up`
    assert {"yes", "-"} == {value for row in found.rows for value in row if value in ("yes", "no", "-")}


def test_a_table_without_its_runs_says_how_to_make_them(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Chapter:
        TITLE, CHEAP, SPECS = "tiny", True, ("tiny",)

    monkeypatch.setattr(command, "chapter", lambda _: Chapter)
    monkeypatch.setattr(contents, "chapter", lambda _: Chapter)
    assert command.main(["table_03"]) == 0
    assert "table_03: not run yet: python -m training.experiments.paper table_03 --run" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="add --run"):
        runs.arms(tiny)


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["table_99"]) == 2
    assert capsys.readouterr().err.startswith("paper: NAME must be one of ")
