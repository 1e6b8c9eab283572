"""``rksp doctor``: what of this machine rksp can use, what of a run it can watch, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rksp_core.errors import RkspError
from rksp_monitor.commands.one_run import StateDir, one_run
from rksp_monitor.printable import counted, printable

if TYPE_CHECKING:
    from rksp_monitor.checkup import Findings
    from rksp_monitor.config import WatchSettings

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
    count: Counter[bool | None] = Counter()
    for section in _sections(run_folder, config, listen, state_dir, deep=deep):
        if count:
            print()
        for passed, text in section:
            count[passed] += 1
            print(f"{ {True: 'ok', False: 'FAIL', None: '--'}[passed]:4}  {printable(text)}")
    print(f"\n{count[True]} ok, {count[None]} to know (--), {count[False]} wrong")
    return 2 if count[False] else 0


def _sections(
    run_folder: str | None, config: Path | None, listen: str | None, state_dir: Path | None, *, deep: bool
) -> Iterator[Findings]:
    """Yield the findings on this machine, on the settings and what all runs share, and on each run."""
    from rksp_monitor.config import read_settings
    from rksp_monitor.roster import find_runs

    yield chain(_packages(), _machine())
    try:
        settings = read_settings(config, {"listen": listen, "state_dir": state_dir})
        folders = [run_folder] if run_folder is not None else list(find_runs(settings))
    except RkspError as error:
        yield iter([(False, str(error))])
        return
    yield _shared(settings, config)
    for folder in folders:
        yield _run(folder, config, state_dir, deep=deep)
    if settings.runs and not folders:
        yield iter([(None, "the patterns under `runs` find no folder yet")])


def _shared(settings: WatchSettings, config: Path | None) -> Findings:
    from rksp_monitor.checkup import check_process

    if config is not None:
        rules, entries = counted(len(settings.policy.rules), "rule"), counted(len(settings.runs), "entry")
        yield True, f"settings {config}: {rules}, {entries} of runs"
    yield from check_process(settings)


def _run(folder: str, config: Path | None, state_dir: Path | None, *, deep: bool) -> Findings:
    from rksp_monitor.checkup import check_run
    from rksp_monitor.remote import driver_errors

    try:
        run, own = one_run(folder, config, state_dir)
        with driver_errors(run.folder):
            yield from check_run(run, own, deep=deep)
    except (RkspError, OSError) as error:
        yield False, f"{folder}: {error}"


def _packages() -> Findings:
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


def _machine() -> Findings:
    import torch

    yield (
        True,
        f"{counted(len(os.sched_getaffinity(0)), 'core')}, torch uses {counted(torch.get_num_threads(), 'thread')}",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield True, f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        yield None, "no CUDA device; profiles are computed on the CPU"
    promtool = shutil.which("promtool")
    yield (True if promtool else None), f"promtool: {promtool or 'not found (only needed to check rules)'}"
