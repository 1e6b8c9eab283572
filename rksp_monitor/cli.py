"""The ``rksp`` command: parses, calls, turns every outcome into a documented exit code.

0  pass
1  risk at or above --fail-on
2  usage, configuration or internal error
3  inconclusive
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import Annotated

import typer

from rksp_core.errors import RkspError
from rksp_monitor.printable import printable

_INTERRUPTED = 130  # what Typer makes of Ctrl-C

app = typer.Typer(
    name="rksp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Watch the spectra of a transformer's residual stream, before and during training.",
    epilog="Exit codes: 0 pass, 1 risk at or above --fail-on, 2 usage / configuration / internal error, "
    "3 inconclusive.",
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            help="Show the version and exit.",
            callback=lambda wanted: _show_version(wanted=wanted),
        ),
    ] = False,
) -> None:
    pass


def _show_version(*, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"rksp {version('rksp')}")  # noqa: T201
        raise typer.Exit


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code.

    A crash must never look like "high risk": Python's own code for an uncaught exception is 1, and so is Click's for
    some errors, so every exception is mapped here.
    """
    _prepare_streams()
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run the command line and return the exit code."""
    try:
        result = app(args=argv, prog_name="rksp", standalone_mode=False)
        if result == _INTERRUPTED:
            return _say("stopped by the user")
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except typer.Abort:
        return _say("stopped by the user")
    except typer.TyperException as error:
        return _say(_usage(error)) if error.format_message() else 2  # no command at all: the help was shown
    except RkspError as error:
        return _say(str(error), code=error.exit_code)
    except (BrokenPipeError, SystemExit):
        # The reader of our output went away (`rksp ... | head`): close quietly, as other commands do. Typer makes it
        # SystemExit(1), which would look like "high risk".
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        return _say("stopped by the user")
    except Exception:  # noqa: BLE001 - the last resort: an unknown error is ours, and shows its traceback
        traceback.print_exc()
        return _say("internal error: please report the traceback above")


def _prepare_streams() -> None:
    """Make any text printable: a stream that was closed goes nowhere, a letter it cannot encode becomes a "?"."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # the replay worker writes there too
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _usage(error: typer.TyperException) -> str:
    """Return a usage error as one sentence, with the command whose help explains it."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "rksp"
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if (
        context is not None and message.startswith("No such command") and not message.endswith("?")
    ):  # else it names the nearest one
        message += f", only {', '.join(context.command.list_commands(context))}"
    return f"{message}; see `{command} --help`"


def _say(message: str, *, code: int = 2) -> int:
    print(f"rksp: {printable(message)}", file=sys.stderr)  # noqa: T201
    return code


def _register() -> None:
    """Attach the commands; their modules import torch only when they run."""
    from rksp_monitor.commands.calibrate import calibrate
    from rksp_monitor.commands.config import config
    from rksp_monitor.commands.control import control
    from rksp_monitor.commands.demo import demo
    from rksp_monitor.commands.doctor import doctor
    from rksp_monitor.commands.history import history
    from rksp_monitor.commands.policy import policy
    from rksp_monitor.commands.preflight import preflight
    from rksp_monitor.commands.probe import probe
    from rksp_monitor.commands.profile import compare, profile
    from rksp_monitor.commands.watch import watch

    app.command()(preflight)
    app.command()(calibrate)
    app.command()(watch)
    app.command()(profile)
    app.command()(compare)
    app.command()(history)
    app.command()(doctor)
    app.command()(demo)
    app.add_typer(control, name="control")
    app.add_typer(policy, name="policy")
    app.add_typer(probe, name="probe")
    app.add_typer(config, name="config")


_register()
