"""``rksp doctor``: what of this machine rksp can use, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

PACKAGES = ("torch", "numpy", "scipy", "safetensors", "prometheus-client", "pydantic", "watchdog", "typer")
OPTIONAL = {"transformers": "Hugging Face models: pip install 'rksp[hf]'"}


def doctor(
    run_folder: Annotated[Path | None, typer.Argument(metavar="[RUN_FOLDER]", help="A run to check as well.")] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address that the watcher would use.")
    ] = "127.0.0.1:9109",
) -> int:
    """Check versions, devices, threads, the metrics address, and a run folder; exit 2 when something is wrong."""
    good = True
    for passed, text in (*_packages(), *_machine(), *_address(listen), *_run(run_folder)):
        good = good and passed is not False
        print(f"{ {True: 'ok', False: 'FAIL', None: '--'}[passed]:4}  {text}")
    return 0 if good else 2


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


def _address(listen: str) -> Iterator[tuple[bool | None, str]]:
    from rksp_monitor.endpoint import parse_address

    host, port = parse_address(listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            channel.bind((host, port))
        except OSError as error:
            yield False, f"{listen} is not free ({error.strerror}); another watcher, or choose another --listen"
        else:
            yield True, f"{listen} is free for the metrics endpoint"


def _run(folder: Path | None) -> Iterator[tuple[bool | None, str]]:
    if folder is None:
        return
    from rksp_monitor.config import read_settings
    from rksp_monitor.discovery import Scanner
    from rksp_monitor.filesystem import REMOTE, filesystem_of
    from rksp_monitor.run import describe_run

    if not folder.is_dir():
        yield False, f"there is no run folder {folder}"
        return
    run = describe_run(folder, read_settings())
    found = Scanner(folder).scan()
    steps = [sighting.step for sighting in found]
    span = f", steps {min(steps)} to {max(steps)}" if steps else ""
    yield True, f"run {run.name!r}: {len(found)} checkpoints and profiles{span}"
    yield (
        (None if run.model is None else True),
        f"model: {run.model or 'unknown; `rksp watch` takes --model'}",
    )
    yield (None if run.probe is None else True), f"probe: {run.probe or 'none; seeded random tokens would serve'}"
    kind, writable = filesystem_of(run.ledger.parent), os.access(folder, os.W_OK)
    yield kind not in REMOTE and writable, f"ledger {run.ledger} on {kind or 'an unknown file system'}"
