"""``rksp watch RUN_FOLDER``: parse, watch, exit by what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rksp_monitor.commands.preflight import parse_arguments

if TYPE_CHECKING:
    from rksp_monitor.config import WatchSettings

FailOn = Literal["never", "elevated", "high", "critical"]


def watch(
    run_folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN_FOLDER]...", help="Folders of runs, or their URLs; more under `runs:`."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML settings; see `rksp config init`.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What weights are loaded into; default: the run's config.yaml.")
    ] = None,
    arg: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="An argument of the factory, as YAML.")
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
    trust_pickle: Annotated[
        bool | None,
        typer.Option("--trust-pickle", help="Look past objects that are no tensors, as DeepSpeed's; none is run."),
    ] = None,
    web_config: Annotated[
        Path | None, typer.Option(help="TLS and basic auth of the endpoint: Prometheus' web.config.file.")
    ] = None,
    fail_on: Annotated[FailOn | None, typer.Option(help="Exit 1 when the risk reached this level.")] = None,
) -> int:
    """Watch training runs: judge their checkpoints and profiles, export metrics, and signal them when told to."""
    from rksp_monitor.config import read_settings
    from rksp_monitor.session import Session

    flags = {
        "model": model,
        "arguments": parse_arguments(arg or []) or None,
        "probe": probe,
        "run_id": run_id,
        "enforce": enforce,
        "listen": listen,
        "poll_interval": poll_interval,
        "device": device,
        "state_dir": state_dir,
        "fail_on": fail_on,
        "trust_pickle": trust_pickle,
        "web_config": web_config,
    }

    def read() -> WatchSettings:
        return read_settings(config, flags, run_folders or ())

    session = Session(read(), serve=not once or listen is not None, port_file=port_file, read=read)
    return session.run(once=once, until_step=until_step, timeout=timeout, new_baseline=new_baseline)
