"""What counts as a checkpoint, one module a format.

Each module of `FORMATS` answers the same questions about a path (`CheckpointFormat`). They never unpickle objects,
and they say "not yet" (`Completeness`) apart from "wrong" (CorruptCheckpoint): a file that is still being
written looks damaged to most readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint, IncompleteCheckpoint
from rksp_monitor.checkpoints import dcp_folder, profile_file, safetensors_file, step_folder, torch_file
from rksp_monitor.checkpoints.completeness import Completeness

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
        "folder": step_folder,
        "dcp": dcp_folder,
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
        raise ExpiredCheckpoint(f"there is no checkpoint {path}")
    if name is None or FORMATS[name].KIND != "checkpoint":
        raise CorruptCheckpoint(
            f"{path} is no checkpoint; expected a .safetensors, .pt or .pth file, or a folder, "
            "with its step in the name, as in step-100"
        )
    found = FORMATS[name].is_complete(path)
    if not found:
        raise IncompleteCheckpoint(found.problem)
    return FORMATS[name].weights(path, trust_pickle=trust_pickle)


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint or profile, None when it has none or is of no known format."""
    name = format_of(path)
    return None if name is None else FORMATS[name].step(path)
