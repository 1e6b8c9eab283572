"""The healthy run that a run is compared with at the same step: its history, a series for each kind of event."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rksp_core.errors import ConfigError, ProfileError
from rksp_core.profile import ModelProfile
from rksp_core.reference import Reference
from rksp_monitor.config import RunSettings
from rksp_monitor.history import Selection, read_history
from rksp_monitor.run import describe_run


def read_references(source: Path, state_dir: Path | None = None) -> Mapping[str, Reference]:
    """Return {"checkpoint" or "profile": that series of the healthy run}, for each that it has.

    Parameters
    ----------
    source
        Its run folder, its ledger, or its history as `rksp history --format json` wrote it.
    state_dir
        Where the ledgers of watched runs lie; that of a run folder may also lie in the folder itself.

    Raises
    ------
    ConfigError
        When it cannot be read, holds no profile, or its profiles cannot be compared with each other.
    """
    profiles: dict[str, list[tuple[int, ModelProfile]]] = {}
    try:
        elsewhere = describe_run(source, RunSettings(), state_dir).ledger if source.is_dir() else source
        for row in read_history(elsewhere if elsewhere.is_file() else source).rows(Selection(statuses=("done",))):
            if row.profile is not None:
                profiles.setdefault(row.kind, []).append((row.step, ModelProfile.from_dict(row.profile)))
        references = {kind: Reference.of(str(source), series) for kind, series in profiles.items()}
    except ProfileError as error:
        raise ConfigError(f"the reference {source} cannot be used: {error}") from error
    if not references:
        raise ConfigError(f"the reference {source} holds no profile; watch that run first, or give another one")
    return references
