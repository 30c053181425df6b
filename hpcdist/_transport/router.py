"""Peers: one object for each process we talk to, and the one place that decides the route.

Same world: MPI. Anyone else: the link. Nothing above this module knows which it was.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from hpcdist._transport.contracts import Item, Plane, Way
from hpcdist._transport.wait_loop import WaitLoop
from hpcdist._wire import messages
from hpcdist._wire.frames import CONTROL, FRAME_MAX, HEAD, Body, Buffer, pack
from hpcdist._wire.messages import ACKNOWLEDGE, RELEASE

_head = HEAD.pack

T = TypeVar("T")

_TRIPLE = struct.Struct("<QQq")
_TRIPLES = 2000  # in one message


class Holder(Protocol):
    """A handle of something that lives elsewhere, and how often it holds that."""

    _held: int


class Peer:
    """A process we talk to.

    What is in lists any thread appends to, and the driver alone takes out: see `_all_of`. A deque
    takes 600 bytes with nothing in it, and a process of a large cluster knows thousands of others.
    """

    def __init__(self, pid: int, progress: WaitLoop) -> None:
        self.pid = pid
        self.alive = True
        self.rank = -1
        self.link: Way | None = None
        self.plane: Plane | None = None
        self.outbox: deque[Item] = deque()
        self.size = 0
        self.sent = 0  # bytes, all told
        self.calls = 0  # of this process, but for those whose caller waits
        self.next_mark = 0  # bytes, with 1 KB for each of those calls: see `pacing`
        self.queued = False
        self.flushed = 0
        self.answered = 0  # the last call it has answered while others waited for it,
        self.answered_at = 0.0  # and when that was
        self.known: set[int] = set()  # ids of functions it has the definition of
        self.bound: dict[str, Any] = {}  # globals of __main__ as it was last told
        self.released: list[tuple[int, int, int]] = []  # references to count down there
        self.taken: list[int] = []  # takes from its channels that are to be acknowledged
        self.has_acknowledged = False  # some, ever
        self.reach: Callable[[Peer], None] | None = None  # dials where there is no link yet
        self._progress = progress
        self._clock = progress.machine.clock

    def post(
        self,
        data: bytes,
        buffers: Sequence[Buffer] = (),
        end: Callable[[], None] | None = None,
        holder: Holder | None = None,
    ) -> None:
        """Put a message into the outbox; the driver flushes it before any wait.

        Args:
            data: Header and body.
            buffers: What follows them.
            end: Called by the driver once the buffers are the sender's again.
            holder: A handle that holds what the message lets its receiver make, once it is in.
        """
        try:
            item: Item = data
            if buffers:
                item = (data, buffers, end)
                self.sent += sum(memoryview(buffer).nbytes for buffer in buffers)
            if holder is not None:
                holder._held = 1  # one act with the next line: an interrupt comes behind a call
            self.outbox.append(item)
            self.size += len(data)
        finally:  # an interrupt may come behind `append`: what is in there has to leave
            if not self.queued:
                self.queued = True
                self._progress.dirty.append(self)

    def acknowledge(self, ident: int) -> None:
        """Tell that a taken item has come: along with the next message, or with the next flush."""
        self.taken.append(ident)
        if not self.queued:
            self.queued = True
            self._progress.dirty.append(self)

    def dispatch(self, data: bytes) -> None:
        """Send one message now if the way is free; for a thread that waits next."""
        progress = self._progress
        if self.plane is None or self.outbox or not progress.seize():
            self.post(data)
            progress.flush()
            return
        try:
            if self.taken:
                self.has_acknowledged = True
            while self.taken:  # behind the message, which is what somebody waits for
                data += _head(CONTROL, 0, 0, 0, self.taken.pop(), ACKNOWLEDGE)
            self.plane.send_frame(self.rank, data)
            self.sent += len(data)
        finally:
            progress.let_go()

    def answer(self, data: bytes) -> None:
        """Send one message now if the way is free; for handlers, as the driver runs them."""
        if self.plane is None or self.outbox:
            self.post(data)
        else:
            self.plane.send_frame(self.rank, data)
            self.sent += len(data)

    def send_now(self, data: bytes) -> None:
        """Send one message now, by any way. Only for the thread that holds the wheel."""
        self.answer(data)
        if self.outbox:
            self.flush()

    def hurry(self) -> None:
        """Flush now, unless messages follow so closely that gathering them pays."""
        if self.size > FRAME_MAX or self._clock() - self.flushed > self._progress.linger:
            self._progress.nudge()
        else:
            self._progress.soon()

    def send(
        self,
        message: NamedTuple,
        ident: int = 0,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
    ) -> None:
        """Post a control."""
        self.post(*messages.packed(message, ident, body, buffers))

    def flush(self) -> None:
        """Hand the outbox to the route. Called by the driver alone."""
        if self.released:
            self._release()
        outbox = self.outbox
        items = []
        while outbox:
            items.append(outbox.popleft())
        if self.taken:
            items += self._acknowledgements()
        self.sent += self.size
        self.size = 0
        if not items or not self.alive:
            _end(items)
            return
        if self.plane is not None:
            self.plane.send(self.rank, items)
        elif self.link is not None:
            self.link.send(items)
        else:  # no way yet: making one flushes again
            outbox.extendleft(reversed(items))
            if self.reach is not None:
                self.reach(self)
        self.flushed = self._clock()

    def drop(self) -> None:
        """Forget what was to be sent: the process is dead."""
        items = []
        while self.outbox:
            items.append(self.outbox.popleft())
        self.taken.clear()
        _end(items)

    def _release(self) -> None:
        released = _all_of(self.released)
        for start in range(0, len(released), _TRIPLES):
            self._post_release([_TRIPLE.pack(*r) for r in released[start : start + _TRIPLES]])

    def _acknowledgements(self) -> list[bytes]:
        self.has_acknowledged = True
        return [_head(CONTROL, 0, 0, 0, ident, ACKNOWLEDGE) for ident in _all_of(self.taken)]

    def _post_release(self, parts: list[bytes]) -> None:
        data, buffers = pack(CONTROL, 0, 0, RELEASE, b"".join(parts))
        self.outbox.append((data, buffers, None) if buffers else data)


def _all_of(things: list[T]) -> list[T]:
    """Take all out of a list; what others append meanwhile stays. For the driver alone."""
    found = things[:]
    del things[: len(found)]
    return found


def _end(items: list[Item]) -> None:
    for item in items:
        if isinstance(item, tuple) and item[2] is not None:
            item[2]()


def triples(body: Body) -> list[tuple[int, int, int]]:
    """Read the body of a RELEASE control."""
    return list(_TRIPLE.iter_unpack(body))
