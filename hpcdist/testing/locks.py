"""Locks and conditions of simulated processes: a thread that has to wait gives the baton away."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from hpcdist.testing.baton import Baton, SimThread


class SimLock:
    """A lock as `threading.Lock` makes them."""

    def __init__(self, baton: Baton) -> None:
        self._baton = baton
        self._taken = False
        self._sleepers: list[SimThread] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock."""
        if not blocking:
            timeout = 0.0
        elif self._baton.current is not None:
            self._baton.pause()
        if self._taken and not self._wait(timeout):
            return False
        self._taken = True
        return True

    def _wait(self, timeout: float) -> bool:
        """Sleep until the lock is free; tell whether it is."""
        baton = self._baton
        until = None if timeout < 0 else baton.now + timeout
        while self._taken:
            if until is not None and baton.now >= until:
                return False
            me = baton.running()
            self._sleepers.append(me)
            try:
                baton.sleep(until)
            finally:
                self._sleepers.remove(me)
        return True

    def release(self) -> None:
        """Give the lock back; the seed says which of the sleepers gets it."""
        if not self._taken:
            raise RuntimeError("release unlocked lock")
        self._taken = False
        for thread in self._sleepers:
            self._baton.wake(thread)

    def part_with(self) -> int:
        """Release it; return how often it was taken."""
        self.release()
        return 1

    def take_back(self, count: int) -> None:
        """Take it as often as it was."""
        self.acquire()

    @property
    def is_mine(self) -> bool:
        """Whether this thread may have it."""
        return self._taken

    def locked(self) -> bool:
        """Tell whether somebody has it."""
        return self._taken

    def __enter__(self) -> bool:
        taken = self.acquire()
        if self._baton.current is not None:
            self._baton.current.locks += 1
        return taken

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._baton.current is not None:
            self._baton.current.locks -= 1
        self.release()


class SimRLock(SimLock):
    """A lock that its owner can take again."""

    def __init__(self, baton: Baton) -> None:
        super().__init__(baton)
        self._owner: SimThread | None = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, once more if it is this thread's."""
        if self._taken and self._owner is self._baton.current:
            self._count += 1
            return True
        if not super().acquire(blocking, timeout):
            return False
        self._owner = self._baton.current
        self._count = 1
        return True

    def release(self) -> None:
        """Give the lock back as often as it was taken."""
        if not self._taken or self._owner is not self._baton.current:
            raise RuntimeError("cannot release un-acquired lock")
        self._count -= 1
        if not self._count:
            self._owner = None
            super().release()

    def part_with(self) -> int:
        """Release it altogether; return how often it was taken."""
        count, self._count = self._count, 1
        self.release()
        return count

    def take_back(self, count: int) -> None:
        """Take it as often as it was."""
        self.acquire()
        self._count = count

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it."""
        return self._taken and self._owner is self._baton.current


class SimCondition:
    """A condition as `threading.Condition` makes them."""

    def __init__(self, baton: Baton, lock: SimLock) -> None:
        self._baton = baton
        self._lock = lock
        self._sleepers: list[SimThread] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until notified; tell whether that came before the timeout."""
        if not self._lock.is_mine:
            raise RuntimeError("cannot wait on un-acquired lock")
        baton, me = self._baton, self._baton.running()
        until = None if timeout is None else baton.now + timeout
        self._sleepers.append(me)
        count = self._lock.part_with()
        try:
            while me in self._sleepers and (until is None or baton.now < until):
                baton.sleep(until)
        finally:
            notified = me not in self._sleepers
            if not notified:
                self._sleepers.remove(me)
            self._lock.take_back(count)
        return notified

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Sleep until something is true."""
        until = None if timeout is None else self._baton.now + timeout
        while not predicate():
            left = None if until is None else until - self._baton.now
            if left is not None and left <= 0:
                return predicate()
            self.wait(left)
        return True

    def notify(self, n: int = 1) -> None:
        """Wake some that wait."""
        if not self._lock.is_mine:
            raise RuntimeError("cannot notify on un-acquired lock")
        for thread in self._sleepers[:n]:
            self._sleepers.remove(thread)
            self._baton.wake(thread)

    def notify_all(self) -> None:
        """Wake all that wait."""
        self.notify(len(self._sleepers))
