"""Files of `torch.save`, read without running their pickles: torch's own reader is the oracle."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pickle
import sys
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rksp_core.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import FORMATS, read_weights
from rksp_monitor.weights import load_into
from tests.monitor import tiny_model

BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)
KINDS = {
    "a matrix": BASE,
    "transposed": BASE.t(),
    "a part of a larger storage": BASE[1:3, 2:5],
    "expanded": torch.ones(1, 3).expand(5, 3),
    "of no dimension": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "a parameter": nn.Parameter(torch.rand(2)),
    "a buffer": nn.Buffer(torch.rand(2)),
    **{
        str(dtype): torch.ones(3).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
        )
    },
}


def save(content: object, folder: Path, name: str = "step-1.pt", **options: object) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def packed(folder: Path, replace: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a checkpoint again as a stranger would: some members replaced, or all of them compressed."""
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(3, 5)}, "note": "x"}, buffer)
    path = folder / "step-1.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", compression) as target:
        for member in source.namelist():
            name = member.partition("/")[2]
            target.writestr(member, replace.get(name, source.read(member)))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_of_every_kind_are_read_as_torch_reads_them(tmp_path: Path, kind: str, protocol: int):
    path = save({"model": {"a": KINDS[kind]}}, tmp_path, pickle_protocol=protocol)
    read, wanted = read_weights(path)["a"], torch.load(path, weights_only=False)["model"]["a"].detach()
    assert (read.dtype, read.shape, read.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert read.tolist() == wanted.tolist()


def test_no_byte_of_other_state_is_read(tmp_path: Path):
    """The optimizer's bytes are overwritten before the file is read; the model's are checked against their sums."""
    other = torch.full((1000,), 3.25)
    path = save({"model": tiny_model.weights(1), "optimizer": {"a": other}}, tmp_path)
    content = path.read_bytes()
    at = content.index(other.numpy().tobytes())
    path.write_bytes(content[:at] + b"\xff" * 4000 + content[at + 4000 :])
    read, wanted = read_weights(path), tiny_model.weights(1)
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)


def test_loading_takes_the_memory_of_one_tensor(tmp_path: Path):
    module = nn.Sequential(*(nn.Linear(200, 200) for _ in range(20)))  # 20 matrices of 160 kB
    path = save({"model": module.state_dict(), "optimizer": torch.zeros(10**7)}, tmp_path)
    load_into(module, read_weights(path), "x")  # what is imported and cached on the way is paid here
    tracemalloc.start()
    load_into(module, read_weights(path), "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 160_000  # a matrix, the matrix before it, and the names


VALUES = {
    "arguments": argparse.Namespace(lr=0.1),
    "numpy's": {"loss": np.float64(0.5), "state": np.arange(3)},
    "a path": Path("x"),
    "collections": {"a": collections.defaultdict(list), "b": collections.Counter("aab"), "c": collections.deque([1])},
    "random state": {"torch": torch.get_rng_state(), "numpy": np.random.RandomState(0).get_state()},
    "a set": {1, 2},
}


@pytest.mark.parametrize("value", VALUES)
def test_values_beside_the_model_do_no_harm(tmp_path: Path, value: str):
    path = save({"model": {"a": torch.ones(2)}, "other": VALUES[value]}, tmp_path)
    assert torch.equal(read_weights(path)["a"], torch.ones(2))


class _Harm:
    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self):
        return (Path.touch, (self.at,))


def test_trust_looks_past_objects_and_runs_nothing(tmp_path: Path):
    path = save({"model": {"a": torch.ones(2)}, "harm": _Harm(tmp_path / "harmed")}, tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"objects other than tensors .*getattr.* --trust-pickle"):
        read_weights(path)
    assert torch.equal(read_weights(path, trust_pickle=True)["a"], torch.ones(2))
    assert not (tmp_path / "harmed").exists()


def test_a_class_of_the_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("my_trainer")
    module.Config = type("Config", (), {"__module__": "my_trainer"})
    monkeypatch.setitem(sys.modules, "my_trainer", module)
    path = save({"model": {"a": torch.ones(2)}, "config": module.Config()}, tmp_path)
    monkeypatch.delitem(sys.modules, "my_trainer")  # the watcher need not have it
    with pytest.raises(CorruptCheckpoint, match=r"my_trainer\.Config"):
        read_weights(path)
    assert set(read_weights(path, trust_pickle=True)) == {"a"}


def test_tensors_of_other_classes_are_named(tmp_path: Path):
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CorruptCheckpoint, match=r"a cannot be read: it is a sparse_tensor"):
        read_weights(save({"model": {"a": sparse, "b": torch.ones(1)}}, tmp_path))


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path):
    path = save({"model": {"a": torch.full((100,), 1.5)}}, tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((100,), 1.5).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="does not match its checksum"):
        read_weights(path)["a"]


def test_checksums_can_be_off(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"model": {"a": torch.ones(2)}}, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(path)["a"], torch.ones(2))


def pickled(changed: dict[bytes, bytes]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(3, 5)}, "note": "x"}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    for old, new in changed.items():
        assert content.count(old) == 1
        content = content.replace(old, new)
    return content


SIZE, NOTE = b"K\x03K\x05\x86", b"X\x01\x00\x00\x00x"
DEEP = b"q\x64" + b"".join(b"h\x64h\x64\x86q\x64" for _ in range(60))  # pairs of pairs: hashing it takes 2^60 steps
HOSTILE = {
    "a shape that is not in the file": {SIZE: b"J\xff\xff\xff\x7fK\x05\x86"},
    "a shape of 2^60 elements": {SIZE: b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x10K\x05\x86"},
    "a negative shape": {SIZE: b"J\xff\xff\xff\xffK\x05\x86"},
    "a shape that is no number": {SIZE: b"NK\x05\x86"},
    "a storage elsewhere": {b"X\x01\x00\x00\x000": b"X\x0c\x00\x00\x00../../secret"},
    "elements that torch does not have": {b"ctorch\nFloatStorage": b"ctorch\nQInt8Storage"},
    "a key that is never hashed": {NOTE: b"}" + b"K\x01" + DEEP + b"K\x01s"},
    "a text of 4 GiB": {NOTE: b"X\xff\xff\xff\xffx"},
}


@pytest.mark.parametrize("changed", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_pickle_is_one_sentence_and_costs_nothing(tmp_path: Path, changed: dict[bytes, bytes]):
    path = packed(tmp_path, {"data.pkl": pickled(changed)})
    tracemalloc.start()
    with pytest.raises(CorruptCheckpoint) as caught:
        read_weights(path)["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 3 * 2**20


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path):
    gigabyte = 2**26  # bytes of zeros here, which pack a thousandfold
    for replace in ({"data.pkl": bytes(gigabyte)}, {"data/0": bytes(gigabyte)}):
        path = packed(tmp_path, replace, zipfile.ZIP_DEFLATED)
        tracemalloc.start()
        with pytest.raises(CorruptCheckpoint, match="packed"):
            read_weights(path)["a"]
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
        tracemalloc.stop()


@pytest.mark.parametrize("piece", [b"]", b"N\x94", b"(", b")\x85"])
def test_a_pickle_of_nothing_but_objects_ends_soon(tmp_path: Path, piece: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rksp_monitor.checkpoints.inert_pickle.MOST_OBJECTS", 10_000)  # 10^7 take seconds
    with pytest.raises(CorruptCheckpoint, match="more than 10000 objects"):
        read_weights(packed(tmp_path, {"data.pkl": b"\x80\x04" + piece * 20_000 + b"."}))


@pytest.fixture(scope="module")
def content() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.rand(3, 5)}, "epoch": 1}, buffer)
    return buffer.getvalue()


@settings(max_examples=300)
@given(data=st.data())
def test_no_damage_makes_anything_but_a_checkpoint_error(content: bytes, tmp_path_factory, data: st.DataObject):
    damaged = bytearray(content[: data.draw(st.integers(1, len(content)) | st.just(len(content)))])
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "step-1.pt"
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        dict(read_weights(path))


def test_what_changes_while_it_is_read(tmp_path: Path):
    weights = tiny_model.weights(1)
    path = save({"model": weights}, tmp_path)
    read = read_weights(path)
    path.rename(tmp_path / "older.pt")
    save({"model": tiny_model.weights(2)}, tmp_path)
    assert all(torch.equal(read[name], weights[name]) for name in weights)  # replaced, or removed: read as it was
    read = read_weights(path)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(IncompleteCheckpoint, match="was written to while it was read"):
        dict(read)


def test_lightning_writes_the_model_under_a_prefix(tmp_path: Path):
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})
            self.model = torch.compile(tiny_model.build(), backend="eager")
            self.judge = nn.Linear(2, 2)  # beside the model

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    task = Task()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is `srun`, or a GPU, on this machine
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, max_steps=0
        )
    trainer.strategy.connect(task)
    path = tmp_path / "epoch=0-step=12.ckpt"
    trainer.save_checkpoint(path)
    assert FORMATS["torch"].step(path) == 12
    module = tiny_model.build()
    load_into(module, read_weights(path), path.name)
    wanted = task.model._orig_mod.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())


def test_a_pickle_from_before_zip_archives_is_refused(tmp_path: Path):
    (tmp_path / "step-1.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(CorruptCheckpoint, match=r"since version 1\.6"):
        FORMATS["torch"].is_complete(tmp_path / "step-1.pt")
