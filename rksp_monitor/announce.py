"""Tells webhooks and commands what happened, in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from structlog.typing import FilteringBoundLogger

from rksp_monitor.announce_settings import EventName, Hook, Webhook

Count = Callable[[str, str], object]


class Announcer:
    """Tells webhooks and commands what happened; `announce` never blocks and never raises.

    Parameters
    ----------
    webhooks, hooks
        Who is told.
    log
        Where failures and drops are said.
    count
        Called with (run, name of a counter in `rksp_monitor.metrics`) for each event sent, failed or dropped, such as
        `rksp_monitor.metrics.Board.count`; a KeyError (the run is gone) is no matter.

    Raises
    ------
    ConfigError
        When a secret cannot be read.
    """

    def __init__(
        self,
        webhooks: Iterable[Webhook],
        hooks: Iterable[Hook],
        log: FilteringBoundLogger,
        *,
        count: Count = lambda run, name: None,
    ) -> None:
        raise NotImplementedError

    def announce(self, event: EventName, run: str, document: Mapping[str, Any]) -> None:
        """Tell every receiver that asked for ``event``; ``document`` is plain JSON data and is copied at once."""
        raise NotImplementedError

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what waits for at most ``timeout`` seconds, then give up the rest and say how much it was."""
        raise NotImplementedError
