"""What the wait loop asks of those it works for."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol


class Waitable(Protocol):
    """What `Progress.wait` takes: a Slot, or a Future, which is its own slot."""

    ready: bool
    latch: Any


class Slot:
    """Something to wait for. `Progress.complete` ends the wait."""

    __slots__ = ("error", "latch", "ready", "value", "where")

    def __init__(self, where: int = 0) -> None:
        self.ready = False
        self.latch: Any = None  # a lock its waiter sleeps on while another thread drives
        self.where = where  # the process that is to answer
        self.value: Any = None
        self.error: BaseException | None = None


def open_latch(latch: Any) -> None:
    """Let whoever sleeps on a latch go on."""
    with suppress(RuntimeError):  # open already
        latch.release()


class Plane(Protocol):
    """A way for messages that has to be polled (MPI)."""

    woke: bool
    moved: int  # large buffers that have come or gone

    def poll(self) -> bool: ...
    def busy(self) -> bool: ...
    def arm(self) -> None: ...
    def disarm(self) -> None: ...


class Outbox(Protocol):
    """A peer with something to send."""

    queued: bool

    def flush(self) -> None: ...
