"""Logs of the daemon: one event a line on stderr, JSON when no person is reading."""

from __future__ import annotations

import os
import sys

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import FilteringBoundLogger, Processor


def make_logger(level: int = 20) -> FilteringBoundLogger:
    """Return a logger of the levels from ``level`` up (10 debug, 20 info, 30 warning, 40 error)."""
    terminal = sys.stderr.isatty()
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if terminal:
        shared.append(structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ))
    else:
        shared += [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(sort_keys=False, default=str),
        ]
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    return logger
