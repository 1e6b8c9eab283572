"""Runs one command per event, without a shell, and ends it with its children when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import IO, Any, cast

from structlog.typing import FilteringBoundLogger

from rksp_monitor.announce_settings import Hook

Document = Mapping[str, Any]

OUTPUT = 4096  # bytes of a command's output that are kept: the last ones
TICK = 0.1  # seconds between two looks at a command
GRACE = 2.0  # seconds between SIGTERM and SIGKILL to a command that took too long


class Command:
    """Runs a command. It gets the event on standard input, and RKSP_EVENT and RKSP_RUN in its environment."""

    def __init__(self, settings: Hook, log: FilteringBoundLogger) -> None:
        self.name = settings.command[0]
        self._settings, self._log = settings, log.bind(receiver=self.name)

    def send(self, document: Document, stop: threading.Event) -> str:
        """Run it to its end, or to its time limit; a failure is not tried again."""
        # What the service manager told this process is not for others.
        private = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
        environment = {name: value for name, value in os.environ.items() if name not in private}
        environment |= {"RKSP_EVENT": document["event"], "RKSP_RUN": document["run"].replace("\0", "")}
        with tempfile.TemporaryFile() as given:  # a pipe would fill up when the command does not read
            given.write(json.dumps(document).encode() + b"\n")
            given.seek(0)
            try:
                process = subprocess.Popen(  # noqa: S603 - the person who wrote the settings chose the program
                    self._settings.command,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that its children can be ended with it
                )
            except OSError as error:
                return f"it cannot be started ({error.strerror})"
        with cast("IO[bytes]", process.stdout) as pipe:
            ended, output = self._follow(process, pipe, stop)
        if output:
            self._log.debug("output", announced=document["event"], text=output.decode(errors="replace"))
        if not ended:
            return "it was ended with the watcher" if stop.is_set() else f"it took over {self._settings.timeout:g} s"
        code = process.returncode
        return "" if code == 0 else f"exit code {code}" if code > 0 else f"killed by signal {-code}"

    def _follow(self, process: subprocess.Popen[bytes], pipe: IO[bytes], stop: threading.Event) -> tuple[bool, bytes]:
        """Read what it says until it ends or must be ended; return whether it ended by itself, and the last output.

        A child that it left in the background may hold the pipe open, so the end is that of the process.
        """
        os.set_blocking(pipe.fileno(), False)
        deadline = time.monotonic() + self._settings.timeout
        output, is_open = b"", True
        readable = select.poll()  # select() knows no descriptor above 1023
        readable.register(pipe, select.POLLIN)
        while process.poll() is None and time.monotonic() < deadline and not stop.is_set():
            if not is_open:
                stop.wait(TICK)
            elif readable.poll(TICK * 1000):
                read = pipe.read(65536)
                output, is_open = (output + (read or b""))[-OUTPUT:], read != b""
        ended = process.poll() is not None
        if not ended:
            _end_group(process, 0.0 if stop.is_set() else GRACE)
        return ended, (output + (pipe.read(65536) or b""))[-OUTPUT:]


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process and its children, by force after ``grace`` seconds."""
    if grace:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
