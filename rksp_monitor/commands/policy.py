"""``rksp policy replay HISTORY``: what another policy would have decided."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from rksp_monitor.commands.history import find_history
from rksp_monitor.commands.one_run import ConfigFile, RunId, StateDir
from rksp_monitor.commands.output import emit, terminal
from rksp_monitor.output_file import require_writable

policy = typer.Typer(no_args_is_help=True, help="Try a policy on what has happened.")

DIFFERS = 1


@policy.callback()
def _policy() -> None:
    """Keep `replay` a command of its own: Typer would make a group of one command that command."""


@policy.command()
def replay(
    history: Annotated[
        str, typer.Argument(metavar="HISTORY", help="A run folder, a ledger, or `rksp history --all --format json`.")
    ],
    policy_file: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="FILE",
            help="Settings of a watcher, or their policy alone; a key that FILE leaves out is the default.",
        ),
    ] = None,
    form: Annotated[Literal["table", "json"], typer.Option("--format", help="Of the report.")] = "table",
    output_file: Annotated[Path | None, typer.Option(help="Write the report there instead of to stdout.")] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 when anything would differ.")] = False,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    run_id: RunId = None,
) -> int:
    """Judge the stored evidence of a run again, and say what another policy would have decided."""
    from rksp_core.policy import Policy
    from rksp_monitor.config import read_policy
    from rksp_monitor.policy_replay import replay as judge_again

    if output_file is not None:
        require_writable(output_file)
    chosen = Policy() if policy_file is None else read_policy(policy_file)
    found = find_history(history, config, state_dir, run_id)
    if not found.complete:
        print(
            f"rksp: {history} leaves events out, so even the same policy may decide otherwise; export it with "
            "`rksp history --all --format json`",
            file=sys.stderr,
        )
    result = judge_again(found, chosen)
    if form == "json":
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    else:
        from rksp_monitor.report.policy_replay import replay_table

        text = replay_table(result, **terminal(output_file))
    emit(text, output_file, "the report is in")
    return DIFFERS if exit_code and result.differences else 0
