"""Folders of weights: what real writers leave, and what they leave for a moment.

Hugging Face's folders are written by transformers, shards by `torch.distributed.checkpoint`. What OLMo-core,
Lightning and Megatron write around the shards, and all of orbax's and Levanter's, is laid out by hand.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from upath import UPath

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint, UnsupportedCheckpoint
from rksp_monitor.checkpoints import FORMATS, configuration_of, dcp_folder, format_of, outside, read_weights, step_of
from rksp_monitor.discovery import Scanner
from rksp_monitor.weights import load_into
from tests.monitor import tiny_model

WEIGHTS = tiny_model.weights(1)


def is_complete(path: Path):
    return FORMATS[format_of(path)].is_complete(path)


def loaded(path: Path) -> dict:
    module = tiny_model.build()
    load_into(module, read_weights(path), path.name)
    return module.state_dict()


def assert_loads(path: Path) -> None:
    state = loaded(path)
    assert all(torch.equal(state[name], value) for name, value in WEIGHTS.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint-100/ of a small GPT-2 in shards, as the Trainer leaves it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    folder = tmp_path_factory.mktemp("run") / "checkpoint-100"
    GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="8KB")
    (folder / "trainer_state.json").write_text('{"global_step": 100}')
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / trained.name)


def test_shards_of_hugging_face_are_put_together(folder: Path):
    from transformers import AutoModelForCausalLM

    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (format_of(folder), step_of(folder)) == ("folder", 100)
    assert configuration_of(folder) == folder / "config.json"
    assert is_complete(folder)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    module = AutoModelForCausalLM.from_config(wanted.config)
    load_into(module, read_weights(folder), folder.name)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in wanted.state_dict().items())
    inner = module.transformer.state_dict()
    module.transformer.apply(lambda part: [value.data.zero_() for value in part.parameters(recurse=False)])
    load_into(module.transformer, read_weights(folder), folder.name)  # the model without its head
    assert all(torch.equal(value, inner[name]) for name, value in module.transformer.state_dict().items())


def test_what_the_trainer_of_transformers_writes(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    options = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "max_steps": 2, "save_steps": 1}
    tokens = torch.arange(8)
    data = [{"input_ids": tokens, "labels": tokens}] * 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its data loader would pin memory, were there a GPU
        Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=data).train()
    assert sorted(step_of(path) for path in tmp_path.iterdir() if format_of(path)) == [1, 2]
    folder = tmp_path / "checkpoint-2"
    assert is_complete(folder)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.apply(lambda part: [value.data.zero_() for value in part.parameters(recurse=False)])
    load_into(model, read_weights(folder), folder.name)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    (folder / "trainer_state.json").unlink()
    assert not is_complete(folder)


def accelerated(run: Path, kind: str = "SHARDED_STATE_DICT") -> tuple[Path, Path]:
    """checkpoint-1000/ of the Trainer under FSDP: accelerate writes model and optimizer, each into its own folder."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

    folder, module = run / "checkpoint-1000", tiny_model.build()
    load_into(module, WEIGHTS, "WEIGHTS")
    optimizer, plugin = torch.optim.AdamW(module.parameters()), FullyShardedDataParallelPlugin(fsdp_version=2)
    module(torch.arange(8).reshape(2, 4)).sum().backward()
    plugin.set_state_dict_type(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
        save_fsdp_model(plugin, Accelerator(cpu=True), module, str(folder))
        save_fsdp_optimizer(plugin, Accelerator(cpu=True), optimizer, module, str(folder))
    AcceleratorState._reset_state(reset_partial_state=True)
    (folder / "trainer_state.json").write_text('{"global_step": 1000}')
    return folder, folder / "pytorch_model_fsdp_0" / ".metadata"


def test_shards_of_accelerate_are_the_weights_of_their_checkpoint(tmp_path: Path):
    folder, last = accelerated(tmp_path)
    assert {path.name for path in folder.iterdir()} >= {"pytorch_model_fsdp_0", "optimizer_0"}
    assert (format_of(folder), step_of(folder)) == ("fsdp", 1000)
    (sighting,) = Scanner(tmp_path).scan()
    assert (sighting.path, sighting.format, sighting.settling) == (folder, "fsdp", True)
    assert_loads(folder)
    last.unlink()
    assert "has no .metadata yet" in is_complete(folder).problem
    shutil.rmtree(last.parent)
    with pytest.raises(ExpiredCheckpoint):
        FORMATS["fsdp"].weights(folder)


def test_what_the_trainer_writes_after_its_shards_makes_no_other_checkpoint(tmp_path: Path):
    """It would be judged twice: the optimizer takes longer than the weights, and ``trainer_state.json`` comes last."""
    folder, _ = accelerated(tmp_path)
    (folder / "trainer_state.json").unlink()
    scanner = Scanner(tmp_path)
    (before,) = scanner.scan()
    (folder / "trainer_state.json").write_text('{"global_step": 1000}')
    (after,) = scanner.scan()
    assert before.fingerprint == after.fingerprint


def test_fsdp_in_one_file_is_read_and_a_file_a_rank_is_not(tmp_path: Path):
    folder, _ = accelerated(tmp_path, "FULL_STATE_DICT")
    assert_loads(folder)
    (folder / "pytorch_model_fsdp.bin").rename(folder / "pytorch_model_fsdp_rank0.bin")
    with pytest.raises(UnsupportedCheckpoint, match="SHARDED_STATE_DICT"):
        read_weights(folder)


def test_it_is_complete_with_every_shard_and_the_file_of_the_trainer(folder: Path):
    (shard, *_) = sorted(folder.glob("model-*.safetensors"))
    content, state = shard.read_bytes(), folder / "trainer_state.json"
    assert shard in FORMATS["folder"].files(folder)
    assert state in FORMATS["folder"].files(folder)
    state.unlink()
    assert "has no trainer_state.json yet" in is_complete(folder).problem
    shard.write_bytes(content[:-1])
    assert f"has {len(content) - 1} of {len(content)} bytes" in is_complete(folder).problem
    shard.unlink()
    assert "not there yet" in is_complete(folder).problem
    with pytest.raises(IncompleteCheckpoint):
        read_weights(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    assert "no complete JSON document" in is_complete(folder).problem


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, "expected a file beside it"),
        ({"weight_map": {"a": ["b"]}}, "expected a file beside it"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
        ({"weight_map": {"a\nb": "one.safetensors"}}, "does not hold it"),
    ],
)
def test_a_hostile_index_is_one_sentence(tmp_path: Path, index: object, says: str):
    folder = tmp_path / "step-1"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match=says) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)


def test_pickled_shards_are_put_together(tmp_path: Path):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    names = list(WEIGHTS)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: WEIGHTS[name] for name in held}, folder / file)
    places = {name: file for file, held in parts.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert is_complete(folder)
    assert_loads(folder)


def save_shards(content: dict, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
        dcp.save(content, checkpoint_id=folder)
    return folder


def olmo(run: Path) -> tuple[Path, Path]:
    folder = run / "step1000"
    content = {"model": WEIGHTS, "optim": {"state": {name: {"exp_avg": value} for name, value in WEIGHTS.items()}}}
    save_shards(content, folder / "model_and_optim")
    (folder / "config.json").write_text("{}")
    (folder / ".metadata.json").write_text('{"version": "2.0.0"}')
    return folder, folder / ".metadata.json"


def lightning(run: Path) -> tuple[Path, Path]:
    folder = run / "epoch=0-step=1000.ckpt"
    save_shards({"model": {f"model.{name}": value for name, value in WEIGHTS.items()}}, folder)
    torch.save({"global_step": 1000}, folder / "meta.pt")
    return folder, folder / "meta.pt"


def megatron(run: Path) -> tuple[Path, Path]:
    folder = run / "iter_0001000"
    save_shards({**WEIGHTS, "optimizer": {"state": {"a": torch.zeros(2)}}, "rng_state": torch.zeros(2)}, folder)
    torch.save({"args": {}}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder, folder / "metadata.json"


@pytest.mark.parametrize(("write", "name"), [(olmo, "olmo"), (lightning, "lightning"), (megatron, "megatron")])
def test_shards_with_a_file_that_is_written_last(tmp_path: Path, write: Callable, name: str):
    folder, last = write(tmp_path)
    assert (format_of(folder), step_of(folder)) == (name, 1000)
    assert last in FORMATS[name].files(folder)
    assert_loads(folder)
    last.unlink()
    if name == "megatron":
        assert format_of(folder) == name  # by the file that is written first
    assert f"has no {last.name} yet" in is_complete(folder).problem
    next(folder.rglob("*.distcp")).unlink()
    assert not is_complete(folder)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        (_StorageInfo, "olmo_core.distributed.checkpoint.filesystem._StorageInfo"),
        (Metadata, "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"),
    ],
)
def test_their_own_classes_in_the_metadata_are_known(tmp_path: Path, monkeypatch, old: type, name: str):
    folder = save_shards({"model": WEIGHTS}, tmp_path / "step-1")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    module, _, own = name.rpartition(".")
    theirs = type(own, (old,), {"__module__": module})
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    for parent in parents:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    setattr(sys.modules[module], own, theirs)
    for record in [metadata, *metadata.storage_data.values()]:
        if type(record) is old:
            record.__class__ = theirs
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for parent in parents:
        monkeypatch.delitem(sys.modules, parent)
    assert_loads(folder)


FOREIGN = {
    "orbax": ("100/_CHECKPOINT_METADATA", "orbax checkpoint"),
    "orbax, an item": ("step_100/default/_METADATA", "orbax checkpoint"),
    "orbax on a bucket": ("step_100/commit_success.txt", "orbax checkpoint"),
    "tensorstore": ("step-100/model/manifest.ocdbt", "tensorstore checkpoint"),
    "Levanter": ("step-100/model/layers/.zarray", "zarr arrays"),
    "zarr 3": ("iter_0000100/decoder.weight/zarr.json", "zarr arrays"),
    "an adapter": ("checkpoint-100/adapter_model.safetensors", r"holds an adapter \(PEFT\) and no model"),
    "older Megatron": ("iter_0000100/mp_rank_00/model_optim_rng.pt", "older Megatron"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_read_is_said_in_one_sentence(tmp_path: Path, kind: str):
    name, says = FOREIGN[kind]
    sign = tmp_path / name
    sign.parent.mkdir(parents=True)
    sign.write_text("{}")
    folder = tmp_path / name.partition("/")[0]
    assert (format_of(folder), step_of(folder)) == ("foreign", 100)
    assert is_complete(folder)
    assert FORMATS["foreign"].files(folder) == [sign]
    with pytest.raises(UnsupportedCheckpoint, match=says):
        read_weights(folder)


def test_megatron_says_which_backend_is_not_read(tmp_path: Path):
    folder, last = megatron(tmp_path)
    last.write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert is_complete(folder)
    with pytest.raises(UnsupportedCheckpoint, match="backend zarr, expected torch_dist"):
        read_weights(folder)
    last.write_text('{"sharded_backend": ')
    assert not is_complete(folder)
    last.write_text("[]")
    with pytest.raises(CorruptCheckpoint, match="names no sharded_backend"):
        is_complete(folder)


WRITERS = {
    "folder": lambda run: (tiny_model.save_folder(run, 1000),),
    "fsdp": accelerated,
    "olmo": olmo,
    "megatron": megatron,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_markers_hold_for_every_folder(tmp_path: Path, write: Callable):
    folder = write(tmp_path)[0]
    assert is_complete(folder)
    beside = folder.with_name(folder.name + ".incomplete")
    for marker in (folder / ".incomplete", folder / ".tmp", folder / "model.orbax-checkpoint-tmp-17", beside):
        marker.touch()
        assert "is being written" in is_complete(folder).problem
        marker.unlink()
    earlier = folder.with_name(folder.name.replace("1000", "999"))
    earlier.mkdir()
    for marker in ("_SUCCESS", "STABLE", "commit_success.txt"):
        (earlier / marker).touch()
        assert f"has no {marker} yet, as {earlier.name} has" in is_complete(folder).problem
        (folder / marker).touch()
        assert is_complete(folder)


def test_metadata_of_an_unchanged_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_shards({"model": WEIGHTS}, tmp_path / "step-1")
    next(folder.glob("*.distcp")).rename(tmp_path / "later")
    reads = []
    real = dcp_folder._contents
    monkeypatch.setattr(dcp_folder, "_contents", lambda path: (reads.append(path), real(path))[1])
    for _ in range(5):
        assert not is_complete(folder)
    (tmp_path / "later").rename(folder / "__0_0.distcp")
    assert is_complete(folder)
    assert len(reads) == 1


def test_links_out_of_the_run_folder_are_found(tmp_path: Path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    inside, secret = tiny_model.save_folder(run, 1), tiny_model.save_folder(elsewhere, 2)
    assert outside(inside, run) is None
    (run / "link").symlink_to(inside)
    assert outside(run / "link", run) is None
    (run / "step-2").symlink_to(secret)
    assert outside(run / "step-2", run) == run / "step-2"
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(secret / "model.safetensors")
    assert outside(inside, run) == inside / "model.safetensors"
    (tmp_path / "name").symlink_to(run)
    assert outside(tmp_path / "name" / "link", tmp_path / "name") == tmp_path / "name" / "link" / "model.safetensors"
    (run / "step-3.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExpiredCheckpoint):
        FORMATS["torch"].is_complete(run / "step-3.pt")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    folder = tmp_path / "step-1"
    folder.mkdir()
    os.mkfifo(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(CorruptCheckpoint, match=r"a\.safetensors is no regular file"):
        is_complete(folder)


def test_permission_and_newlines_are_said(tmp_path: Path):
    path = tmp_path / "step-1\n.pt"
    torch.save({"a": torch.zeros(1)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "step-1\\n.pt has no zip directory yet" in FORMATS["torch"].is_complete(path).problem
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(CorruptCheckpoint, match="no permission"):
            FORMATS["torch"].is_complete(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("write", [*WRITERS.values(), lightning], ids=[*WRITERS, "lightning"])
def test_what_is_not_local_is_read_by_ranges(tmp_path: Path, write: Callable):
    """The same folder in fsspec's memory file system."""
    local = write(tmp_path)[0]
    remote = UPath(f"memory://{tmp_path.name}") / local.name
    for file in local.rglob("*"):
        if file.is_file():
            target = remote / file.relative_to(local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    assert format_of(remote) == format_of(local)
    assert step_of(remote) == 1000
    assert is_complete(remote)
    wanted, read = read_weights(local), read_weights(remote)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert outside(remote, remote.parent) is None
