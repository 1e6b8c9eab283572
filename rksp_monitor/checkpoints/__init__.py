"""What counts as a checkpoint, one module a format.

Each module of `FORMATS` answers the same questions about a path (`CheckpointFormat`). They never unpickle objects,
and they say "not yet" (IncompleteCheckpoint) apart from "wrong" (CorruptCheckpoint): a file that is still being
written looks damaged to most readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from rksp_core.errors import CorruptCheckpoint, ExpiredCheckpoint
from rksp_monitor.checkpoints import dcp_folder, profile_file, safetensors_file, step_folder, torch_file

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

    def check_complete(self, path: Path) -> None:
        """Return when it can be read; raise IncompleteCheckpoint, ExpiredCheckpoint or CorruptCheckpoint."""

    def files(self, path: Path) -> list[Path]:
        """The files whose size and time tell whether it changed."""

    def read(self, path: Path) -> Mapping[str, Any]:
        """Its content: a state dict of tensors, or a profile document."""


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


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read the state dict of a checkpoint file or folder, model weights only.

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
    FORMATS[name].check_complete(path)
    return FORMATS[name].read(path)


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint or profile, None when it has none or is of no known format."""
    name = format_of(path)
    return None if name is None else FORMATS[name].step(path)
