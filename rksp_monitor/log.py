"""Logs of the watcher: one event a line on stderr, JSON when no person is reading.

A name of a checkpoint may hold line breaks and terminal commands; both forms escape them, so that nobody writes records
or colours into the log by naming a file. Logging never raises, and a reader that stops reading (a full pipe, a terminal
after Ctrl-S) holds the watcher up once, for `PATIENCE` seconds; what is lost until he reads on is counted and said.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import TextIO

import structlog
from structlog.processors import NAME_TO_LEVEL
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from rksp_monitor.printable import printable

PATIENCE = 5.0  # seconds that the first record waits for a reader who stopped reading
PIECE = select.PIPE_BUF  # bytes that a pipe takes at once when it says that it takes any
REMEMBERED = 10_000  # keys of `Once`


def make_logger(level: int | str = "info") -> FilteringBoundLogger:
    """Return a logger of the levels from ``level`` up: debug, info, warning, error, or their numbers (10 to 40)."""
    stream = Stream(sys.stderr)
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if stream.is_terminal:
        colours = not os.environ.get("NO_COLOR")  # https://no-color.org: present and not empty
        shared += [
            structlog.processors.ExceptionRenderer(_summary),
            _escape,
            structlog.dev.ConsoleRenderer(colors=colours, sort_keys=False),
        ]
    else:
        shared += [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(sort_keys=False, default=str),
        ]
    logger: FilteringBoundLogger = structlog.wrap_logger(
        stream,
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(
            level if isinstance(level, int) else NAME_TO_LEVEL[level.lower()]
        ),
        cache_logger_on_first_use=True,
    )
    return logger


class Once:
    """Says whether something is said for the first time: ``if once(key): log.warning(...)``."""

    def __init__(self) -> None:
        self._said: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Hashable) -> bool:
        """Return True the first time, and again after `forget` or `REMEMBERED` other keys."""
        with self._lock:
            first = key not in self._said
            self._said[key] = None
            self._said.move_to_end(key)
            if len(self._said) > REMEMBERED:
                self._said.popitem(last=False)
            return first

    def forget(self, key: Hashable) -> None:
        """Say it again next time: the trouble is over."""
        with self._lock:
            self._said.pop(key, None)


class Stream:
    """Writes lines to a stream that may be closed, full or gone.

    Parameters
    ----------
    stream
        ``sys.stderr``; None where the process was started without one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._is_stuck, self._is_torn, self._lost = False, False, 0

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads this."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # it is closed
            return False

    def msg(self, message: str) -> None:
        """Write one line."""
        with self._lock:
            lost = f"({self._lost} records before this one were lost)\n" if self._lost else ""
            torn = "\n" if self._is_torn else ""
            if self._write(f"{torn}{lost}{message}\n".encode(errors="backslashreplace")):
                self._lost = 0
            else:
                self._lost += 1

    log = debug = info = warn = warning = error = critical = failure = fatal = exception = msg

    def _write(self, line: bytes) -> bool:
        """Write all of it, or as much as is taken in time; return whether it was all."""
        if self._stream is None:
            return False
        written = 0
        try:
            channel = self._stream.fileno()
            self._stream.flush()
            ready = select.poll()
            ready.register(channel, select.POLLOUT)
            while written < len(line):
                if not ready.poll(0 if self._is_stuck else PATIENCE * 1000):
                    self._is_stuck = True
                    break
                # A pipe that is ready takes this much without blocking, whatever the reader does meanwhile.
                written += os.write(channel, line[written : written + PIECE])
        except ValueError:  # it is closed, or (as when tests capture it) no file
            return written == 0 and self._write_plainly(line)
        except OSError:  # nobody reads any more
            return False
        self._is_torn = written < len(line) if written else self._is_torn
        self._is_stuck = written < len(line)
        return not self._is_stuck

    def _write_plainly(self, line: bytes) -> bool:
        try:
            print(line.decode(), end="", file=self._stream, flush=True)
        except (OSError, ValueError):
            return False
        return True


def _summary(exc_info: tuple[type[BaseException], BaseException, TracebackType | None]) -> str:
    """Put an exception into one line: what, and where, innermost last. JSON has all of it."""
    _, error, trace = exc_info
    frames = traceback.extract_tb(trace)
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {error} ({where})"


def _escape(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Write what is no printable character as its code, in names and texts; other values are shown by `repr`."""
    del logger, method
    if "exception" in event:  # under this name it would be printed on lines of its own
        event["error"] = event.pop("exception")
    return {printable(name): printable(value) if isinstance(value, str) else value for name, value in event.items()}
