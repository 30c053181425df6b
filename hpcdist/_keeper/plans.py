"""What the keeper does later."""

from __future__ import annotations

import time
from collections.abc import Callable

Step = tuple[float, Callable[[], None]]


class Plan:
    """Steps, each with its time, the earliest first."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    @property
    def timeout(self) -> float:
        """For how long nothing is due, as epoll takes it."""
        return max(0.0, self._steps[0][0] - time.monotonic()) if self._steps else -1.0

    def later(self, seconds: float, step: Callable[[], None]) -> None:
        """Add a step."""
        self._steps.append((time.monotonic() + seconds, step))
        self._steps.sort(key=lambda step: step[0])

    def run(self) -> None:
        """Do what is due."""
        while self._steps and self._steps[0][0] <= time.monotonic():
            self._steps.pop(0)[1]()

    def starts_later_than(self, steps: list[Step]) -> bool:
        """Tell whether the first step is later than the first of others."""
        return min(at for at, _ in self._steps) > min(at for at, _ in steps)

    def become(self, steps: list[Step]) -> None:
        """Take other steps in place of all."""
        self._steps = sorted(steps, key=lambda step: step[0])
