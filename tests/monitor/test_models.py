"""The MODEL argument: factories, Hugging Face folders, trainers' configurations, and what is said of wrong ones."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from rksp_core.errors import ModelError
from rksp_monitor.models import load_model


def test_a_factory_is_imported_called_and_described() -> None:
    model = load_model("tests.monitor.factories:tiny", arguments={"depth": 2})
    assert (model.kind, model.weights, model.vocabulary) == ("factory", "random", 32)
    assert len(model.module.blocks) == 2
    assert not model.module.training


def test_the_seed_decides_the_weights_and_random_states_stay_as_they_were() -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    first, again, other = (load_model("tests.monitor.factories:tiny", seed=seed).module for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no.such.package:make", "no module 'no' is installed"),
        ("tests.monitor.nowhere:make", "no module 'tests.monitor.nowhere'"),
        ("tests.monitor.factories:nowhere", "has no 'nowhere'; it offers"),
        ("tests.monitor.factories:NOT_CALLABLE", "is a int, expected a callable"),
        ("tests.monitor.factories:raises", "raised ValueError: width 16 is odd today (factories.py, line"),
        ("tests.monitor.factories:exits", "raised SystemExit: 1"),
        ("tests.monitor.factories:text", "returned a str, expected a torch.nn.Module"),
        ("gpt2", "MODEL is package.module:factory"),
        (":make", "expected package.module:name"),
        ("nowhere.yaml", "nowhere.yaml cannot be read: No such file"),
        ("nowhere.json", "nowhere.json does not exist"),
    ],
)
def test_a_bad_source_is_one_sentence(source: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(source)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_factory_arguments_name_the_exception() -> None:
    with pytest.raises(ModelError, match=r"raised TypeError.*'depht'"):
        load_model("tests.monitor.factories:tiny", arguments={"depht": 2})


def test_a_module_that_fails_to_import_shows_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_written.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"importing half_written raised ModuleNotFoundError.*no_such_library"):
        load_model("half_written:make")


def test_a_trainers_yaml_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    (project / "their_package.py").write_text(
        "from torch import nn\n\ndef make(width):\n    return nn.Linear(width, width)\n"
    )
    config = project / "runs" / "run.yaml"
    config.write_text(yaml.safe_dump({"model": {"factory": "their_package:make", "arguments": {"width": 3}}, "lr": 1}))
    monkeypatch.chdir(tmp_path)
    model = load_model(str(config), arguments={"width": 5})  # --arg overrides the file
    assert model.kind == "trainer"
    assert isinstance(model.module, nn.Linear)
    assert model.module.in_features == 5


@pytest.mark.parametrize(
    "content", ["{", "- 1", "model: 3", "model: {factory: 3}", "model: {factory: 'a:b', arguments: [1]}"]
)
def test_a_yaml_without_a_model_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


class TestHuggingFace:
    """A folder is read offline, with its weights when they are safetensors."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
        config.save_pretrained(tmp_path)
        return tmp_path

    def test_a_configuration_gives_seeded_random_weights(self, folder: Path) -> None:
        first, again = load_model(str(folder)), load_model(str(folder / "config.json"))
        assert (first.weights, first.vocabulary, first.max_length) == ("random", 50, 32)
        assert type(first.module).__name__ == "GPT2LMHeadModel"
        assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))

    def test_arguments_replace_fields_of_the_configuration(self, folder: Path) -> None:
        assert len(load_model(str(folder), arguments={"n_layer": 1}).module.transformer.h) == 1
        with pytest.raises(ModelError, match="has no field 'n_layers'"):
            load_model(str(folder), arguments={"n_layers": 1})

    def test_weights_are_read_where_they_are_safetensors(self, folder: Path) -> None:
        made = load_model(str(folder), seed=7).module
        made.save_pretrained(folder)
        read = load_model(str(folder), seed=8)
        assert read.weights == "pretrained"
        assert read.warnings == ()
        assert torch.equal(read.module.transformer.wte.weight, made.transformer.wte.weight)
        fresh = load_model(str(folder / "config.json"), seed=8)
        assert fresh.weights == "random"

    def test_weights_that_are_missing_are_a_warning(self, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        load_model(str(folder)).module.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        del weights["transformer.h.1.mlp.c_fc.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (warning,) = load_model(str(folder)).warnings
        assert "transformer.h.1.mlp.c_fc.weight" in warning

    def test_a_pickle_is_refused_unread(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(ModelError, match=r"as a pickle \(pytorch_model.bin\).*config.json"):
            load_model(str(folder))

    def test_an_encoder_is_loaded_as_one(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        transformers.BertConfig(
            num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50
        ).save_pretrained(tmp_path)
        assert type(load_model(str(tmp_path)).module).__name__ == "BertModel"

    @pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "unheard_of"}'])
    def test_a_damaged_configuration_is_one_sentence(self, tmp_path: Path, content: str) -> None:
        pytest.importorskip("transformers")
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError) as caught:
            load_model(str(tmp_path))
        assert "\n" not in str(caught.value)

    def test_an_empty_folder_says_what_is_missing(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(ModelError, match=r"config.json does not exist"):
            load_model(str(tmp_path))
