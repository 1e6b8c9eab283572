"""A profile that the trainer wrote itself (`rksp_core.ProfileWriter`): ``profiles/step-00000010.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rksp_core.errors import CorruptCheckpoint, ProfileError
from rksp_core.profile import ModelProfile
from rksp_core.profile_writer import FOLDER
from rksp_monitor.checkpoints.completeness import answers
from rksp_monitor.checkpoints.names import is_candidate, shown, step_in
from rksp_monitor.checkpoints.source import read_json

KIND: Final = "profile"


def matches(path: Path) -> bool:
    """A JSON file with a step in its name, in the folder where trainers put profiles (others are metadata)."""
    named = path.suffix == ".json" and path.parent.name == FOLDER and is_candidate(path.name)
    return named and step(path) is not None and path.is_file()


def step(path: Path) -> int | None:
    """Return the step in the name."""
    return step_in(path.name)


@answers
def is_complete(path: Path) -> None:
    """Complete when the document parses: our writer renames it into place, another may not."""
    read(path)


def files(path: Path) -> list[Path]:
    """Return the file itself."""
    return [path]


def read(path: Path) -> Mapping[str, Any]:
    """Return the profile document, checked.

    Raises
    ------
    CheckpointError
        When the file is cut short (incomplete), gone (expired), or no profile (corrupt).
    """
    document = read_json(path)
    try:
        ModelProfile.from_dict(document)
    except (ProfileError, AttributeError) as error:
        raise CorruptCheckpoint(f"{shown(path.name)}: {shown(str(error))}") from error
    return document  # type: ignore[no-any-return]
