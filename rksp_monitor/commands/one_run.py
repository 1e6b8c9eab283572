"""The run that a command is about: found as its watcher finds it, through the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rksp_core.errors import ConfigError

if TYPE_CHECKING:
    from rksp_monitor.config import RunEntry
    from rksp_monitor.run import Run

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings of the run's watcher.")]
StateDir = Annotated[Path | None, typer.Option(help="Folder of the watcher's ledgers; default RUN_FOLDER/.rksp.")]
RunId = Annotated[str | None, typer.Option(help="Name of the run; default: the trainer's, or the folder's.")]


def one_run(
    folder: str, config: Path | None = None, state_dir: Path | None = None, run_id: str | None = None
) -> tuple[Run, RunEntry]:
    """Return the run in a folder, and what its watcher was told about it.

    Raises
    ------
    ConfigError
        When the settings are wrong, the folder is a pattern, or it cannot be looked at.
    """
    from rksp_monitor.config import read_settings
    from rksp_monitor.remote import as_path, is_local
    from rksp_monitor.roster import find_runs, is_pattern
    from rksp_monitor.run import describe_run

    if is_pattern(folder):
        raise ConfigError(f"{folder} is a pattern, and this is about one run; name its folder")
    settings = read_settings(config, {"state_dir": state_dir}, folders=[folder])
    wanted = as_path(folder)
    path, entry = next(
        (path, entry)
        for path, entry in find_runs(settings).values()
        if path == wanted or (is_local(path) and is_local(wanted) and path.resolve() == wanted.resolve())
    )
    if run_id is not None:
        entry = entry.model_copy(update={"run_id": run_id})
    try:
        return describe_run(path, entry, settings.state_dir), entry
    except OSError as error:
        raise ConfigError(f"{folder} cannot be looked at ({error})") from error
