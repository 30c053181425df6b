"""What the engine of a map knows of each worker, and of each batch in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._maps.map_worker import BUDGET
from hpcdist._maps.sources import Part
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Waitable
from hpcdist._wire.frames import Body, Buffer

IN_FLIGHT = 2  # batches a lane holds
_GROWTH = 64  # the most a batch grows at a time: items differ
LEAST = 0.0004  # seconds of work for which a batch is not made smaller still
ORDER = 64  # bytes of a batch's order that are no item: names, numbers, the seed
_BYTES = 1 << 20  # arguments or results for which it is not made larger
PATIENCE = 4 * BUDGET  # an "auto" batch that takes this long has overrun
LOOK_AGAIN = 0.002  # seconds
_UNANSWERED = 1.0
_REST, _REST_MOST = 0.01, 0.5


class Batch(Waitable):
    """A call in flight. The driver files it when its answer is there."""

    def __init__(self, lane: Lane, ident: int, part: Part, sent: float, called: str = "") -> None:
        self.called = called
        self.since = sent
        self.lane = lane
        self.where = lane.pid
        self.ident = ident
        self.start = part.start
        self.part = part  # without what was handed over, or back
        self.sent = sent
        self.filed = 0  # how many of its results were handed over

    def arrived(self) -> None:
        """Tell the engine. Called by the driver."""
        self.lane.note(self)


class Early:
    """Results of a batch that goes on, as they have come."""

    def __init__(self, batch: Batch, first: int, body: Body, buffers: Sequence[Buffer]) -> None:
        self.lane = batch.lane
        self.batch = batch
        self.first = first  # which of the batch's items the first of them belongs to
        self.body = body
        self.buffers = buffers


class Question(Waitable):
    """A request to hand items back, in flight."""

    def __init__(self, lane: Lane, ident: int) -> None:
        self.lane = lane
        self.ident = ident
        self.where = lane.pid

    def arrived(self) -> None:
        """Tell the engine. Called by the driver."""
        self.lane.note(self)


class Lane:
    """One worker, as the engine sees it."""

    def __init__(self, pid: int, node: Node, note: Callable[[Any], None]) -> None:
        self._now = node.machine.now
        self.note = note  # tells the engine that something has happened
        self.pid = pid
        self.is_driver = pid == node.me == 1  # process 1, which runs the map itself
        self.batches: list[Batch] = []  # in flight, the oldest first
        self.told = False  # it has been sent the function
        self.shares = True  # it can open memory of ours, as far as we know
        self.on_board = False  # it says on the board what it runs
        self.open = True  # it may be given more
        self.asked = 0.0  # when items were last asked back
        self.vain = 0  # how often taking back brought none
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

    def takes_more(self, now: float) -> bool:
        """Tell whether it may be given more now."""
        free = not self.batches or (len(self.batches) < IN_FLIGHT and not self.stuck)
        return self.open and free and self.rests_until <= now

    def rest(self) -> None:
        """Get nothing for a while: what was sent has not been started."""
        self.rests_until = self._now() + self._rest
        self._rest = min(2 * self._rest, _REST_MOST)

    def may_be_asked_at(self) -> float:
        """Return when items may be asked back, as others could do with them.

        What will be done in a moment is not worth asking for. A single item runs already, unless
        the worker is busy with something else.
        """
        expected = self.seconds * self.items if self.seconds is not None else 0.0
        at = 0.0
        if self.items < 2:
            at = self.since + PATIENCE
        elif expected < 2 * LEAST:
            at = self.since + LOOK_AGAIN
        if self.asked:
            # Who is stopped, or stuck in C, does not answer for long.
            pause = PATIENCE * 2 ** min(self.vain, 5)
            at = max(at, self.asked + (_UNANSWERED if self.questions else pause))
        return at

    def answered(self) -> None:
        """Take note that a batch has ended."""
        self.since = self._now()
        self.stuck = False
        self.asked = 0.0
        self.vain = 0
        self._rest = _REST

    def trust(self, seconds: float | None) -> None:
        """Begin with as many items as what is known of them allows."""
        if seconds is not None:
            self.last = max(1, int(BUDGET / max(seconds, 2e-8)) // _GROWTH)

    def size(self, unit: int, left: int | None, lanes: int, seconds: float | None) -> int:
        """Return how many items its next batch has.

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


def is_alive(pid: int, node: Node) -> bool:
    """Tell whether a process can be sent batches."""
    if pid == node.me:
        return True
    peer = node.peers.get(pid)
    return peer is not None and peer.alive and (pid == 1 or pid in node.members.living)
