"""``rksp history RUN``: what became of every checkpoint and profile of a run."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rksp_core.errors import ConfigError
from rksp_monitor.commands.one_run import ConfigFile, RunId, StateDir
from rksp_monitor.commands.output import emit, terminal
from rksp_monitor.output_file import output_stream, require_writable

if TYPE_CHECKING:
    from rksp_monitor.history import History

Kind = Literal["checkpoint", "profile", "hold"]
Format = Literal["table", "csv", "json", "parquet"]


class Status(StrEnum):
    """The states of `rksp_monitor.ledger`, as Typer takes a choice that may be made more than once."""

    SEEN = "seen"
    READY = "ready"
    PROCESSING = "processing"
    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"
    SKIPPED = "skipped"


def history(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a ledger, or an exported history.")],
    kind: Annotated[Kind | None, typer.Option(help="Events of this kind alone.")] = None,
    status: Annotated[list[Status] | None, typer.Option(help="In this state; may be given more than once.")] = None,
    from_step: Annotated[int | None, typer.Option(min=0, help="First step.")] = None,
    to_step: Annotated[int | None, typer.Option(min=0, help="Last step.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what was set aside when the trainer went back to an earlier step.")
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="Of the rows; json serves as a reference or a replay.")] = (
        "table"
    ),
    output_file: Annotated[Path | None, typer.Option(help="Write there instead of to stdout.")] = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    run_id: RunId = None,
) -> int:
    """List or export what became of every checkpoint, profile and hold of a run; beside a watcher, or without one."""
    from rksp_monitor.history import Selection
    from rksp_monitor.report.history import to_csv, to_json, to_table, write_parquet

    if output_file is not None:
        require_writable(output_file)
    elif form == "parquet":
        raise ConfigError("Parquet is no text for a terminal or a pipe; name a file with --output-file")
    selection = Selection(kind, tuple(status or ()), from_step, to_step, set_aside=everything)
    found = find_history(run, config, state_dir, run_id)
    if form == "parquet" and output_file is not None:
        with output_stream(output_file) as stream:
            write_parquet(found, selection, stream)
        print(f"rksp: the history is in {output_file}", file=sys.stderr)
    elif form == "table":
        text = to_table(found, found.rows(selection), **terminal(output_file))
        emit(text, output_file, "the history is in")
    else:
        emit((to_csv if form == "csv" else to_json)(found, selection), output_file, "the history is in")
    return 0


def find_history(
    run: str, config: Path | None = None, state_dir: Path | None = None, run_id: str | None = None
) -> History:
    """Return the history that a run folder, a ledger or an export has.

    Raises
    ------
    ConfigError
        When there is none, or it cannot be read.
    """
    from rksp_monitor.commands.one_run import one_run
    from rksp_monitor.history import read_history

    if run.endswith((".json", ".sqlite3")):
        return read_history(run, run=run_id)
    described, _ = one_run(run, config, state_dir, run_id)
    return read_history(described.ledger, run=described.name)
