"""Tables 10 to 18 and the figures: what they compute, on planted runs and small real models."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats

from rksp_core.errors import ConfigError
from rksp_core.profile import LayerProfile
from training.config import Config
from training.experiments.intervals import Share, apart, mean
from training.experiments.paper import (
    architectures,
    contents,
    drawing,
    figure_2,
    figure_5,
    figure_7,
    pretrained,
    table_12,
    table_13,
    table_14,
    table_16,
    table_17,
    table_18,
)
from training.experiments.paper.runs import keep
from training.experiments.paper.section import side
from training.experiments.plan import configuration, plan
from training.experiments.record import SCHEMA
from training.experiments.spec import read_spec
from training.models.gpt import GPT

RATE = "optimizer.learning_rate"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a record of each planned run below the test's folder: those at the highest rate of a sweep diverge."""
    monkeypatch.setattr(contents, "DATA", tmp_path)
    monkeypatch.setattr(drawing, "ROOT", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for spec in ("no_norm_recall", "norms_recall", "mup_recall", "lamb_recall", "moe_lm", "mamba_lm", "kan_lm"):
        keep(spec, _records(spec))


@functools.cache
def _records(spec: str) -> list[dict[str, Any]]:
    sweep = read_spec(contents.spec_of(spec))
    runs = plan(sweep)
    highest = max(run.settings[RATE] for run in runs)
    return [_record(run.key, run.group, run.config(sweep), run.settings[RATE] == highest) for run in runs]


def _record(key: str, group: str, config: Config, diverged: bool) -> dict[str, Any]:
    mass = 0.9 if "no_norm" in str(config.model.arguments) else 0.2
    return {
        "schema": SCHEMA,
        "key": key,
        "group": group,
        "part": "untouched",
        "configuration": configuration(config),
        "initial": {"features": {"near_unit_mass_mean": mass}},
        "steps": {"loss": [1.0], "gradient_norm": [1.0]},
        "profiles": {"step": [0, 100], "features": {"near_unit_mass_mean": [mass, 0.5]}},
        "labels": {"paper": None, "rksp": 150 if diverged else None},
        "final": {"loss": 1.0, "accuracy": 0.25 if diverged else 0.75},
        "learned": not diverged,
    }


@pytest.mark.usefixtures("planted")
def test_mup_at_twice_the_rate_has_the_runs_that_it_shares() -> None:
    assert len(table_13.found()[table_13.HIGHER]) == 12
    section = table_13.section()
    rows = {row[0]: row for row in section.rows}
    assert rows[table_13.HIGHER][2].startswith("4 of 12: 33 %")  # at .02, the highest of this sweep
    assert rows["muP"][2].startswith("0 of 12")
    assert "28 of its 32 runs did" in section.sentence


@pytest.mark.usefixtures("planted")
def test_the_best_rate_is_that_of_the_fewest_divergences_then_of_the_best_accuracy() -> None:
    rows = {row[0]: row for row in table_14.section().rows}
    assert rows["LAMB"][-2:] == ("0.01", "0.005")  # of two that are equal the lower
    records = [
        {"configuration": {RATE: rate}, "labels": {"rksp": None}, "final": {"accuracy": accuracy}}
        for rate, accuracy in ((0.005, 0.1), (0.007, 0.9), (0.01, 0.5))
    ]
    assert table_14.best_rate(records) == "0.007"
    assert table_14.best_rate([]) == "-"


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("table", [table_16, table_17, table_18], ids=lambda table: table.__name__[-8:])
def test_a_table_of_architectures_has_a_row_for_each_arm(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "MODELS", dict.fromkeys(architectures.MODELS, lambda: GPT(256, 64, 8, 1, 2)))
    monkeypatch.setattr(architectures, "STATES", 128)
    architectures.untrained.cache_clear()
    section = table.section()
    architectures.untrained.cache_clear()
    assert [row[0] for row in section.rows] == [
        group.name for group in read_spec(contents.spec_of(table.SPECS[0])).groups
    ]
    for row in section.rows:
        assert row[5] == "2 of 6: 33 % [10, 70]"
        assert row[2] == "as without KSS" or not row[0].endswith("KSS")
        assert row[3] == "-"  # the same model everywhere
    assert section.sentence.endswith("tells apart: none.")


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("figure", [figure_2, figure_5], ids=lambda figure: figure.__name__[-8:])
def test_a_figure_is_drawn(figure: ModuleType, tmp_path: Path) -> None:
    section = figure.section()
    assert section.figure is not None
    drawn = (tmp_path / section.figure).read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert (tmp_path / str(figure.section().figure)).read_bytes() == drawn  # the same runs give the same bytes


@pytest.mark.usefixtures("planted")
def test_the_weight_of_kss_is_compared_from_none_to_the_largest() -> None:
    diverged, accuracy, _ = figure_2.section().rows
    assert diverged[1:] == ("66.7 / 25.0 / 12.5 / 8.3", "33.3 / 33.3 / 33.3 / 33.3", "-")
    assert accuracy[2] == "58.3 / 58.3 / 58.3 / 58.3"


def test_the_decision_counts_each_run_of_tuning_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "ROOT", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    rows = figure_7.section().rows
    counts = [int(row[2].split(":")[0].split(" of ")[1]) for row in rows]
    assert sum(counts[:3]) == sum(counts[3:]) > 100


def test_the_notation_is_what_the_code_calls_it() -> None:
    for _, _, name in table_12.NOTATION:
        if ":" not in name:
            continue
        module, attributes = name.split(":")
        home: object
        if module[module.rindex(".") + 1].isupper():
            home = getattr(importlib.import_module(module.rpartition(".")[0]), module.rpartition(".")[2])
            known = set(getattr(home, "model_fields", LayerProfile.__dataclass_fields__))
        else:
            known = set(vars(importlib.import_module(module)))
        assert set(attributes.split(", ")) <= known, name


def test_an_untrained_profile_is_a_function_of_the_seed() -> None:
    name = "Pre-LN, d = 64, L = 4"
    state = torch.get_rng_state()
    (one,), (other,) = architectures.untrained(name, (7,)), architectures.untrained(name, (8,))
    architectures.untrained.cache_clear()
    assert architectures.untrained(name, (7,)) == (one,)
    assert one.values("near_unit_mass") != other.values("near_unit_mass")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sign_says_whether_it_is_within_chance() -> None:
    low, high, between = mean([0.1, 0.2, 0.3]), mean([0.5, 0.6, 0.7]), mean([0.1, 0.3, 0.5])
    assert side(0.8, 0.1, high, low) == "yes"
    assert side(0.1, 0.8, high, low) == "no"
    assert side(0.8, 0.1, between, low) == "yes (within chance)"
    assert side(0.8, 0.1, mean([0.4]), low) == "yes (within chance)"  # one run has no spread
    assert side(0.8, 0.8, high, low) == side(0.8, 0.1, mean([]), low) == side(0.8, 0.1, low, low) == "-"
    assert side(0.1, 0.8, Share(1, 12), Share(11, 12)) == "yes"
    assert side(0.1, 0.8, Share(5, 12), Share(6, 12)) == "yes (within chance)"
    assert side(0.1, 0.8, Share(0, 0), Share(6, 12)) == "-"


def test_means_are_told_apart_as_scipy_does() -> None:
    one, other = [0.1, 0.2, 0.3], [0.5, 0.9, 0.7, 0.8]
    assert apart(mean(one), mean(other)) is bool(stats.ttest_ind(one, other, equal_var=False).pvalue < 0.05)
    assert apart(mean([0.5, 0.5]), mean([0.6, 0.6]))
    assert not apart(mean([0.5, 0.5]), mean([0.5, 0.5]))
    with pytest.raises(TypeError, match="cannot be compared"):
        apart(mean(one), Share(1, 2))


def test_thirds_are_those_of_the_paper() -> None:
    """LLaMA-2-7B: layers 0 to 10, 11 to 21, 22 to 31."""
    layers = [0.0] * 11 + [1.0] * 11 + [2.0] * 10
    assert pretrained.averages(layers) == [0.0, 1.0, 2.0]
    assert pretrained.rises(layers)
    assert pretrained.average([None, 1.0, 3.0]) == 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a Llama of three layers whose tokens are letters."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(set(pretrained.TEXT.read_text()))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: i for i, letter in enumerate(letters)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaModel(config).save_pretrained(path)
    return path


def test_a_folder_is_profiled_as_it_is_and_as_it_would_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "DATA", tmp_path)
    state = torch.get_rng_state()
    assert pretrained.main([str(folder)]) == 0
    (found,) = pretrained.kept()
    assert found == pretrained.measure(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.name, found.width, found.depth) == ("tiny", 16, 3)
    assert found.trained[32]["rank"][1:] == [16, 16]
    assert max(found.trained[8]["distinct_samples"]) <= 8 * pretrained.LENGTH
    assert found.trained[32]["near_unit_mass"] != found.untrained[32]["near_unit_mass"]
    assert len(pretrained.rows([found], {"near_unit_mass": (0.7, 0.6, 0.5)})) == 1


def test_a_kept_file_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "DATA", tmp_path)
    with pytest.raises(ConfigError, match="no pretrained model is kept"):
        pretrained.kept()
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "tiny.json").write_text(json.dumps({"schema": "another"}))
    with pytest.raises(ConfigError, match="profile the model again"):
        pretrained.kept()


def test_a_folder_without_a_model_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrained.main([str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert pretrained.main([str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
