"""Channels: queues with a capacity, within a process and between processes.

A `Channel` never blocks a thread by itself: an operation that cannot be done now is a `Waiter` in
a queue, and the operation that makes it possible completes it. So a remote take costs its owner an
entry in a list, and withdrawing it (a timeout, Ctrl-C, a death) is taking the entry out.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from hpcdist._errors import ChannelClosed
from hpcdist._frames import brief, cut
from hpcdist._hints import Hinting
from hpcdist._public import public
from hpcdist._runtime.node import here
from hpcdist._transport.contracts import Slot
from hpcdist._transport.interrupts import Section
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload

CLOSED = object()  # in place of an item: there is none, and none will come


class Waiter:
    """An operation that waits for its moment, and is then ended.

    Args:
        done: Called at its end with the number of the item that was taken (its place, should it
            be given back; else 0) and the value, or `CLOSED`.
        item: What is put.
    """

    __slots__ = ("_done", "item", "number")

    def __init__(self, done: Callable[[int, Any], None], item: Any = None) -> None:
        self._done = done
        self.item = item
        self.number = 0

    def done(self, value: object) -> None:
        """End it."""
        self._done(self.number, value)


Ended = tuple[Waiter, object]  # one whose moment has come, and what it gets


# What queues have, and how it is written here.
ELSEWHERE = {
    **dict.fromkeys(("get", "recv", "pop", "popleft"), "channel.take()"),
    **dict.fromkeys(("send", "append"), "channel.put(x)"),
    "get_nowait": "channel.take(timeout=0)",
    "put_nowait": "channel.put(x, timeout=0)",
    "peek": "channel.fetch()",
    "qsize": "channel.isready() says whether there is an item; a local Channel has a len()",
    "empty": "channel.isempty()",
    "full": "channel.put(x, timeout=0) raises TimeoutError where there is no room",
    **dict.fromkeys(("task_done", "join"), "channel.close(), which ends iteration"),
}


@public
class Channel(Hinting):
    """A queue of limited size for the threads and calls of one process.

    Args:
        size: How many items it holds before `put` blocks; 0: a put waits for its take.

    Example:
        >>> import hpcdist
        >>> c = hpcdist.Channel(2)
        >>> c.put("a"); c.put("b")
        >>> c.take(), len(c)
        ('a', 1)
    """

    _elsewhere = ELSEWHERE

    def __init__(self, size: int = 0) -> None:
        self._node = here.node
        self._node.admit()
        if size < 0:
            raise ValueError(f"a channel's size is 0 or more, not {size}")
        self.size = size
        self._interrupts = self._node.progress.interrupts
        self._lock = self._node.machine.lock()  # guards all below
        self._items: deque[Any] = deque()
        self._returned: list[tuple[int, Any]] = []  # a heap of items given back: before all others
        self._taken = 0  # the number of the item that was taken last, given back ones apart
        self._takers: deque[Waiter] = deque()
        self._peekers: deque[Waiter] = deque()  # fetch and wait: they take nothing
        self._putters: deque[Waiter] = deque()
        self._open = True

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<Channel of size {self.size}, {len(self)} items, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Channel belongs to its process and cannot be sent; send a RemoteChannel instead"
        )

    # What everything else is made of. Each returns at once; `waiter.done` may be called at once.

    def try_put(self, item: object) -> bool:
        """Put an item if there is room and no putter waits; else do nothing."""
        with self._lock:
            if not self._open or self._takers or self._peekers or len(self) >= self.size:
                return False
            self._items.append(item)
            return True

    def try_take(self) -> tuple[int, Any] | None:
        """Take the oldest item and its number if there is one and no putter waits."""
        with self._lock:
            if not self._items or self._putters or self._returned:
                return None
            self._taken += 1
            return self._taken, self._items.popleft()

    def start_put(self, waiter: Waiter) -> None:
        """Put `waiter.item`, now or when there is room."""
        ended: list[Ended] = []
        with self._lock:
            if not self._open:
                ended.append((waiter, CLOSED))
            elif self._takers:
                ended.append((self._numbered(self._takers.popleft()), waiter.item))
                ended.append((waiter, None))
            elif len(self) < self.size:
                self._items.append(waiter.item)
                ended.append((waiter, None))
                ended.extend(self._shown(waiter.item))
            else:
                self._putters.append(waiter)
                ended.extend(self._shown(waiter.item))
        _end(ended)

    def start_take(self, waiter: Waiter) -> None:
        """Take the oldest item, now or when there is one."""
        ended: list[Ended] = []
        with self._lock:
            if self._returned:
                waiter.number, item = heapq.heappop(self._returned)
                ended.append((waiter, item))
            elif self._items:
                ended.append((self._numbered(waiter), self._items.popleft()))
            elif self._putters:
                putter = self._putters.popleft()
                ended.append((self._numbered(waiter), putter.item))
                ended.append((putter, None))
            elif not self._open:
                ended.append((waiter, CLOSED))
            else:
                self._takers.append(waiter)
            if self._putters and len(self) < self.size:
                putter = self._putters.popleft()
                self._items.append(putter.item)
                ended.append((putter, None))
        _end(ended)

    def _numbered(self, taker: Waiter) -> Waiter:
        self._taken += 1
        taker.number = self._taken
        return taker

    def start_peek(self, waiter: Waiter) -> None:
        """Look at the oldest item without taking it, now or when there is one."""
        value = CLOSED
        with self._lock:
            if self._returned:
                value = self._returned[0][1]
            elif self._items:
                value = self._items[0]
            elif self._putters:
                value = self._putters[0].item
            elif self._open:
                self._peekers.append(waiter)
                return
        waiter.done(value)

    def _shown(self, item: object) -> list[Ended]:
        ended = [(peeker, item) for peeker in self._peekers]
        self._peekers.clear()
        return ended

    def withdraw(self, waiter: Waiter) -> bool:
        """Take a waiting operation back; tell whether it was still waiting."""
        with self._lock:
            for queue in (self._takers, self._putters, self._peekers):
                if waiter in queue:
                    queue.remove(waiter)
                    return True
        return False

    def give_back(self, number: int, item: object) -> None:
        """Put an item back in its old place: its taker gave up."""
        ended: list[Ended] = []
        with self._lock:
            if self._takers:
                taker = self._takers.popleft()
                taker.number = number
                ended.append((taker, item))
            else:
                heapq.heappush(self._returned, (number, item))
                ended.extend(self._shown(item))
        _end(ended)

    # The operations

    def put(self, value: object, *, timeout: float | None = None) -> None:
        """Add an item; wait for room.

        Raises:
            ChannelClosed: The channel is closed, or was while we waited.
            TimeoutError: There was no room in time; nothing was added.
            KeyboardInterrupt: Ctrl-C, or `interrupt()`; nothing was added. One that comes when the
                item has been added is raised after `put` has returned.
        """
        try:  # not @brief: CPython 3.11 looks for signals after a call with `*`
            with self._interrupts.section() as section:
                if not self.try_put(value):
                    self._wait_for(section, self.start_put, value, timeout)
                section.succeed()
        except BaseException as exc:
            cut(exc)
            raise

    def take(self, *, timeout: float | None = None) -> Any:
        """Remove and return the oldest item; wait for one.

        An interrupt (Ctrl-C, `interrupt()`) loses nothing: the item goes back to its place.
        """
        try:  # not @brief: CPython 3.11 looks for signals after a call with `*`
            with self._interrupts.section() as section:
                taken = self.try_take()
                if taken is None:
                    taken = self._wait_for(section, self.start_take, None, timeout)
                number, item = taken
                try:
                    value = section.openly(_opened, item) if isinstance(item, Payload) else item
                    section.decide()
                except BaseException:
                    self.give_back(number, item)
                    raise
                return value
        except BaseException as exc:
            cut(exc)
            raise

    @brief
    def fetch(self, *, timeout: float | None = None) -> Any:
        """Return the oldest item without removing it; wait for one."""
        with self._interrupts.section() as section:
            _, item = self._wait_for(section, self.start_peek, None, timeout)
        return _opened(item)

    @brief
    def wait(self, *, timeout: float | None = None) -> None:
        """Wait until there is an item."""
        with self._interrupts.section() as section:
            self._wait_for(section, self.start_peek, None, timeout)

    def _wait_for(
        self,
        section: Section,
        start: Callable[[Waiter], None],
        item: object,
        timeout: float | None,
    ) -> tuple[int, Any]:
        """Begin an operation and wait for its end; an error means that nothing was done.

        Returns:
            The number of the item that was taken, and the item.
        """
        node = self._node
        slot = Slot()

        def done(number: int, value: object) -> None:
            slot.value = (number, value)
            node.complete(slot)

        waiter = Waiter(done, item)
        start(waiter)
        try:
            node.wait(slot, timeout)
        except BaseException as exc:
            if self.withdraw(waiter):
                raise
            node.wait_out(slot, section, exc)  # done, or just being done by another thread
        number, value = slot.value
        if value is CLOSED:
            raise ChannelClosed
        return number, value

    def isready(self) -> bool:
        """Tell whether there is an item now."""
        with self._lock:
            return bool(self._items or self._returned or self._putters)

    def isempty(self) -> bool:
        """Tell whether there is no item now."""
        return not self.isready()

    def isopen(self) -> bool:
        """Tell whether the channel takes items."""
        return self._open

    def close(self) -> None:
        """Take no more items; those inside can still be taken, and waiters get the error."""
        with self._lock:
            self._open = False
            ended = [(w, CLOSED) for w in (*self._takers, *self._putters, *self._peekers)]
            for queue in (self._takers, self._putters, self._peekers):
                queue.clear()
        _end(ended)

    def __len__(self) -> int:
        return len(self._items) + len(self._returned)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.take()
            except ChannelClosed:
                return
            yield value


def _end(ended: list[Ended]) -> None:
    for waiter, value in ended:
        waiter.done(value)


def _opened(value: object) -> Any:
    """Unpickle an item that came from another process, or that a remote channel keeps."""
    if isinstance(value, Payload):
        return codec.loads(value.body, value.buffers) if len(value.body) else None
    return value
