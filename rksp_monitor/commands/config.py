"""``rksp config init``, ``validate`` and ``schema``: the settings file of ``rksp watch``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from rksp_core.errors import ConfigError
from rksp_monitor.output_file import write_output
from rksp_monitor.printable import counted

config = typer.Typer(no_args_is_help=True, help="Write, check or describe the settings file of `rksp watch`.")


def template() -> str:
    """Return the commented YAML with every default."""
    return files("rksp_monitor").joinpath("watch.yaml").read_text(encoding="utf-8")


@config.command()
def init(
    output: Annotated[Path | None, typer.Argument(metavar="[OUTPUT]", help="File to write; default: stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> int:
    """Write a commented settings file with every default."""
    if output is None:
        print(template(), end="")
        return 0
    if output.exists() and not force:
        raise ConfigError(f"{output} is already there; pass --force to replace it")
    write_output(output, template())
    return 0


@config.command()
def validate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The settings file to check.")],
) -> int:
    """Check a settings file, with the RKSP_* variables of the environment over it."""
    from rksp_monitor.config import read_settings
    from rksp_monitor.roster import find_runs

    settings = read_settings(path)
    modes = {entry.enforce for entry in settings.runs} or {settings.enforce}
    mode = "some runs enforce, some observe" if len(modes) > 1 else "enforces" if True in modes else "observes"
    entries, found = len(settings.runs), len(find_runs(settings))
    runs = (
        f"{counted(found, 'run folder')} by {counted(entries, 'entry')} of `runs`"
        if entries
        else "names no runs, so `rksp watch` is to be given their folders"
    )
    print(f"{path} is valid: {counted(len(settings.policy.rules), 'rule')}; {mode}; {runs}")
    print(f"The files, models and addresses that it names are looked at by `rksp doctor --config {path}`.")
    return 0


@config.command()
def schema() -> int:
    """Print the JSON schema of the settings."""
    from rksp_monitor.config import WatchSettings

    print(json.dumps(WatchSettings.model_json_schema(), indent=1))
    return 0
