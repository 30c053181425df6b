"""Peers: one object for each process we talk to, and the one place that decides the route.

Same world: MPI. Anyone else: the link. Nothing above this module knows which it was.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._transport.link import Link
from hpcdist._transport.mpi import Item, MpiPlane
from hpcdist._transport.progress import Progress
from hpcdist._wire.frames import CONTROL, FRAME_MAX, HEAD, Buffer, pack

_clock = time.perf_counter_ns
_head = HEAD.pack

# The controls that peers gather themselves; all others are in `_runtime/controls.py`.
RELEASE = 1  # references counted down: triples (whence, id, n)
ACKNOWLEDGE = 12  # an item that was taken has come: the id of the take
_TRIPLE = struct.Struct("<QQq")


class Peer:
    """A process we talk to."""

    def __init__(self, pid: int, progress: Progress) -> None:
        self.pid = pid
        self.alive = True
        self.rank = -1
        self.link: Link | None = None
        self.plane: MpiPlane | None = None
        self.outbox: deque[Item] = deque()
        self.size = 0
        self.queued = False
        self.flushed = 0
        self.known: set[int] = set()  # ids of functions it has the definition of
        self.bound: dict[str, Any] = {}  # globals of __main__ as it was last told
        self.released: deque[tuple[int, int, int]] = deque()  # references to count down there
        self.taken: deque[int] = deque()  # takes from its channels that are to be acknowledged
        self.reach: Callable[[Peer], None] | None = None  # dials where there is no link yet
        self._progress = progress

    def post(
        self,
        data: bytes,
        buffers: Sequence[Buffer] = (),
        end: Callable[[], None] | None = None,
    ) -> None:
        """Put a message into the outbox; the driver flushes it before any wait.

        Args:
            data: Header and body.
            buffers: What follows them.
            end: Called by the driver once the buffers are the sender's again.
        """
        self.outbox.append((data, buffers, end) if buffers else data)
        self.size += len(data)
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
            while self.taken:  # behind the message, which is what somebody waits for
                data += _head(CONTROL, 0, 0, 0, self.taken.popleft(), ACKNOWLEDGE)
            self.plane.send_frame(self.rank, data)
        finally:
            progress.let_go()

    def answer(self, data: bytes) -> None:
        """Send one message now if the way is free; for handlers, as the driver runs them."""
        if self.plane is None or self.outbox:
            self.post(data)
        else:
            self.plane.send_frame(self.rank, data)

    def send_now(self, data: bytes) -> None:
        """Send one message now, by whatever way; for who holds the wheel."""
        self.answer(data)
        if self.outbox:
            self.flush()

    def hurry(self) -> None:
        """Flush now, unless messages follow so closely that gathering them pays."""
        if self.size > FRAME_MAX or _clock() - self.flushed > self._progress.linger:
            self._progress.nudge()
        else:
            self._progress.soon()

    def control(
        self, op: int, ident: int = 0, body: bytes = b"", buffers: Sequence[Buffer] = ()
    ) -> None:
        """Post a control."""
        self.post(*pack(CONTROL, 0, ident, op, body, buffers))

    def flush(self) -> None:
        """Hand the outbox to the route. Called by the driver alone."""
        if self.released:
            self._release()
        outbox = self.outbox
        items = []
        while outbox:
            items.append(outbox.popleft())
        while self.taken:
            items.append(_head(CONTROL, 0, 0, 0, self.taken.popleft(), ACKNOWLEDGE))
        self.size = 0
        if not items or not self.alive:
            _end(items)
            return
        if self.plane is not None:
            self.plane.send(self.rank, items)
        elif self.link is not None:
            self.link.send(items)
        else:  # no way yet: whoever makes one flushes again
            outbox.extendleft(reversed(items))
            if self.reach is not None:
                self.reach(self)
        self.flushed = _clock()

    def drop(self) -> None:
        """Forget what was to be sent: the process is dead."""
        items = []
        while self.outbox:
            items.append(self.outbox.popleft())
        self.taken.clear()
        _end(items)

    def _release(self) -> None:
        parts = []
        while self.released:
            parts.append(_TRIPLE.pack(*self.released.popleft()))
            if len(parts) == 2000:
                self._post_release(parts)
                parts = []
        if parts:
            self._post_release(parts)

    def _post_release(self, parts: list[bytes]) -> None:
        data, buffers = pack(CONTROL, 0, 0, RELEASE, b"".join(parts))
        self.outbox.append((data, buffers, None) if buffers else data)


def _end(items: list[Item]) -> None:
    for item in items:
        if isinstance(item, tuple) and item[2] is not None:
            item[2]()


def triples(body: Any) -> list[tuple[int, int, int]]:
    """Read the body of a RELEASE control."""
    return list(_TRIPLE.iter_unpack(body))
