"""What the driver is to do later."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

from hpcdist._transport.descriptors import safely

_now = time.monotonic


class Timers:
    """Functions and when they are due, the first one first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()

    def add(self, delay: float, fn: Callable[[], None]) -> None:
        """Have a function called after a delay."""
        heapq.heappush(self._heap, (_now() + delay, next(self._serial), fn))

    def run(self, now: float) -> None:
        """Call those that are due."""
        while self._heap and self._heap[0][0] <= now:
            safely(heapq.heappop(self._heap)[2])

    def first(self) -> float:
        """Tell when the next one is due."""
        return self._heap[0][0] if self._heap else float("inf")

    def clear(self) -> None:
        """Forget them all."""
        self._heap.clear()
