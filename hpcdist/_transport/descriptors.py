"""The descriptors the driver watches, each with its handler, and one of ours to wake it by."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Handler = Callable[[int], None]


class Descriptors:
    """What one driver watches; opened before its first sleep."""

    def __init__(self) -> None:
        self.epoll: Any = None
        self._wake = -1
        self._handlers: dict[int, Handler] = {}

    def open(self) -> None:
        """Make the epoll and the descriptor that wakes it."""
        self.epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.register(self._wake, lambda _: drain(self._wake), select.EPOLLIN)

    def close(self) -> None:
        """Close both, and forget what was watched."""
        self.epoll.close()
        os.close(self._wake)
        self._handlers.clear()

    def register(self, fd: int, handler: Handler, events: int) -> None:
        """Watch a descriptor; the driver calls `handler(events)`."""
        self._handlers[fd] = handler
        self.epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Watch a registered descriptor for other events."""
        self.epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Stop watching a descriptor."""
        if self._handlers.pop(fd, None) is not None:
            with suppress(OSError, ValueError):  # closed already
                self.epoll.unregister(fd)

    def handle(self, fd: int, events: int) -> None:
        """Let the handler of a descriptor act."""
        handler = self._handlers.get(fd)
        if handler is not None:
            safely(handler, events)

    def wake(self) -> None:
        """Wake whoever sleeps on them."""
        os.eventfd_write(self._wake, 1)


def safely(fn: Callable[..., None], *args: Any) -> None:
    """Call a handler; its fault must neither end the helper nor hit whoever happens to wait."""
    try:
        fn(*args)
    except Exception:
        sys.excepthook(*sys.exc_info())


def drain(fd: int) -> None:
    """Take what was written to an eventfd."""
    with suppress(BlockingIOError):
        os.eventfd_read(fd)
