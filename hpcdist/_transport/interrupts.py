"""Ctrl-C while a thread sleeps in the wait loop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class InterruptGuard:
    """While the main thread sleeps in our loop, Ctrl-C is ours even where others take it.

    Notebooks install the default handler anew before each cell.
    """

    def __init__(self, handler: Handler) -> None:
        self._replaced = None
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._replaced = signal.signal(signal.SIGINT, handler)

    def end(self) -> None:
        """Give it back."""
        if self._replaced is not None:
            signal.signal(signal.SIGINT, self._replaced)
