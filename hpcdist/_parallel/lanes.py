"""What the engine of a map knows of each worker, and of each batch in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from hpcdist._parallel.batches import BUDGET
from hpcdist._parallel.sources import Part

IN_FLIGHT = 2  # batches a lane holds
_GROWTH = 64  # the most a batch grows at a time: items differ
LEAST = 0.0004  # seconds of work for which a batch is not made smaller still
_BYTES = 1 << 20  # arguments or results for which it is not made larger
_REST, _REST_MOST = 0.01, 0.5
_now = time.monotonic


class Batch:
    """A call in flight. It is its own slot: the driver files it when its answer is there."""

    __slots__ = ("error", "ident", "lane", "latch", "part", "ready", "sent", "value", "where")

    def __init__(self, lane: Lane, ident: int, part: Part) -> None:
        self.lane = lane
        self.where = lane.pid
        self.ident = ident
        self.part = part
        self.sent = _now()
        self.ready = False
        self.latch: Any = None
        self.value: Any = None
        self.error: BaseException | None = None

    def arrived(self) -> None:
        """Tell the engine. Called by the driver."""
        self.lane.note(self)


class Question:
    """A request to hand items back, in flight."""

    __slots__ = ("error", "ident", "lane", "latch", "ready", "value", "where")

    def __init__(self, lane: Lane, ident: int) -> None:
        self.lane = lane
        self.ident = ident
        self.where = lane.pid
        self.ready = False
        self.latch: Any = None
        self.value: Any = None
        self.error: BaseException | None = None

    def arrived(self) -> None:
        """Tell the engine. Called by the driver."""
        self.lane.note(self)


class Lane:
    """One worker, as the engine sees it."""

    def __init__(self, pid: int, note: Callable[[Any], None]) -> None:
        self.note = note  # tells the engine that something has happened
        self.pid = pid
        self.batches: list[Batch] = []  # in flight, the oldest first
        self.told = False  # it has been sent the function
        self.shares = True  # it can open memory of ours, as far as we know
        self.on_board = False  # it says on the board what it runs
        self.open = True  # it may be given more
        self.asked = 0.0  # when items were last asked back
        self.vain = 0  # how often that brought none
        self.questions: list[int] = []  # such requests that are not answered yet
        self.rests_until = 0.0  # its worker is busy with something else: others go first
        self._rest = _REST
        self.since = 0.0  # when its oldest batch became the one that runs
        self.stuck = False  # an item of its oldest batch takes long: nothing may wait behind it
        self.seconds: float | None = None  # an item takes
        self.nbytes = 0.0  # an item's arguments or result have
        self.last = 1  # items of its last batch

    @property
    def items(self) -> int:
        """How many items are in flight."""
        return sum(b.part.size for b in self.batches)

    def rest(self) -> None:
        """Get nothing for a while: what was sent has not been started."""
        self.rests_until = _now() + self._rest
        self._rest = min(2 * self._rest, _REST_MOST)

    def answered(self) -> None:
        """Take note that a batch has ended."""
        self.since = _now()
        self.stuck = False
        self.asked = 0.0
        self.vain = 0
        self._rest = _REST

    def trust(self, seconds: float | None) -> None:
        """Begin with as many items as what is known of them allows."""
        if seconds is not None:
            self.last = max(1, int(BUDGET / max(seconds, 2e-8)) // _GROWTH)

    def size(self, unit: int, left: int | None, lanes: int, seconds: float | None) -> int:
        """How many items its next batch has.

        Args:
            unit: Items that belong together.
            left: Items nobody has yet, where that is known.
            lanes: How many workers share them.
            seconds: What an item takes elsewhere, if anybody knows.
        """
        if self.seconds is not None:
            seconds = self.seconds
        if seconds is None:
            return unit
        seconds = max(seconds, 2e-8)
        count = BUDGET / seconds
        if left is not None:
            count = min(count, max(left / (IN_FLIGHT * lanes), LEAST / seconds))
        if self.nbytes:
            count = min(count, _BYTES / self.nbytes)
        count = min(count, _GROWTH * max(self.last, unit))
        return max(1, int(count) // unit) * unit

    def take_note(self, seconds: float, nbytes: float) -> None:
        """Learn from a batch what its items took, each."""
        old = self.seconds
        if old is None or seconds > old or seconds < old / 4:
            self.seconds = seconds  # the very first pays for imports and cold caches
        else:
            self.seconds = (seconds + old) / 2
        self.take_size(nbytes)

    def take_size(self, nbytes: float) -> None:
        """Learn how large an item's arguments or result are."""
        if nbytes > 64:
            self.nbytes = max(self.nbytes, nbytes)


class Delays:
    """The delays before an item is tried again, drawn as they are needed."""

    def __init__(self, delays: Iterable[float]) -> None:
        self._rest = iter(delays)
        self._drawn: list[float] = []

    def get(self, tries: int) -> float | None:
        """How long to wait after so many failures; None: not again."""
        while len(self._drawn) < tries:
            try:
                self._drawn.append(max(0.0, float(next(self._rest))))
            except StopIteration:
                return None
        return self._drawn[tries - 1]
