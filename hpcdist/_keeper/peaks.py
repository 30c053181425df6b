"""How much memory the ranks of a world have had at most.

The kernel tells the parent of a process at its end. A launcher's ranks are no children of the
keeper's, and what has ended cannot be asked: those are looked at now and then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from hpcdist._keeper.plans import Plan

_EVERY = 1.0  # seconds


class Peaks:
    """The most memory that each rank has had, in bytes, as far as that is known."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._follows = False

    def note(self, rank: int, peak: int) -> None:
        """Note what the kernel has told."""
        self._known[rank] = peak

    def of(self, rank: int) -> int | None:
        """Return that of a rank; None: it is not known."""
        return self._known.get(rank)

    def follow(
        self, plan: Plan, ranks: Callable[[], Iterable[int]], pids: Mapping[int, int]
    ) -> None:
        """Look from now on how it stands with ranks that live, until the plan is another."""

        def look() -> None:
            for rank in ranks():
                peak = peak_of(pids[rank])
                if peak is not None:
                    self._known[rank] = peak
            plan.later(_EVERY, look)

        if not self._follows:
            self._follows = True
            look()


def peak_of(pid: int) -> int | None:
    """Return the most memory that a process has had so far, in bytes; proc(5)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            match = re.search(rb"(?m)^VmHWM:\s*(\d+) kB", file.read())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
