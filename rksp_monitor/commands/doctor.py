"""``rksp doctor``: what of this machine rksp can use, what of a run it can watch, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from rksp_core.errors import RkspError
from rksp_monitor.commands.one_run import StateDir, one_run
from rksp_monitor.printable import printable

PACKAGES = ("torch", "numpy", "scipy", "safetensors", "prometheus-client", "pydantic", "watchdog", "typer")
OPTIONAL = {
    "transformers": "Hugging Face models: pip install 'rksp[hf]'",
    "pyarrow": "Parquet histories: pip install 'rksp[parquet]'",
}


def doctor(
    run_folder: Annotated[
        str | None, typer.Argument(metavar="[RUN_FOLDER]", help="A run to check as well; default: those of --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings that the watcher would have.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address that the watcher would use.")] = None,
    state_dir: StateDir = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also read the newest checkpoint's weights into the model.")] = (
        False
    ),
) -> int:
    """Check this machine, the settings, and each run from its folder to its trainer; exit 2 when something is wrong."""
    good = True
    for passed, text in _findings(run_folder, config, listen, state_dir, deep=deep):
        good = good and passed is not False
        print(f"{ {True: 'ok', False: 'FAIL', None: '--'}[passed]:4}  {printable(text)}")
    return 0 if good else 2


def _findings(
    run_folder: str | None, config: Path | None, listen: str | None, state_dir: Path | None, *, deep: bool
) -> Iterator[tuple[bool | None, str]]:
    from rksp_monitor.checkup import check_process, check_run
    from rksp_monitor.config import read_settings
    from rksp_monitor.remote import driver_errors
    from rksp_monitor.roster import find_runs

    yield from _packages()
    yield from _machine()
    try:
        settings = read_settings(config, {"listen": listen, "state_dir": state_dir})
        folders = [run_folder] if run_folder is not None else list(find_runs(settings))
    except RkspError as error:
        yield False, str(error)
        return
    if config is not None:
        yield True, f"settings {config}: {len(settings.policy.rules)} rules, {len(settings.runs)} entries of runs"
    yield from check_process(settings)
    for folder in folders:
        try:
            run, own = one_run(folder, config, state_dir)
            with driver_errors(run.folder):
                yield from check_run(run, own, deep=deep)
        except (RkspError, OSError) as error:
            yield False, f"{folder}: {error}"
    if settings.runs and not folders:
        yield None, "the patterns under `runs` find no folder yet"


def _packages() -> Iterator[tuple[bool | None, str]]:
    from importlib.metadata import PackageNotFoundError, version

    yield True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield True, f"{name} {version(name)}"
        except PackageNotFoundError:
            yield False, f"{name} is not installed; reinstall rksp"
    for name, purpose in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield None, f"{name} is not installed ({purpose})"
        else:
            yield True, f"{name} {version(name)}"


def _machine() -> Iterator[tuple[bool | None, str]]:
    import torch

    yield True, f"{len(os.sched_getaffinity(0))} cores, torch uses {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield True, f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        yield None, "no CUDA device; profiles are computed on the CPU"
    promtool = shutil.which("promtool")
    yield (True if promtool else None), f"promtool: {promtool or 'not found (only needed to check rules)'}"
