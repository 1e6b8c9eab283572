"""``rksp profile``, ``rksp compare`` and ``rksp doctor`` on real checkpoints."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from rksp_core.compare import compare
from rksp_core.errors import ProfileError
from rksp_core.profile import ModelProfile
from rksp_monitor.cli import run
from rksp_monitor.report.profile import comparison_table
from tests.core.profiles import profile
from tests.monitor import tiny_model

FLAGS = ["--model", "tests.monitor.tiny_model:build", "--samples", "256", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model.save_folder(tmp_path, 100)
    tiny_model.save_folder(tmp_path, 200, scale=6.0)
    return tmp_path / "checkpoints"


def test_a_checkpoint_gives_a_profile_document(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["profile", str(folder / "step-00000100"), *FLAGS, "--format", "json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["schema"] == "rksp.profile/1"
    assert document["step"] == 100
    assert [layer["layer"] for layer in document["layers"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert "random tokens" in said.err


def test_the_table_names_every_layer(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["profile", str(folder / "step-00000100"), *FLAGS]) == 0
    table = capsys.readouterr().out
    assert all(f"blocks.{index}" in table for index in range(3))
    assert "(step 100)" in table
    assert "largest spectral norm of a weight matrix: " in table


def test_deepspeed_is_profiled_where_it_is_allowed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    deepspeed = tmp_path / "global_step100"
    deepspeed.mkdir()
    module = tiny_model.build().state_dict()
    torch.save({"module": module, "dp_world_size": 1, "ds_config": {}}, deepspeed / "mp_rank_00_model_states.pt")
    assert run(["profile", str(deepspeed), *FLAGS]) == 2
    assert "allow it with --trust-pickle" in capsys.readouterr().err
    assert run(["profile", str(deepspeed), *FLAGS, "--trust-pickle"]) == 0
    assert run(["compare", str(folder / "step-00000100"), str(deepspeed), *FLAGS, "--trust-pickle"]) == 0


def test_a_profile_file_serves_as_a_baseline(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = tmp_path / "before.json"
    assert (
        run(["profile", str(folder / "step-00000100"), *FLAGS, "--format", "json", "--output-file", str(before)]) == 0
    )
    arguments = [str(before), str(folder / "step-00000200"), *FLAGS]
    assert run(["compare", *arguments, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "rksp.compare/1"
    stored = ModelProfile.load(before)
    for layer, old in zip(document["layers"], stored.layers, strict=True):
        assert layer["baseline"]["spectral_radius"] == old.spectral_radius
        assert layer["change"]["spectral_radius"] == layer["spectral_radius"] - old.spectral_radius
    assert any("blocks.1" in sentence for sentence in document["explanation"])
    assert run(["compare", *arguments]) == 0
    table = capsys.readouterr().out
    assert "most in blocks.1" in table
    assert "near: near-unit mass; expan: expansive mass; " in table
    narrow = comparison_table(compare(stored, ModelProfile.load(before)), "title", width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "left out for want of room: contr, " in " ".join(narrow.split())


def test_a_checkpoint_is_where_it_was(folder: Path, capsys: pytest.CaptureFixture[str]):
    same = str(folder / "step-00000100")
    assert run(["compare", same, same, *FLAGS]) == 0
    assert "no layer moved" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused():
    for other, message in (
        (profile(probe="bb"), "the baseline is on probe aa, the other on bb"),
        (profile(settings={"eps": 1e-3}), "the baseline was made with eps 1e-05, the other with 0.001"),
        (profile(layers=2), "the baseline has 3 layers"),
    ):
        with pytest.raises(ProfileError, match=message):
            compare(profile(), other)


def test_a_profile_without_any_number_is_inconclusive(tmp_path: Path):
    path = tmp_path / "step-1.json"
    profile(near_unit_mass=None, status=("not_finite",)).save(path)
    assert run(["profile", str(path)]) == 3


def test_a_checkpoint_of_hugging_face_says_itself_which_model_it_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "hf" / "checkpoint-30"
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=64, n_positions=64))
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 30}')
    capsys.readouterr()
    assert run(["profile", str(folder), "--samples", "64", "--device", "cpu", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["step"] == 30
    assert [layer["layer"] for layer in document["layers"]] == ["transformer.h.0", "transformer.h.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", *FLAGS], "there is no profile or checkpoint nowhere"),
        (["{folder}/step-00000100"], "give --model"),
        (["{folder}/step-00000100/model.safetensors", *FLAGS], "is no checkpoint"),
        (["{folder}/step-00000100", *FLAGS, "--arg", "width=8"], "does not fit the model: shapes: embedding.weight"),
        (["{folder}/step-00000100", *FLAGS, "--output-file", "nowhere/x.json"], "cannot be written"),
        (["missing.json"], "there is no profile or checkpoint missing.json"),
        (["{folder}/step-00000100", *FLAGS, "--arg", "width=10000000000"], "out of memory on cpu; lower --samples"),
    ],
)
def test_a_mistake_is_one_sentence(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["profile", *(argument.format(folder=folder) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_doctor_says_what_is_there_and_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run(["doctor", str(folder.parent), "--listen", address]) == 2
    said = capsys.readouterr().out
    assert f"FAIL  {address} is not free" in said
    assert "2 checkpoints and profiles, steps 100 to 200" in said
    assert run(["doctor", "--listen", "127.0.0.1:0"]) == 0
