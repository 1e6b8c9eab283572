"""Formats on real files: every prefix of a checkpoint is incomplete, every lie in a header is one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ExpiredCheckpoint
from rksp_monitor.checkpoints import FORMATS, format_of, read_weights, step_of
from rksp_monitor.checkpoints.names import is_candidate, step_in
from rksp_monitor.checkpoints.safetensors_file import is_complete
from rksp_monitor.weights import load_into
from tests.core.profiles import profile
from tests.monitor import tiny_model


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000100", 100),
        ("step-100.safetensors", 100),
        ("step_100.pt", 100),
        ("checkpoint-100.pt", 100),
        ("checkpoint-1000", 1000),
        ("global_step500", 500),
        ("iter_0000007", 7),
        ("epoch=3-step=1200.ckpt", 1200),
        ("epoch_3_step_1200.ckpt", 1200),
        ("model-250.safetensors", 250),
        ("ckpt_9.pth", 9),
        ("gpt2.safetensors", None),
        ("model.safetensors", None),
        ("latest", None),
        ("checkpoint-20261122030900.pt", None),  # a time: after such a step every other one would be late
    ],
)
def test_the_step_in_a_name(name: str, step: int | None):
    assert step_in(name) == step


def test_steps_are_numbers():
    names = ["step-1000", "step-999", "step-20"]
    assert sorted(names, key=step_in) == ["step-20", "step-999", "step-1000"]


@pytest.mark.parametrize(
    "name",
    [
        ".step-100.tmp",
        "tmp-checkpoint-100",
        "step-100.safetensors.tmp",
        "optimizer-100.pt",
        "step-100-optimizer.pt",
        "optim_100.pt",
        "training_state.pt",
        "step-100.training_state.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "random_states_0.pkl",
        "scaler.pt",
        "model-00001-of-00002.safetensors",
        "step-5.orbax-checkpoint-tmp",
        "step-5.incomplete",
    ],
)
def test_other_state_and_temporary_names_are_no_checkpoints(name: str):
    assert not is_candidate(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "step-100.safetensors"
    save_file(tiny_model.weights(1), path)
    return path


def test_every_prefix_of_a_safetensors_file_is_incomplete(file: Path):
    content = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:length])
        assert not is_complete(file)
    file.write_bytes(content)
    assert is_complete(file)


def test_a_file_that_was_given_its_size_first_is_incomplete(file: Path):
    file.write_bytes(bytes(file.stat().st_size))
    # Eight zero bytes say: a header of length 0.
    with contextlib.suppress(CorruptCheckpoint):
        assert not is_complete(file)


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "header of 2^64 - 1 bytes": header({}, length=2**64 - 1),
    "header of a gigabyte": header({}, length=10**9),
    "no JSON": header(b"\xff{{"),
    "deep JSON": header(b"[" * 50_000),
    "a list": header([]),
    "metadata is a word": header({"__metadata__": "x"}),
    "entry is a number": header({"a": 1}),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}),
    "unknown dtype": header({"a": GOOD | {"dtype": "F31"}}, bytes(8)),
    "dtype is a list": header({"a": GOOD | {"dtype": []}}, bytes(8)),
    "negative shape": header({"a": GOOD | {"shape": [-2]}}, bytes(8)),
    "shape overflows": header({"a": GOOD | {"shape": [2**62, 2**62]}}, bytes(8)),
    "shape disagrees": header({"a": GOOD | {"shape": [3]}}, bytes(8)),
    "offsets reversed": header({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8)),
    "three offsets": header({"a": GOOD | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "true as an offset": header({"a": GOOD | {"data_offsets": [False, 8]}}, bytes(8)),
    "overlap": header({"a": GOOD, "b": GOOD}, bytes(16)),
    "hole": header({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, bytes(20)),
    "a million dimensions": header({"a": GOOD | {"shape": [9] * 2_000_000}}, bytes(8)),
    "sizes of 4000 digits": header({"a": GOOD | {"shape": [10**4000] * 1000, "data_offsets": [0, 10**4000]}}, bytes(8)),
    "bytes left over": header({"a": GOOD}, bytes(9)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_one_sentence(tmp_path: Path, content: bytes):
    path = tmp_path / "step-1.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint) as caught:
        is_complete(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@settings(max_examples=200)
@given(content=st.binary(max_size=200), position=st.integers(0, 400), flip=st.integers(1, 255))
def test_no_bytes_make_anything_but_a_checkpoint_error(tmp_path_factory, content: bytes, position: int, flip: int):
    path = tmp_path_factory.mktemp("fuzz") / "step-1.safetensors"
    damaged = bytearray(header({"a": GOOD}, bytes(8)))
    damaged[position % len(damaged)] ^= flip
    for bytes_ in (content, bytes(damaged)):
        path.write_bytes(bytes_)
        with contextlib.suppress(CheckpointError):
            read_weights(path)


def test_every_prefix_of_a_torch_file_is_incomplete(tmp_path: Path):
    path = tmp_path / "step_100.pt"
    torch.save({"model": tiny_model.weights(1)}, path)
    content = path.read_bytes()
    for length in [0, 1, 3, 4, 100, len(content) // 2, len(content) - 30]:
        path.write_bytes(content[:length])
        assert not FORMATS["torch"].is_complete(path)


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_a_torch_file_gives_its_model_alone(tmp_path: Path, key: str | None):
    path = tmp_path / "step_100.pt"
    weights = tiny_model.weights(1)
    content = weights if key is None else {key: weights, "optimizer": {"state": {0: torch.zeros(3)}}, "epoch": 1}
    torch.save(content, path)
    read = read_weights(path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


class _Harm:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/rksp-unpickled-what-it-must-not"),))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path):
    path = tmp_path / "step_100.pt"
    torch.save({"model": {"a": torch.zeros(1)}, "harm": _Harm()}, path)
    with pytest.raises(CorruptCheckpoint, match="objects other than tensors"):
        read_weights(path)
    assert not Path("/tmp/rksp-unpickled-what-it-must-not").exists()


def test_a_torch_file_that_is_no_archive_or_another_one_is_corrupt(tmp_path: Path):
    path = tmp_path / "step_100.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CorruptCheckpoint, match=r"since version 1\.6"):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptCheckpoint, match=r"no data\.pkl"):
        read_weights(path)
    torch.save([1, 2, 3], path)
    with pytest.raises(CorruptCheckpoint, match="no state dict"):
        read_weights(path)


def test_a_step_folder_reads_its_weights(tmp_path: Path):
    folder = tiny_model.save_folder(tmp_path, 100)
    assert format_of(folder) == "folder"
    assert step_of(folder) == 100
    assert "embedding.weight" in read_weights(folder)


def test_a_step_folder_of_torch_files_gives_its_model_alone(tmp_path: Path):
    folder = tmp_path / "step-00000100"
    folder.mkdir()
    torch.save({"model": tiny_model.weights(1)}, folder / "model.pt")
    torch.save({"optimizer": {"state": {}}, "weights": tiny_model.weights(2)}, folder / "training_state.pt")
    assert format_of(folder) == "folder"
    assert torch.equal(read_weights(folder)["embedding.weight"], tiny_model.weights(1)["embedding.weight"])


def test_a_step_can_stand_in_metadata(tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"step": "70"})
    assert step_of(tmp_path / "model.safetensors") == 70
    folder = tmp_path / "latest"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "checkpoint.json").write_text('{"step": 90}')
    assert step_of(folder) == 90


def test_a_profile_is_one_only_in_its_folder(tmp_path: Path):
    (tmp_path / "profiles").mkdir()
    for folder in (tmp_path, tmp_path / "profiles"):
        profile().save(folder / "step-10.json")
    assert format_of(tmp_path / "step-10.json") is None
    inside = tmp_path / "profiles" / "step-10.json"
    assert format_of(inside) == "profile"
    content = inside.read_text()
    inside.write_text(content[: len(content) // 2])
    assert not FORMATS["profile"].is_complete(inside)
    inside.write_text('{"schema": "other"}')
    with pytest.raises(CorruptCheckpoint, match="schema"):
        FORMATS["profile"].is_complete(inside)


def test_a_document_that_is_too_large_is_not_read(tmp_path: Path):
    """Files of a gigabyte, without a byte on the disk."""
    folder = tmp_path / "best"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "step-1").mkdir()
    index, profile = tmp_path / "step-1" / "model.safetensors.index.json", tmp_path / "profiles" / "step-1.json"
    for file in (folder / "checkpoint.json", index, profile):
        file.touch()
        os.truncate(file, 2**30)
    tracemalloc.start()
    try:
        assert step_of(folder) is None
        for path in (index.parent, profile):
            with pytest.raises(CorruptCheckpoint, match="has 1024 MiB, and a JSON document of at most 32 is read"):
                FORMATS[format_of(path)].is_complete(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["step-1.safetensors", "step-1.pt", "step-1"])
def test_what_is_gone_is_expired(tmp_path: Path, name: str):
    with pytest.raises(ExpiredCheckpoint):
        read_weights(tmp_path / name)
    known = {"step-1.safetensors": "safetensors", "step-1.pt": "torch", "step-1": "folder"}[name]
    with pytest.raises(ExpiredCheckpoint):
        FORMATS[known].is_complete(tmp_path / name)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str):
    module, weights = tiny_model.build(), tiny_model.weights(7)
    load_into(module, {prefix + name: value for name, value in weights.items()}, "x")
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert torch.equal(state["head.weight"], weights["embedding.weight"])


def test_a_checkpoint_of_another_model_is_named_and_changes_nothing():
    module = tiny_model.build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = tiny_model.weights(7)
    del weights["blocks.0.up.weight"]
    weights["extra"] = torch.zeros(1)
    weights["blocks.1.up.weight"] = torch.zeros(2, 2)
    with pytest.raises(CorruptCheckpoint) as caught:
        load_into(module, weights, "step-7")
    for part in ("missing blocks.0.up.weight", "unexpected extra", "blocks.1.up.weight is (2, 2), expected (32, 16)"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_of_another_dtype_are_converted():
    module = tiny_model.build()
    load_into(module, {name: value.bfloat16() for name, value in tiny_model.weights(7).items()}, "x")
    assert module.state_dict()["embedding.weight"].dtype == torch.float32
