"""A ``global_stepN/`` of DeepSpeed: ``mp_rank_*_model_states.pt`` and one ``*zero_pp_rank_*`` file a rank.

Complete when the file of every rank that the first one counts is there (discovery sees to it that they settle); the
file ``latest`` proves nothing, rank 0 writes it early. Below ZeRO stage 3 the model lies whole in the first file. At
stage 3 each parameter is put together from the ranks' flat halves, as DeepSpeed's own ``zero_to_fp32`` does.

The files hold objects of DeepSpeed, so they are read only with ``trust_pickle``. Even then nothing of the pickles is
run (`inert_pickle`): the setting says that it is looked past what is no tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rksp_core.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, UnsupportedCheckpoint
from rksp_monitor.checkpoints import markers, step_folder, torch_file
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.inert_pickle import MOST_DIMENSIONS
from rksp_monitor.checkpoints.lazy import Described, LazyTensors
from rksp_monitor.checkpoints.names import is_candidate, shown
from rksp_monitor.checkpoints.torch_archive import StoredTensor, TorchArchive, stored

if TYPE_CHECKING:
    from torch import Tensor

KIND: Final = "checkpoint"
WHOLE = "mp_rank_00_model_states.pt"
MOST_RANKS = 100_000
_RANK = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
_SPLIT = re.compile(r".*mp_rank_(?!00_)\d+_\w+_states\.pt|layer_\d+.*-model_states\.pt|.*expert_\d+.*_states\.pt")


def matches(path: Path) -> bool:
    """A folder with a step in its name, and files of DeepSpeed's ranks in it, or in its ``global_step*``."""
    return is_candidate(path.name) and path.is_dir() and step(path) is not None and bool(files(path))


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_folder.step(path)


def files(path: Path) -> list[Path]:
    """Return the files of all ranks; none when the folder is gone."""
    found = sorted(path.glob("*_states.pt"))
    return found or sorted(path.glob("global_step*/*_states.pt"))  # as the Hugging Face Trainer nests it


@answers
def is_complete(path: Path) -> None:
    """Check that the files of all ranks are there, each whole."""
    markers.check(path)
    first = _first(path)
    if first is None:
        raise IncompleteCheckpoint(f"{shown(path.name)} has no file of rank 0 yet")
    content = _content(first)
    expected = content.get("dp_world_size")
    if type(expected) is not int or not 0 < expected <= MOST_RANKS:
        raise CorruptCheckpoint(f"{shown(path.name)}: {first.name} does not say how many ranks there are")
    kinds = {0: (), 1: ("optim",), 2: ("optim",), 3: ("optim", "model")}[_stage(content)]
    there = {(kind, rank) for kind, rank, _ in _ranks(path)}
    missing = [(kind, rank) for kind in kinds for rank in range(expected) if (kind, rank) not in there]
    if missing:
        kind, rank = missing[0]
        raise IncompleteCheckpoint(
            f"{shown(path.name)} misses {len(missing)} files of {expected} ranks, as the {kind} states of rank {rank}"
        )
    for _, _, file in _ranks(path):
        torch_file.open_archive(file)


def weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the model's tensors; each is read, and put together, when it is asked for.

    Raises
    ------
    CheckpointError
        UnsupportedCheckpoint without ``trust_pickle``, and when several model-parallel ranks share the model.
    """
    name = shown(path.name)
    if not trust_pickle:
        raise UnsupportedCheckpoint(
            f"{name} is a DeepSpeed checkpoint, whose pickles hold objects of DeepSpeed; allow it with --trust-pickle "
            "(nothing of them is run)"
        )
    split = next((file.name for file in files(path) if _SPLIT.fullmatch(file.name)), None)
    first = _first(path)
    if split is not None or first is None:
        raise UnsupportedCheckpoint(
            f"{name} is cut over model-parallel ranks ({shown(split or 'without rank 0')}), which are not put "
            "together; convert it with DeepSpeed's universal checkpoint tools"
        )
    archive = torch_file.open_archive(first)
    content = archive.content(trust_pickle=True)
    if _stage(content) < 3:
        return torch_file.lazy_tensors(archive, torch_file.state_dict({"module": content.get("module")}, name))
    try:
        return _consolidated(path, archive, content)
    except CheckpointError:
        raise
    except Exception as error:
        raise CorruptCheckpoint(f"{name} is no checkpoint of ZeRO stage 3 ({shown(repr(error))})") from error


def _consolidated(path: Path, archive: TorchArchive, content: Mapping[str, Any]) -> LazyTensors:
    """Describe the parameters that all ranks hold parts of, and the buffers that rank 0 holds whole.

    Every rank's flat vectors, one a group, hold ``ceil(n / ranks)`` elements of each parameter of n elements, in the
    order of ``param_shapes``; what is left over of the last rank's part is padding.
    """
    optim = {rank: torch_file.open_archive(file) for kind, rank, file in _ranks(path) if kind == "optim"}
    flat = [list(_flat_groups(optim[rank])) for rank in sorted(optim)]
    shapes = {key: _shape(shape) for group in content["param_shapes"] for key, shape in group.items()}
    buffers = torch_file.tensors_of(
        {key: content["module"][key] for key in content.get("buffer_names") or ()}, archive.name
    )
    starts, start = {}, 0
    for key, shape in shapes.items():
        starts[key] = start
        start += math.ceil(math.prod(shape) / len(flat))
    held = min(sum(_elements(group) for group in groups) for groups in flat)
    if start > held:
        raise CorruptCheckpoint(f"{shown(path.name)}: each rank holds {held} of {start} elements")
    if content.get("frozen_param_shapes"):
        raise UnsupportedCheckpoint(f"{shown(path.name)} has frozen parameters, which are not put together at stage 3")

    def read(key: str) -> Tensor:
        import torch

        if key in buffers:
            return archive.read(buffers[key])
        numbers = math.prod(shapes[key])
        count = math.ceil(numbers / len(flat))
        parts = [
            optim[rank].read(piece)
            for rank, groups in zip(sorted(optim), flat, strict=True)
            for piece in _pieces(groups, starts[key], count)
        ]
        return torch.cat(parts)[:numbers].reshape(shapes[key]) if parts else torch.empty(shapes[key])

    dtype = flat[0][0].described.dtype
    shared = {key: source for key, source in _pairs(content.get("shared_params")) if source in shapes}
    described = {key: Described(shape, dtype) for key, shape in shapes.items()}
    described |= {key: tensor.described for key, tensor in buffers.items()}
    described |= {key: described[source] for key, source in shared.items()}
    return LazyTensors(described, lambda key: read(shared.get(key, key)))


def _pieces(groups: list[StoredTensor], start: int, count: int) -> Iterator[StoredTensor]:
    """Cut elements ``start`` to ``start + count`` out of flat vectors that follow one another."""
    for group in groups:
        size = _elements(group)
        here = min(count, size - start)
        if here > 0:
            yield StoredTensor(Described((here,), group.described.dtype), group.storage, group.offset + start, (1,))
            start, count = 0, count - here
        else:
            start -= size


def _flat_groups(archive: TorchArchive) -> Iterator[StoredTensor]:
    for value in archive.content(trust_pickle=True)["optimizer_state_dict"]["fp32_flat_groups"]:
        tensor = stored(value)
        if tensor is None or tensor.stride != (1,):
            raise CorruptCheckpoint(f"{archive.name} holds no flat vectors")
        yield tensor


def _shape(value: Any) -> tuple[int, ...]:
    if len(value) > MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise ValueError("a parameter's shape is none")
    return tuple(value)


def _elements(tensor: StoredTensor) -> int:
    return math.prod(tensor.described.shape)


def _pairs(shared: Any) -> list[tuple[str, str]]:
    """Return (name, the name it shares its tensor with); DeepSpeed wrote pairs, and a dictionary later."""
    return [(str(one), str(other)) for one, other in (shared.items() if isinstance(shared, dict) else shared or ())]


def _stage(content: Mapping[str, Any]) -> int:
    settings = content.get("ds_config")
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if stage in (1, 2, 3) else 0


def _first(path: Path) -> Path | None:
    """Return the file of rank 0 that says what the checkpoint is."""
    whole = next((file for file in files(path) if file.name == WHOLE), None)
    return whole or next((file for kind, rank, file in _ranks(path) if (kind, rank) == ("model", 0)), None)


def _ranks(path: Path) -> Iterator[tuple[str, int, Path]]:
    for file in files(path):
        if (found := _RANK.fullmatch(file.name)) is not None:
            yield found[2], int(found[1]), file


def _content(file: Path) -> dict[str, Any]:
    content = torch_file.open_archive(file).content(trust_pickle=True)
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{shown(file.name)} is no file of DeepSpeed")
    return content
