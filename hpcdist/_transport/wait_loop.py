"""What the house asks of the wait loop of a process. `Progress` is the real one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from hpcdist._transport.contracts import Outbox, Plane, Waitable
from hpcdist._transport.interrupts import Interrupts
from hpcdist._transport.machine import Machine


class WaitLoop(ABC):
    """Carries the messages of a process, and ends its waits.

    The thread that waits drives: it receives, calls handlers and timers, and flushes outboxes. One
    thread drives at a time. Everyone else appends to an outbox and marks it dirty.
    """

    machine: Machine
    interrupts: Interrupts
    dirty: deque[Outbox]  # those with something to send
    plane: Plane | None
    before_sleep: list[Callable[[], None]]
    linger: int  # ns: messages this close behind each other are gathered into one frame
    woke: bool  # a message went to a process that may sleep
    crowding: float  # processes of this host for each core, at least 1
    spans_hosts: bool  # the rings of MPI peers elsewhere may get lost
    # Descriptors that the driver watches: it calls `handler(events)`.
    register: Callable[[int, Callable[[int], None], int], None]
    modify: Callable[[int, int], None]
    unregister: Callable[[int], None]

    @abstractmethod
    def start(self) -> None:
        """Be ready to drive, also when no thread waits; done once."""

    @abstractmethod
    def stop(self) -> None:
        """Drive no more; what is unsent stays unsent."""

    @abstractmethod
    def forget_after_fork(self) -> None:
        """Close our ends in a forked child, and never drive again."""

    @abstractmethod
    def tune(self, processes: int) -> None:
        """Wait in a way that fits so many processes on this host."""

    @abstractmethod
    def detach(self) -> None:
        """Stop using the plane; on return no thread is in the middle of it."""

    @abstractmethod
    def call_later(self, delay: float, fn: Callable[[], None]) -> None:
        """Let the driver call `fn` after a delay."""

    # Sending

    @abstractmethod
    def nudge(self, wait: float = 0.0) -> None:
        """Flush the outboxes now unless another thread is about to; or have it done in `wait`."""

    @abstractmethod
    def flush(self) -> None:
        """Flush now. Only for a thread about to wait: its wait does the rest of a driver's work."""

    @abstractmethod
    def seize(self) -> bool:
        """Take the wheel for a moment if it is free; `let_go` gives it back.

        For a thread that waits next.
        """

    @abstractmethod
    def let_go(self) -> None:
        """Give the wheel back."""

    @abstractmethod
    def soon(self) -> None:
        """See to it that what was posted leaves within a tick."""

    @abstractmethod
    def wake(self) -> None:
        """Wake the driver from its sleep."""

    @abstractmethod
    def stay_alert(self) -> None:
        """Look often for a while: MPI may need many looks for a first message."""

    # Waiting

    @abstractmethod
    def complete(self, slot: Waitable) -> None:
        """End the wait for a slot, whichever thread it is in."""

    @abstractmethod
    def wait(self, slot: Waitable, deadline: float | None = None, lasting: bool = False) -> None:
        """Drive, or sleep while another drives, until the slot is ready.

        Args:
            slot: What is waited for.
            deadline: When to give up.
            lasting: It takes longer than a wake-up: sleep at once, others may want the core.

        Raises:
            TimeoutError: The deadline (by the machine's clock) has passed.
            KeyboardInterrupt: Ctrl-C; nothing is lost, the wait alone ends.
        """
