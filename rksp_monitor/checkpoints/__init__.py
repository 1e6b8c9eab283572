"""What counts as a checkpoint, one module a format.

Each module of `FORMATS` answers the same questions about a path (`CheckpointFormat`). None runs a pickle, all read
tensors one at a time, and they say "not yet" (`Completeness`) apart from "wrong" (CorruptCheckpoint): a file that is
still being written looks damaged to most readers.

    profile      ``profiles/step-N.json``: the trainer's own figures, to be judged without a replay
    safetensors  a ``.safetensors`` file
    torch        a ``.pt``, ``.pth`` or ``.ckpt`` file, Lightning's too
    lightning    a ``.ckpt`` folder: Lightning's sharded checkpoint
    olmo         ``stepN/`` of OLMo-core
    megatron     ``iter_N/`` of Megatron Core, written by its ``torch_dist``
    deepspeed    ``global_stepN/`` of DeepSpeed, ZeRO or not; with ``trust_pickle``
    folder       a folder with weights in one file, or in shards with an index: Hugging Face's ``checkpoint-N/`` too
    fsdp         the same with accelerate's ``pytorch_model_fsdp_0/`` in it: the Trainer under FSDP
    dcp          a folder of torch.distributed.checkpoint, such as torchtitan's ``step-N/``
    foreign      orbax, Levanter, zarr, adapters: recognised, and said not to be read
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import (
    dcp_folder,
    deepspeed_folder,
    foreign_folder,
    fsdp_folder,
    lightning_folder,
    megatron_folder,
    olmo_folder,
    profile_file,
    safetensors_file,
    step_folder,
    torch_file,
)
from rksp_monitor.checkpoints.completeness import Completeness
from rksp_monitor.checkpoints.names import shown
from rksp_monitor.listing import versions
from rksp_monitor.remote import is_local

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["checkpoint", "profile"]


class CheckpointFormat(Protocol):
    """The questions that discovery and replay ask of a format."""

    @property
    def KIND(self) -> Kind:  # noqa: N802 - a constant of the module
        """``checkpoint`` (weights, to be replayed) or ``profile`` (already measured by the trainer)."""

    def matches(self, path: Path) -> bool:
        """Whether the path looks like this format, by its name and kind."""

    def step(self, path: Path) -> int | None:
        """The training step, from the name or what is stored beside it; None when it has none."""

    def is_complete(self, path: Path) -> Completeness:
        """Whether it can be read yet; raise ExpiredCheckpoint or CorruptCheckpoint when it never can."""

    def files(self, path: Path) -> list[Path]:
        """The files whose size and time tell whether it changed."""

    def weights(self, path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
        """The model's tensors by name; a profile has `profile_file.read` instead."""


FORMATS: Mapping[str, CheckpointFormat] = cast(
    "Mapping[str, CheckpointFormat]",
    {
        "profile": profile_file,
        "safetensors": safetensors_file,
        "torch": torch_file,
        "lightning": lightning_folder,
        "olmo": olmo_folder,
        "megatron": megatron_folder,
        "folder": step_folder,
        "fsdp": fsdp_folder,
        "deepspeed": deepspeed_folder,
        "dcp": dcp_folder,
        "foreign": foreign_folder,
    },
)


def format_of(path: Path) -> str | None:
    """Return the name of the first format in `FORMATS` that the path matches, or None."""
    return next((name for name, known in FORMATS.items() if known.matches(path)), None)


def read_weights(path: Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Read the state dict of a checkpoint file or folder, model weights only.

    Parameters
    ----------
    path
        A file or folder.
    trust_pickle
        Whether a format that cannot be read otherwise may run its pickles' code.

    Raises
    ------
    CheckpointError
        When it is no checkpoint of a known format, still being written, gone, or damaged.
    """
    name = format_of(path)
    if not path.exists():
        raise ExpiredCheckpoint(f"there is no checkpoint {shown(str(path))}")
    if name is None or FORMATS[name].KIND != "checkpoint":
        raise CorruptCheckpoint(
            f"{shown(str(path))} is no checkpoint; expected a .safetensors, .pt or .pth file, or a folder, "
            "with its step in the name, as in step-100"
        )
    found = FORMATS[name].is_complete(path)
    if not found:
        raise IncompleteCheckpoint(found.problem)
    return FORMATS[name].weights(path, trust_pickle=trust_pickle)


@contextlib.contextmanager
def in_one_state(path: Path) -> Iterator[None]:
    """Check that no file of a folder was written anew meanwhile: shards of two states are no model of either.

    What is gone by then does no harm, and a single file is read as it was when it was opened (`source`).

    Raises
    ------
    IncompleteCheckpoint
        At the end, when one was.
    """
    before = _states(path)
    yield
    after = _states(path) if len(before) > 1 else {}
    anew = next((file for file, state in before.items() if after.get(file, state) != state), None)
    if anew is not None:
        raise IncompleteCheckpoint(f"{shown(path.name)}: {shown(anew.name)} was written anew while it was read")


def _states(path: Path) -> dict[Path, str]:
    """Return what tells the content of each file of a checkpoint; nothing when one cannot be looked at."""
    name = format_of(path)
    files = FORMATS[name].files(path) if name is not None else []
    try:
        return dict(zip(files, versions(files, inodes=False), strict=True))
    except OSError:
        return {}


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint or profile, None when it has none or is of no known format."""
    name = format_of(path)
    return None if name is None else FORMATS[name].step(path)


def outside(path: Path, folder: Path) -> Path | None:
    """Return what of a checkpoint lies outside the folder once symbolic links are followed, or None.

    A link out of a run folder may point at anything that the watcher's user may read. The folder itself may be a link.
    """
    if not is_local(path):  # a remote one: its links are the server's business
        return None
    name, home = format_of(path), folder.resolve()
    inside = FORMATS[name].files(path) if name is not None else []
    return next((each for each in [path, *inside] if not each.resolve().is_relative_to(home)), None)


def configuration_of(path: Path) -> Path | None:
    """Return the ``config.json`` that Hugging Face saves beside the weights, of which the model can be built."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return file if file.is_file() else None
