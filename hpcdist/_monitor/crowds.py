"""What many workers log alike: the first of them as they come, all others as one record."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hpcdist._wire.messages import Line

WINDOW = 1.0  # seconds within which equal records of several workers are one crowd
_SHOWN = 3  # workers whose records are shown one by one
_CROWDS_MOST = 1000


class Told(NamedTuple):
    """A record, and whose it is."""

    line: Line
    pids: tuple[int, ...]


class _Crowd:
    """The workers that have said the same."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.pids: dict[int, None] = {}  # in their order
        self.last: Line | None = None  # of those that are held back


class Crowds:
    """Holds back what further workers say of the same.

    Args:
        clock: Tells the time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._crowds: dict[Line, _Crowd] = {}

    def take(self, pid: int, line: Line) -> bool:
        """Take a worker's record; tell whether it is held back until `settle`."""
        now = self._clock()
        key = line._replace(created=0.0, thread="", process=0)
        crowd = self._crowds.get(key)
        if crowd is None or now - crowd.since >= WINDOW:
            if crowd is not None and crowd.last is not None:
                return False  # it is about to be told of
            if len(self._crowds) >= _CROWDS_MOST:
                return False
            crowd = self._crowds[key] = _Crowd(now)
        if pid in crowd.pids:  # the worker itself folds what it repeats
            return False
        crowd.pids[pid] = None
        if len(crowd.pids) <= _SHOWN:
            return False
        crowd.last = line
        return True

    def settle(self, *, everything: bool = False) -> list[Told]:
        """Return what has been held back for long enough; forget what is over."""
        now, found = self._clock(), []
        for key, crowd in list(self._crowds.items()):
            if everything or now - crowd.since >= WINDOW:
                del self._crowds[key]
                if crowd.last is not None:
                    pids = tuple(crowd.pids)[_SHOWN:]
                    many = f"{len(pids)} more workers" if len(pids) > 1 else "1 more worker"
                    line = crowd.last._replace(text=f"{many}: {crowd.last.text}")
                    found.append(Told(line, pids))
        return found

    def __len__(self) -> int:
        return len(self._crowds)
