"""The descriptors the driver watches, each with its handler, and one of ours to wake it by."""

from __future__ import annotations

import os
import resource
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Handler = Callable[[int], None]
_SPARE = 64  # descriptors that the user's program may open meanwhile


def make_room(more: int) -> int:
    """Have this process open so many descriptors more; return how many it lacks for that.

    The soft limit is raised as far as it has to be, and as far as the hard one lets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/proc/self/fd")) + more + _SPARE
    if soft == resource.RLIM_INFINITY or need <= soft:
        return 0
    if hard == resource.RLIM_INFINITY or need <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
        return 0
    return need - hard


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
        """Wake the thread that sleeps on them."""
        os.eventfd_write(self._wake, 1)


class Bed:
    """Where the helper sleeps: on an epoll of its own around the common one.

    A kick meant for it must not be eaten by a driver that polls at the same moment; and what comes
    for that driver must not wake it.
    """

    def __init__(self, watched: Descriptors) -> None:
        self._common: int = watched.epoll.fileno()
        self._kicks = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._common, select.EPOLLIN)
        self._epoll.register(self._kicks, select.EPOLLIN)
        self._listens = True

    def close(self) -> None:
        """Take it away."""
        self._epoll.close()
        os.close(self._kicks)
        self._kicks = -1  # another file may get the number

    def listen(self, listens: bool) -> None:
        """Let data for the driver wake the sleeper, or not."""
        if listens != self._listens:
            self._listens = listens
            with suppress(OSError, ValueError):  # closed already
                self._epoll.modify(self._common, select.EPOLLIN if listens else 0)

    def sleep(self, timeout: float) -> None:
        """Sleep until something comes, or a kick."""
        if any(fd == self._kicks for fd, _ in self._epoll.poll(timeout)):
            drain(self._kicks)

    def kick(self) -> None:
        """Wake the helper."""
        with suppress(OSError):  # closed already
            os.eventfd_write(self._kicks, 1)


def safely(fn: Callable[..., None], *args: object) -> None:
    """Call a handler; its fault must neither end the helper nor hit the thread that waits."""
    try:
        fn(*args)
    except Exception:
        sys.excepthook(*sys.exc_info())


def drain(fd: int) -> None:
    """Take what was written to an eventfd."""
    with suppress(BlockingIOError):
        os.eventfd_read(fd)
