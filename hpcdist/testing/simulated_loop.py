"""The wait loop of a simulated process: messages come from the simulated network.

As in `Progress`, a thread that waits drives, one at a time; a helper does when no thread waits.
"""

from __future__ import annotations

import heapq
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from hpcdist._transport.contracts import Outbox, Waitable
from hpcdist._transport.interrupts import Interrupts
from hpcdist._transport.wait_loop import WaitLoop
from hpcdist.testing.baton import Baton, Owner, SimThread, State
from hpcdist.testing.records import Trace
from hpcdist.testing.simulated_machine import SimMachine

_ident = threading.get_ident


class _Wait:
    """A thread that waits for a slot. It stands where a follower's latch would."""

    def __init__(self, slot: Waitable | None, thread: SimThread, baton: Baton) -> None:
        self.slot = slot
        self.thread = thread
        self._baton = baton

    def release(self) -> None:
        self._baton.wake(self.thread)


class _Dirty(deque[Outbox]):
    """The outboxes with something to send; tells the loop of new ones."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def append(self, outbox: Outbox) -> None:
        super().append(outbox)
        self._tell()


class SimLoop(WaitLoop):
    """Carries the messages of a simulated process."""

    def __init__(self, baton: Baton, owner: Owner, machine: SimMachine, trace: Trace) -> None:
        self.machine = machine
        self.owner = owner
        self._sim_machine = machine
        self._baton = baton
        self._trace = trace
        self.dirty = _Dirty(self._offer)
        self.plane = None
        self.before_sleep = []
        self.linger = 0
        self.woke = False
        self.crowding = 1.0
        self.spans_hosts = False
        self.register = self.modify = _no_descriptors
        self.unregister = lambda fd: None
        self.interrupts = Interrupts(machine, self._end_sleeps, self._soonest)
        self._arrivals: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._waits: list[_Wait] = []
        self._helper: SimThread | None = None
        self._driver: SimThread | None = None  # who has the wheel
        self._is_offered = False
        self._is_started = False
        self._is_restless = False  # a thread ran that did not wait: finalisers may have left work

    # Being chosen

    def _offer(self) -> None:
        """Say that there is something to do here, if there is."""
        if not self._is_offered and self._driver is None and self._is_started and self._has_work():
            self._is_offered = True
            self._baton.offer(self)

    def _has_work(self) -> bool:
        return bool(self._arrivals or self.dirty or self._is_restless)

    def chosen(self) -> SimThread | None:
        """Choose the thread that drives: one that waits, else the helper."""
        self._is_offered = False
        if self._driver is not None or not self._has_work():
            return None
        sleepers = [wait.thread for wait in self._waits if wait.thread.state is State.ASLEEP]
        if sleepers:
            thread = sleepers[int(self._baton.chance() * len(sleepers))]
            thread.state = State.READY
            return thread
        if self._helper is None:
            self._helper = self._baton.spawn(self.owner, "helper", self._help)
        return None

    def arrive(self, act: Callable[[], object]) -> None:
        """Have the driver do something that has come from outside."""
        self._arrivals.append(act)
        self._offer()

    def rest(self) -> None:
        """Note that a thread has come to rest which did not wait here."""
        self._is_restless = True
        self._offer()

    # Starting and stopping

    def start(self) -> None:
        """Be ready to drive."""
        self._is_started = True
        self._offer()

    def stop(self) -> None:
        """Drive no more; what is unsent stays unsent."""
        self._is_started = False
        self._timers.clear()
        self.dirty.clear()

    def forget_after_fork(self) -> None:
        """Never drive again, in a forked child."""
        self.stop()

    def tune(self, processes: int) -> None:
        """Do nothing: virtual time costs nothing."""

    def detach(self) -> None:
        """Stop using the plane."""
        self.plane = None

    # Time

    def call_later(self, delay: float, fn: Callable[[], None]) -> None:
        """Let the driver call `fn` after a delay."""
        self._serial += 1
        heapq.heappush(self._timers, (self.machine.now() + delay, self._serial, fn))
        self._set_alarm(delay)

    def _set_alarm(self, delay: float) -> None:
        self._baton.at(self._baton.now + delay, self._look_at_timers)

    def _look_at_timers(self) -> None:
        timers = self._timers
        while timers and timers[0][0] <= self.machine.now() + 1e-9:
            fn = heapq.heappop(timers)[2]
            self._arrivals.append(lambda fn=fn: self._ring(fn))  # type: ignore[misc]
        self._offer()

    def _ring(self, fn: Callable[[], None]) -> None:
        self._trace.add(self._baton.now, self.owner.pid, "timer", _name_of(fn))
        fn()

    def clock_has_jumped(self) -> None:
        """Look anew at what is due."""
        if self._timers:
            self._set_alarm(max(0.0, self._timers[0][0] - self.machine.now()))
        self._end_sleeps()

    # Sending

    def nudge(self, wait: float = 0.0) -> None:
        """Flush the outboxes now unless another thread is about to; or have it done in `wait`."""
        me = _ident()
        outer = me not in self.interrupts.held and self.interrupts.hold(me)
        try:
            self._flush_if_free()
        finally:
            if outer:
                self.interrupts.leave(me)

    def flush(self) -> None:
        """Flush now."""
        self.nudge()

    def _flush_if_free(self) -> None:
        if self._driver is None:
            self._driver = self._baton.current
            try:
                self._flush()
            finally:
                self._driver = None

    def seize(self) -> bool:
        """Take the wheel for a moment if it is free; `let_go` gives it back."""
        if self._driver is not None:
            return False
        self._driver = self._baton.current
        return True

    def let_go(self) -> None:
        """Give the wheel back."""
        self._driver = None
        self._offer()

    def soon(self) -> None:
        """See to it that what was posted leaves soon."""
        self._offer()

    def wake(self) -> None:
        """Wake the driver."""
        self._offer()

    def stay_alert(self) -> None:
        """Do nothing: nothing is missed here."""

    def _flush(self) -> None:
        dirty = self.dirty
        while dirty:
            outbox = dirty.popleft()
            outbox.queued = False
            outbox.flush()

    # Waiting

    def complete(self, slot: Waitable) -> None:
        """End the wait for a slot, whichever thread it is in."""
        slot.ready = True
        for wait in self._waits:
            if wait.slot is slot:
                wait.release()

    def wait(self, slot: Waitable, deadline: float | None = None, lasting: bool = False) -> None:
        """Drive, or sleep while there is nothing to do, until the slot is ready."""
        me = _ident()
        outer = me not in self.interrupts.held and self.interrupts.hold(me)
        try:
            self._baton.pause()
            while not slot.ready:
                self.interrupts.look(me)
                if self._driver is None and self._drive():
                    continue
                if deadline is not None and self.machine.now() >= deadline:
                    raise TimeoutError
                self._sleep(slot, deadline)
        finally:
            self._offer()
            if outer:
                self.interrupts.leave(me)

    def _sleep(self, slot: Waitable | None, deadline: float | None) -> None:
        if (slot is not None and slot.ready) or (self._has_work() and self._driver is None):
            return  # since we looked, another thread has run
        wait = _Wait(slot, self._baton.running(), self._baton)
        self._waits.append(wait)
        try:
            self._baton.sleep(None if deadline is None else deadline - self._sim_machine.skew)
        finally:
            self._waits.remove(wait)

    def _drive(self) -> bool:
        """Do one thing, if there is one; tell whether there was."""
        self._driver = self._baton.current
        try:
            self._flush()
            if self._arrivals:
                self._let_in(self._arrivals.popleft())
                self._flush()
                return True
            self._is_restless = False
            for fn in self.before_sleep:
                fn()
            if self.dirty:
                self._flush()
                return True
            return False
        finally:
            self._driver = None
            self._offer()

    def _let_in(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:  # its fault must not hit the thread that happens to drive
            sys.excepthook(*sys.exc_info())

    def _end_sleeps(self) -> None:
        for wait in self._waits:
            wait.release()

    def _soonest(self, fn: Callable[[], None]) -> None:
        self.call_later(0.0, fn)

    def _help(self) -> None:
        """Drive for want of a waiter."""
        self.interrupts.hold(_ident())
        while True:
            if self._driver is None and self._drive():
                continue
            self._sleep(None, None)


def _no_descriptors(*_: object) -> Any:
    raise NotImplementedError("a simulated process watches no descriptors")


def _name_of(fn: Callable[[], None]) -> str:
    return getattr(fn, "__qualname__", type(fn).__name__)
