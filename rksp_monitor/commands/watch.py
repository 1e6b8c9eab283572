"""``rksp watch RUN_FOLDER``: parse, watch, exit by what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

FailOn = Literal["never", "elevated", "high", "critical"]


def watch(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="The folder of one run.")],
    config: Annotated[Path | None, typer.Option(help="YAML settings; see `rksp config init`.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What weights are loaded into; default: the run's config.yaml.")
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(help="Probe file; default: the run's probe.safetensors, else random tokens.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; default: the trainer's, or the folder's.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Process what is there, then exit.")] = False,
    until_step: Annotated[int | None, typer.Option(min=0, help="Exit when this step was judged.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Exit after this many seconds.")] = None,
    enforce: Annotated[
        bool | None, typer.Option("--enforce/--observe", help="Write orders to the trainer; default: observe.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Metrics endpoint; default 127.0.0.1:9109, none with --once."),
    ] = None,
    port_file: Annotated[
        Path | None, typer.Option(help="Write the endpoint's host:port there, once it serves.")
    ] = None,
    poll_interval: Annotated[float | None, typer.Option(help="Seconds between two scans.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda[:n]", help="Where checkpoints are replayed.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Local folder of the ledger; default RUN_FOLDER/.rksp.")
    ] = None,
    new_baseline: Annotated[
        bool, typer.Option("--new-baseline", help="Forget baseline, trailing average and risk level first.")
    ] = False,
    fail_on: Annotated[FailOn | None, typer.Option(help="Exit 1 when the risk reached this level.")] = None,
) -> int:
    """Watch one training run: judge its checkpoints and profiles, export metrics, and signal it when told to."""
    from rksp_monitor.config import read_settings
    from rksp_monitor.session import Session

    flags = {
        "model": model,
        "probe": probe,
        "run_id": run_id,
        "enforce": enforce,
        "listen": listen,
        "poll_interval": poll_interval,
        "device": device,
        "state_dir": state_dir,
        "fail_on": fail_on,
    }
    settings = read_settings(config, flags)
    session = Session(
        run_folder,
        settings,
        serve=not once or listen is not None,
        port_file=port_file,
        read=lambda: read_settings(config, flags),
    )
    return session.run(once=once, until_step=until_step, timeout=timeout, new_baseline=new_baseline)
