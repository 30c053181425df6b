"""What the wait loop asks of those it works for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, Protocol

from hpcdist._wire.blocks import NoRoom
from hpcdist._wire.frames import Buffer


class Waitable:
    """What a thread, or a message that is to be answered, waits for."""

    ready = False
    latch: Lock | None = None  # a lock its waiter sleeps on while another thread drives
    where = 0  # the process that is to answer
    called = ""  # the function, where it waits for a call
    since: float  # when that call was made, by the machine's clock: set only then
    value: Any = None
    error: BaseException | None = None

    def arrived(self) -> None:
        """Go on with what only waited for this. Called by the driver, once it is ready."""


class Slot(Waitable):
    """Something to wait for, and nothing else. `Node.complete` ends the wait."""

    # Quicker to read and to write: each call has one.
    __slots__ = ("called", "error", "latch", "ready", "since", "value", "where")

    def __init__(self, where: int = 0) -> None:
        self.ready = False
        self.latch: Lock | None = None
        self.where = where
        self.called = ""
        self.value: Any = None
        self.error: BaseException | None = None

    def failure(self) -> BaseException:
        """Hand out the error, to be raised: kept here, it and its frames would keep each other."""
        error, self.error = self.error, None
        assert error is not None
        return error


def open_latch(latch: Any) -> None:
    """Wake the sleeper on a latch."""
    with suppress(RuntimeError):  # open already
        latch.release()


# How an arrived message is handed on: peer, kind, flags, id, aux, body, buffers.
Deliver = Callable[[Any, int, int, int, int, Any, Sequence[Buffer] | NoRoom], None]
# A message: its bytes; or with buffers, and what to call once those are the sender's again.
Item = bytes | tuple[bytes, Sequence[Buffer], Callable[[], None] | None]


class Plane(Protocol):
    """A way for messages that has to be polled (MPI), to all processes of a world."""

    comm: Any  # the communicator
    peers: dict[int, Any]  # by rank
    paused: bool  # a user's thread is making a communicator
    woke: bool  # a sleeper was rung: its answer takes longer
    moved: int  # large buffers that have come or gone

    @property
    def failure(self) -> type[Exception]:
        """What its communicators raise."""

    def send(self, rank: int, items: Sequence[Item]) -> None: ...
    def send_frame(self, rank: int, frame: bytes) -> None: ...
    def rouse(self, rank: int) -> None: ...
    def poll(self) -> bool: ...
    def busy(self) -> bool: ...
    def arm(self) -> None: ...
    def disarm(self) -> None: ...
    def lose(self, rank: int) -> None: ...
    def make_comm(self, pids: Sequence[int], number: int) -> Any:
        """Make a communicator of some processes."""

    def free_comm(self, made: Any) -> None: ...


class Way(Protocol):
    """A way for messages to one process: a link, or what stands for one."""

    peer: Any
    open: bool

    @property
    def idle(self) -> bool: ...
    def send(self, items: Sequence[Item]) -> None: ...
    def begin(self) -> None: ...
    def close(self) -> None: ...
    def forget_after_fork(self) -> None: ...


class Outbox(Protocol):
    """A peer with something to send."""

    queued: bool

    def flush(self) -> None: ...
