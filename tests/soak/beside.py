"""A thread that does something beside an experiment until the block ends."""

from __future__ import annotations

import threading
from typing import Self


class Beside(threading.Thread):
    """``run`` goes on until ``_over`` is set, at the end of the ``with`` block."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
