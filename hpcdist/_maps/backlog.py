"""What a map has still to run: what came back or failed, and what nobody has had yet."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from hpcdist._maps.lanes import IN_FLIGHT
from hpcdist._maps.sources import Part, Source

_AHEAD = 512  # items of an iterator consumed ahead, for each worker
_AHEAD_KNOWN = 1 << 16  # the same for what is consumed by slicing: here it bounds the results kept
NEVER = float("inf")


class Backlog:
    """The items that no worker has now.

    Args:
        source: The items.
        unit: How many items belong together.
    """

    def __init__(self, source: Source, unit: int) -> None:
        self.source = source
        self.done = 0  # items whose results are filed
        self.look_ahead: Callable[[], int] | None = None  # how many items have been asked for
        self._parts: deque[Part] = deque()  # handed back, or to run again
        self._later: list[tuple[float, int, Part]] = []  # to be tried again, by time
        self._unit = unit

    @property
    def has_returned(self) -> bool:
        """Whether there are items that some worker has had already."""
        return bool(self._parts or self._later)

    @property
    def is_empty(self) -> bool:
        """Whether no item is left."""
        return not self._parts and not self._later and self.source.ended

    @property
    def is_handed_out(self) -> bool:
        """Whether there is nothing to take now."""
        return not self._parts and self.source.ended

    @property
    def has_killers(self) -> bool:
        """Whether there are items that may have ended a worker."""
        return bool(self._parts) and any(part.alone for part in self._parts)

    @property
    def parts(self) -> Sequence[Part]:
        """What has been handed back, or is to run again."""
        return self._parts

    def put(self, part: Part, ran: int = 0) -> None:
        """Take back what of a part has not run."""
        if ran < part.size:
            self._parts.append(part.cut(ran, part.size, alone=part.alone))

    def put_apart(self, part: Part, begin: int, end: int) -> None:
        """Take back a part, the items from `begin` to before `end` one by one."""
        self.put(part.cut(0, begin))
        for k in range(begin, end):
            self.put(part.cut(k, k + 1, alone=True))
        self.put(part, end)

    def put_later(self, at: float, item: Part) -> None:
        """Have an item tried again at a time."""
        heapq.heappush(self._later, (at, item.start, item))

    @property
    def next_due(self) -> float:
        """When the next item is to be tried again."""
        return self._later[0][0] if self._later else NEVER

    def wake(self, now: float) -> None:
        """Take up the items whose time to be tried again has come."""
        while self._later and self._later[0][0] <= now:
            self._parts.append(heapq.heappop(self._later)[2])

    def drop_from(self, end: int) -> None:
        """Drop all items but those before one, and take no more."""
        self.source.ended = True
        parts = [p.cut(0, max(0, end - p.start), alone=p.alone) for p in self._parts]
        self._parts = deque(p for p in parts if p.size)
        self._later = [entry for entry in self._later if entry[2].start < end]
        heapq.heapify(self._later)

    def take(self, size: int, lanes: int, fits: Callable[[Part], bool]) -> Part | None:
        """Take the next items; None if there are none now.

        Args:
            size: How many, at most.
            lanes: How many workers share them.
            fits: Tells whether some that came back may go to this worker.
        """
        k = None
        if self._parts:
            k = next((k for k, part in enumerate(self._parts) if fits(part)), None)
        if k is not None:
            part = self._parts[k]
            if part.alone or part.size <= size:
                del self._parts[k]
                return part
            self._parts[k] = part.cut(size, part.size)
            return part.cut(0, size)
        if self.source.ended:
            return None
        if self.look_ahead is not None or self.source.is_lazy:
            room = self._room(lanes)
            if room <= 0:
                return None
            size = min(size, max(room // self._unit, 1) * self._unit)
        return self.source.take(size)

    def waiting(self, lanes: int) -> int:
        """Count the items that more workers could begin with. Any thread may ask.

        Of what is consumed no further than it has to be, only so many.
        """
        back = sum(part.size for part in list(self._parts)) + len(self._later)
        left = self.source.left
        if self.source.ended:
            return back
        if left is not None and self.look_ahead is None:
            return back + left
        room = max(0, self._room(max(lanes, 1)))
        return back + (room if left is None else min(room, left))

    def _room(self, lanes: int) -> int:
        """Return how many more items may be taken from the collections.

        Never further ahead than the map has come, so that little is consumed in vain if it ends
        soon, and never further than a constant.
        """
        come = self.done if self.look_ahead is None else self.look_ahead()
        least = IN_FLIGHT * lanes * self._unit
        most = lanes * max(_AHEAD if self.source.is_lazy else _AHEAD_KNOWN, 2 * self._unit)
        return come + max(least, min(most, come)) - self.source.taken


class Retries:
    """How often the items of a map have failed, and when they are tried again.

    Args:
        delays: The delays before an item is tried again, drawn as they are needed.
        check: Tells whether it is.
    """

    def __init__(
        self, delays: Iterable[float] = (), check: Callable[[BaseException], object] | None = None
    ) -> None:
        self._rest = iter(delays)
        self._drawn: list[float] = []
        self._check = check
        self._tries: dict[int, int] = {}  # by index
        self._where: dict[int, int] = {}  # the process it failed on last, by index

    def have_failed_on(self, part: Part, pid: int) -> bool:
        """Tell whether these are an item that is to be tried again, and last failed there."""
        return part.size == 1 and self._where.get(part.start) == pid

    def delay(self, item: Part, error: BaseException, pid: int) -> float | None:
        """Return how long to wait after an item's failure; None: it is not tried again."""
        self._where[item.start] = pid
        tries = self._tries[item.start] = self._tries.get(item.start, 0) + 1
        while len(self._drawn) < tries:
            try:
                self._drawn.append(max(0.0, float(next(self._rest))))
            except StopIteration:
                return None
        if self._check is not None and not self._check(error):
            return None
        return self._drawn[tries - 1]
