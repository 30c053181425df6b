"""The computer of a simulated process: virtual time, threads that take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from hpcdist._transport.machine import Machine, SignalHandler
from hpcdist.testing.baton import Baton, Owner, SimThread
from hpcdist.testing.locks import SimCondition, SimLock, SimRLock

_YEAR_2000 = 946_684_800.0  # when virtual time begins


class SimMachine(Machine):
    """What one simulated process takes for its computer."""

    main = 0  # until the main thread has begun
    shares_memory = False  # or messages would say where it lies, which no seed decides
    signalled = 0  # a simulated process gets no signals of the operating system

    def __init__(self, baton: Baton, owner: Owner, host: str, ended: Callable[[int], None]) -> None:
        self.skew = 0.0  # how far its clock has jumped
        self.main_thread: SimThread | None = None
        self._baton = baton
        self._owner = owner
        self._on_sigint: SignalHandler | None = None
        self._host = host
        self._ended = ended
        self._loops: list[SimEventLoop] = []

    def now(self) -> float:
        """Tell the virtual time."""
        return self._baton.now + self.skew

    def clock(self) -> int:
        """Tell the virtual time in nanoseconds."""
        return int(self.now() * 1e9)

    def time(self) -> float:
        """Tell the virtual time of day."""
        return _YEAR_2000 + self.now()

    def hostname(self) -> str:
        """Name the simulated host."""
        return self._host

    def pid(self) -> int:
        """Give the number that the operating system knows the process by: a made-up one."""
        return 100_000 + self._owner.pid

    def settle(self) -> int:
        """Raise what others have raised in this thread."""
        self._baton.settle()
        return 0

    def lock(self) -> Any:
        """Make a lock."""
        return SimLock(self._baton)

    def rlock(self) -> Any:
        """Make a lock that its owner can take again."""
        return SimRLock(self._baton)

    def condition(self, lock: Any = None) -> Any:
        """Make a condition, with a lock of its own if none is given."""
        return SimCondition(self._baton, lock or SimRLock(self._baton))

    def start(self, work: Callable[[], None], name: str) -> None:
        """Run something on a thread of its own."""
        self._baton.spawn(self._owner, name, work)
        self._baton.pause()

    def random_bytes(self, count: int) -> bytes:
        """Draw bytes: the seed decides which."""
        return bytes(int(256 * self._baton.chance()) for _ in range(count))

    def die(self) -> None:
        """End the simulated process at once."""
        self._owner.die()
        self._baton.never()

    def at_exit(self, work: Callable[[], None]) -> None:
        """Do nothing: a simulation ends without a word."""

    def before_exit(self, work: Callable[[], None]) -> None:
        """Do nothing, likewise."""

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """Make an event loop on virtual time."""
        loop = SimEventLoop(self._baton)
        self._loops.append(loop)
        return loop

    def compute(self, seconds: float) -> None:
        """Let virtual time pass as a computation does: the thread waits for nothing."""
        until = self._baton.now + seconds
        while self._baton.now < until:
            self._baton.sleep(until)

    def clear_away(self) -> None:
        """Close what was opened. The simulation has ended."""
        for loop in self._loops:
            loop.end()

    def exit(self, code: int, clear_away: Callable[[], None], *, by_libc: bool = False) -> NoReturn:
        """End this process at once."""
        clear_away()
        self._ended(code)
        raise AssertionError("a dead process went on")

    # Interrupts

    def catch_sigint(self, handler: SignalHandler) -> None:
        """Let a handler have Ctrl-C, if it has none."""
        self._on_sigint = self._on_sigint or handler

    def set_sigint(self, handler: SignalHandler) -> None:
        """Let a handler have Ctrl-C."""
        self._on_sigint = handler

    def interrupt_main(self) -> None:
        """Have the handler of Ctrl-C called on the main thread as soon as it runs."""
        thread, handler = self.main_thread, self._on_sigint
        if thread is not None and handler is not None:
            thread.signals.append(lambda: handler(2, None))
            self._baton.wake(thread)

    def aim(self, thread: int, error: type[BaseException]) -> Callable[[], object]:
        """Return what raises an error in another thread as soon as that runs."""

        def hit() -> None:
            for each in self._baton.threads:
                if each.ident == thread:
                    each.error = error
                    self._baton.wake(each)

        return hit


class SimEventLoop(asyncio.BaseEventLoop):
    """An event loop that sleeps as simulated threads do. It watches no descriptors."""

    def __init__(self, baton: Baton) -> None:
        super().__init__()
        self._baton = baton
        self._selector = _Sleeper(baton)

    def time(self) -> float:
        """Tell the virtual time."""
        return self._baton.now

    def end(self) -> None:
        """Close it, and what runs in it, without a word."""
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            task.get_coro().close()
        self.close()

    def _process_events(self, events: object) -> None:
        pass

    def _write_to_self(self) -> None:
        self._selector.wake()


class _Sleeper:
    """Stands where an event loop's selector would."""

    def __init__(self, baton: Baton) -> None:
        self._baton = baton
        self._is_awake = False
        self._sleeping: deque[SimThread] = deque()

    def select(self, timeout: float | None) -> list[Any]:
        """Sleep until woken, or for so long."""
        baton = self._baton
        if timeout is None or timeout > 0:
            until = None if timeout is None else baton.now + timeout
            self._sleeping.append(baton.running())
            try:
                while not self._is_awake and (until is None or baton.now < until):
                    baton.sleep(until)
            finally:
                self._sleeping.pop()
        else:
            baton.pause()
        self._is_awake = False
        return []

    def wake(self) -> None:
        """End the sleep."""
        self._is_awake = True
        for thread in self._sleeping:
            self._baton.wake(thread)
