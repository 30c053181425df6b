"""Channels: queues with a capacity, within a process and between processes.

A `Channel` never blocks a thread by itself: an operation that cannot be done now is a `Waiter` in
a queue, and whoever makes it possible completes it. So a remote take costs its owner an entry in
a list, and withdrawing it (a timeout, Ctrl-C, a death) is taking the entry out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from hpcdist._errors import ChannelClosed
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload

_CLOSED = object()


class Waiter:
    """An operation that waits for its moment. `done(value)` ends it, or `done(_CLOSED)`."""

    __slots__ = ("done", "item", "pid")

    def __init__(self, done: Callable[[Any], None], item: Any = None, pid: int = 0) -> None:
        self.done = done
        self.item = item
        self.pid = pid


class Channel:
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

    def __init__(self, size: int = 0) -> None:
        if size < 0:
            raise ValueError(f"a channel's size is 0 or more, not {size}")
        self.size = size
        self._lock = threading.Lock()  # guards all below
        self._items: deque[Any] = deque()
        self._takers: deque[Waiter] = deque()
        self._peekers: deque[Waiter] = deque()  # fetch and wait: they take nothing
        self._putters: deque[Waiter] = deque()
        self._open = True

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<Channel of size {self.size}, {len(self._items)} items, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Channel belongs to its process and cannot be sent; send a RemoteChannel instead"
        )

    # What everything else is made of. Each returns at once; `waiter.done` may be called at once.

    def try_put(self, item: Any) -> bool:
        """Put an item if that can be done at once and nobody waits; else do nothing."""
        with self._lock:
            if not self._open or self._takers or self._peekers or len(self._items) >= self.size:
                return False
            self._items.append(item)
            return True

    def try_take(self) -> tuple[Any] | None:
        """Take the oldest item if there is one and nobody waits to put another."""
        with self._lock:
            if not self._items or self._putters:
                return None
            return (self._items.popleft(),)

    def start_put(self, waiter: Waiter) -> None:
        """Put `waiter.item`, now or when there is room."""
        ended: list[tuple[Waiter, Any]] = []
        with self._lock:
            if not self._open:
                ended.append((waiter, _CLOSED))
            elif self._takers:
                ended.append((self._takers.popleft(), waiter.item))
                ended.append((waiter, None))
            elif len(self._items) < self.size:
                self._items.append(waiter.item)
                ended.append((waiter, None))
                ended.extend(self._shown(waiter.item))
            else:
                self._putters.append(waiter)
                ended.extend(self._shown(waiter.item))
        _end(ended)

    def start_take(self, waiter: Waiter) -> None:
        """Take the oldest item, now or when there is one."""
        ended: list[tuple[Waiter, Any]] = []
        with self._lock:
            if self._items:
                ended.append((waiter, self._items.popleft()))
                if self._putters:
                    putter = self._putters.popleft()
                    self._items.append(putter.item)
                    ended.append((putter, None))
            elif self._putters:
                putter = self._putters.popleft()
                ended.append((waiter, putter.item))
                ended.append((putter, None))
            elif not self._open:
                ended.append((waiter, _CLOSED))
            else:
                self._takers.append(waiter)
        _end(ended)

    def start_peek(self, waiter: Waiter) -> None:
        """Look at the oldest item without taking it, now or when there is one."""
        value = _CLOSED
        with self._lock:
            if self._items:
                value = self._items[0]
            elif self._putters:
                value = self._putters[0].item
            elif self._open:
                self._peekers.append(waiter)
                return
        waiter.done(value)

    def _shown(self, item: Any) -> list[tuple[Waiter, Any]]:
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

    def withdraw_all(self, pid: int) -> None:
        """Take back what a dead process was waiting for."""
        with self._lock:
            for queue in (self._takers, self._putters, self._peekers):
                for waiter in [w for w in queue if w.pid == pid]:
                    queue.remove(waiter)

    def give_back(self, item: Any) -> None:
        """Put an item back at the front: whoever took it never got it."""
        ended: list[tuple[Waiter, Any]] = []
        with self._lock:
            if self._takers:
                ended.append((self._takers.popleft(), item))
            else:
                self._items.appendleft(item)
                ended.extend(self._shown(item))
        _end(ended)

    # The operations

    def put(self, value: Any, *, timeout: float | None = None) -> None:
        """Add an item; wait for room.

        Raises:
            ChannelClosed: The channel is closed, or was while we waited.
            TimeoutError: There was no room in time; nothing was added.
        """
        self._wait_for(self.start_put, value, timeout)

    def take(self, *, timeout: float | None = None) -> Any:
        """Remove and return the oldest item; wait for one."""
        return _opened(self._wait_for(self.start_take, None, timeout))

    def fetch(self, *, timeout: float | None = None) -> Any:
        """Return the oldest item without removing it; wait for one."""
        return _opened(self._wait_for(self.start_peek, None, timeout))

    def wait(self, *, timeout: float | None = None) -> None:
        """Wait until there is an item."""
        self._wait_for(self.start_peek, None, timeout)

    def _wait_for(self, start: Callable[[Waiter], None], item: Any, timeout: float | None) -> Any:
        slot = Slot()

        def done(value: Any) -> None:
            slot.value = value
            node.complete(slot)

        waiter = Waiter(done, item)
        start(waiter)
        try:
            node.wait(slot, timeout)
        except BaseException:
            taken = not self.withdraw(waiter) and slot.value is not _CLOSED
            if taken and start == self.start_take:
                self.give_back(slot.value)
            raise
        return _not_closed(slot.value)

    def isready(self) -> bool:
        """Tell whether there is an item now."""
        with self._lock:
            return bool(self._items or self._putters)

    def isempty(self) -> bool:
        """Tell whether there is no item now."""
        return not self.isready()

    def isopen(self) -> bool:
        """Tell whether the channel takes items."""
        return self._open

    def close(self) -> None:
        """Take no more items; those inside can still be taken, everybody who waits is told."""
        with self._lock:
            self._open = False
            ended = [(w, _CLOSED) for w in (*self._takers, *self._putters, *self._peekers)]
            for queue in (self._takers, self._putters, self._peekers):
                queue.clear()
        _end(ended)

    def __len__(self) -> int:
        return len(self._items)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.take()
            except ChannelClosed:
                return
            yield value


def _end(ended: list[tuple[Waiter, Any]]) -> None:
    for waiter, value in ended:
        waiter.done(value)


def _not_closed(value: Any) -> Any:
    if value is _CLOSED:
        raise ChannelClosed
    return value


def _opened(value: Any) -> Any:
    """Unpickle an item that came from another process, or that a remote channel keeps."""
    if isinstance(value, Payload):
        return codec.loads(value.body, value.buffers) if len(value.body) else None
    return value
