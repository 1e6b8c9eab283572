"""Checkpoints of `torch.distributed.checkpoint`, written by it: in one process, and sharded over two."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict

from rksp_core.errors import CheckpointError, CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import FORMATS, dcp_folder, format_of, read_weights, step_of
from rksp_monitor.discovery import Scanner
from rksp_monitor.weights import load_into
from tests.monitor import tiny_model

ROOT = Path(__file__).parents[2]
HARMED = Path("/tmp/rksp-unpickled-what-it-must-not")


class _Harm:
    def __reduce__(self):
        return (Path.touch, (HARMED,))


def save(content: dict, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
        dcp.save(content, checkpoint_id=folder)
    return folder


@pytest.fixture(scope="module")
def trained() -> tuple[dict, dict]:
    """Weights and optimizer state after one step."""
    torch.manual_seed(1)
    model = tiny_model.build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8).reshape(2, 4)).square().sum().backward()
    optimizer.step()
    return get_state_dict(model, optimizer)


@pytest.fixture(scope="module")
def original(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights, state = trained
    return save({"model": weights, "optimizer": state, "harm": _Harm()}, tmp_path_factory.mktemp("run") / "step-100")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / original.name)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that two processes wrote."""
    run = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.monitor.each_shard", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, rank], cwd=ROOT, env=environment) for rank in ("0", "1")]
    assert [process.wait(120) for process in processes] == [0, 0]
    return run


def assert_same(read: dict, wanted: dict) -> None:
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert all(read[name].dtype == wanted[name].dtype for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("checkpoints/step-00000010", 10), ("checkpoint/step-20", 20)])
def test_shards_of_two_processes_are_put_together(sharded: Path, name: str, step: int):
    path = sharded / name
    assert len(list(path.glob("*.distcp"))) == 2
    assert (format_of(path), step_of(path)) == ("dcp", step)
    assert_same(read_weights(path), torch.load(sharded / "whole.pt"))
    scanner = Scanner(sharded)
    scanner.scan()
    assert [(seen.step, seen.complete) for seen in scanner.scan()] == [(10, True), (20, True)]


def test_a_folder_of_one_process_gives_its_model_alone(original: Path, trained):
    assert (format_of(original), step_of(original)) == ("dcp", 100)
    assert_same(read_weights(original), trained[0])
    module = tiny_model.build()
    load_into(module, read_weights(original), original.name)
    assert torch.equal(module.state_dict()["head.weight"], trained[0]["head.weight"])
    assert not HARMED.exists()


def test_no_byte_of_other_state_is_read(folder: Path, trained):
    """The pieces lie in one file; those that are no weights are overwritten before it is read."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    other = [info for index, info in metadata.storage_data.items() if not index.fqn.startswith("model.")]
    assert len(other) > 40
    for info in other:
        with (folder / info.relative_path).open("r+b") as stream:
            stream.seek(info.offset)
            stream.write(b"\xff" * info.length)
    assert_same(read_weights(folder), trained[0])


SHAPES = {
    "at the top": lambda weights: {**weights, "optimizer": {"state": {"a": torch.zeros(2)}}, "epoch": 3},
    "at the top, with optimizer tensors beside it": lambda weights: {**weights, "optimizer.a": torch.zeros(2)},
    "beside averaged weights": lambda weights: {"ema": {"model": {"a": torch.zeros(1)}}, "model": weights},
    "in another dictionary": lambda weights: {"app": {"model": weights, "optimizer": {"a": torch.zeros(2)}}},
    "under another name": lambda weights: {"state_dict": weights, "optimizer_states": [torch.zeros(2)]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_is_found(tmp_path: Path, shape: str):
    weights = {"embedding.weight": torch.rand(3, 2), "model.inner": torch.rand(2).bfloat16(), "count": torch.tensor(3)}
    assert_same(read_weights(save(SHAPES[shape](weights), tmp_path / "step-1")), weights)


def test_without_a_model_the_keys_are_named(tmp_path: Path):
    with pytest.raises(CorruptCheckpoint, match=r"holds no model \(found ema, lr\)"):
        read_weights(save({"ema": {"a": torch.zeros(1)}, "lr": 0.1}, tmp_path / "step-1"))


def test_it_is_complete_with_the_metadata_and_every_byte_it_names(folder: Path):
    shard, metadata = folder / "__0_0.distcp", folder / ".metadata"
    content, described = shard.read_bytes(), metadata.read_bytes()
    metadata.unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"has no \.metadata yet"):
        read_weights(folder)
    assert [sighting.complete for sighting in Scanner(folder.parent).scan()] == [False]
    for length in (0, 1, len(described) // 2, len(described) - 1):
        metadata.write_bytes(described[:length].rstrip(b"."))
        with pytest.raises(IncompleteCheckpoint, match="cut short"):
            read_weights(folder)
    metadata.write_bytes(described)
    for length in (0, 1, len(content) - 1):
        shard.write_bytes(content[:length])
        with pytest.raises(IncompleteCheckpoint, match=f"has {length} of {len(content)} bytes"):
            read_weights(folder)
    shard.unlink()
    with pytest.raises(IncompleteCheckpoint, match="not there yet"):
        read_weights(folder)
    shard.write_bytes(content)
    assert dcp_folder.is_complete(folder)
    shutil.rmtree(folder)
    with pytest.raises(ExpiredCheckpoint):
        FORMATS["dcp"].is_complete(folder)


def test_a_shard_that_is_no_tensor_is_refused(folder: Path):
    """`_Harm` lies in the shard as the trainer put it there; here the metadata calls it the embedding."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    harm = metadata.storage_data[MetadataIndex("harm")]
    (embedding,) = [index for index in metadata.storage_data if index.fqn == "model.embedding.weight"]
    metadata.storage_data[embedding] = harm
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpoint, match="objects other than tensors"):
        read_weights(folder)["embedding.weight"]
    assert not HARMED.exists()


HOSTILE = {
    "runs code": pickle.dumps(_Harm()),
    "runs code inside metadata": pickle.dumps(Metadata({}, _Harm(), {})),
    "an import alone": b"cos\nsystem\n.",
    "a name of DCP that is a function": b"ctorch.distributed.checkpoint.metadata\nfield\n.",
    "a name reached by dots": b"\x80\x04\x8c\x05torch\x8c\x0cSize.__add__\x93.",
    "eight bytes for 64 GiB": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a buffer of 64 GiB": b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.",
    "a class made another": b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x05state\x8c\x01xs\x86b.",
    "a builtin made another": b"ctorch\nSize\nN}\x8c\x05count\x8c\x01xs\x86b.",
    "no metadata": pickle.dumps({"model": 1}),
    "empty": pickle.dumps(Metadata({}, {}, {})),
    "a shard elsewhere": pickle.dumps(Metadata({}, {}, {MetadataIndex("a"): _StorageInfo("../../secret", 0, 1)})),
    "an endless offset": pickle.dumps(Metadata({}, {}, {MetadataIndex("a"): _StorageInfo("a.distcp", 10**5000, 1)})),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_metadata_that_is_hostile_or_damaged_is_one_sentence(folder: Path, content: bytes):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)
    assert not HARMED.exists()


def test_what_is_refused_is_named(folder: Path):
    (folder / ".metadata").write_bytes(HOSTILE["an import alone"])
    with pytest.raises(CorruptCheckpoint, match=r"names os\.system, which no checkpoint needs"):
        read_weights(folder)


@settings(max_examples=300)
@given(data=st.data())
def test_no_damage_makes_anything_but_a_checkpoint_error(original: Path, tmp_path_factory, data: st.DataObject):
    content = bytearray((original / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = shutil.copytree(original, tmp_path_factory.mktemp("fuzz") / "step-100")
    (folder / ".metadata").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_weights(folder)
