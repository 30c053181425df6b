"""The one wait loop: the thread that waits drives; a helper drives when no thread waits.

The thread that waits polls MPI and the links itself, so that a reply costs no hand-over between
threads (8-11 us for a call, 17 with a second thread on each side). It spins for a moment, then
raises the "asleep" flag and sleeps in epoll until a bell, a link or another thread wakes it.

Exactly one thread drives at a time: the holder of `_wheel`. Only the driver touches MPI, links
and timers. Everyone else appends to an outbox and marks it dirty; the driver flushes it.

The helper has three postures:
- parked: a driver is asleep in epoll and does everything; the helper looks ever more seldom. It
  is not woken when that driver goes on: it would want the interpreter just when a call is answered;
- watching: somebody drove a moment ago; the helper looks every TICK seconds whether it is needed;
- driving: no thread waits (user code runs, or the REPL is idle); it sleeps in epoll like a driver,
  but without holding the wheel, so that the next waiter takes over without asking. After a single
  wait it gets the wheel back in its sleep.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hpcdist._transport.contracts import Waitable, open_latch
from hpcdist._transport.descriptors import Bed, Descriptors
from hpcdist._transport.interrupts import InterruptGuard, Interrupts
from hpcdist._transport.machine import Machine
from hpcdist._transport.timers import Timers
from hpcdist._transport.wait_loop import WaitLoop

TICK = 0.002
_SLEEP_MAX = 0.7  # seconds that a lost wake-up costs at the most
_FAR_NAP_MAX = 0.1  # seconds until a message from another host is seen whose ring got lost
_NAP_MAX = 0.05  # seconds a call may run after a long rest before the helper takes notice
_WAKE_UP = 0.001  # seconds until a sleeper that was rung has answered
_PUSH = 0.25  # seconds to push on what MPI moves in pieces, once until some of it has moved
_RARE = 0.01  # seconds between waits from which on they do not wake the helper
_BRISK = 0.0005  # the interpreter's switch interval while a long call runs beside us
_LINGER = 200_000  # ns: messages this close behind each other are gathered into one frame
_CORES = len(os.sched_getaffinity(0))
_now = time.monotonic
_ident = threading.get_ident
_yield = os.sched_yield


class Progress(WaitLoop):
    """Drives all traffic of this process."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine = machine or Machine()
        self._wheel = threading.Lock()
        self._followers: deque[Any] = deque()
        self.dirty = deque()
        self.plane = None
        self.spin = 0.0002
        self.patience = 60  # polls before giving way: fewer where processes outnumber cores
        self.woke = False
        self._slept = False  # we were woken just now
        self.linger = _LINGER
        self.crowding = 1.0
        self.spans_hosts = False
        self._spent = -1  # what had moved when pushing on did not help
        self._busy_at = 0.0  # when something came last; kept where that is so
        self.before_sleep = []
        self._bed: Any = None
        self._watched = watched = Descriptors()
        self.register, self.unregister = watched.register, watched.unregister
        self.modify = watched.modify
        self._timers = Timers()
        self._asleep = False  # the driver is in epoll
        self._driver = 0  # the thread that drives for a wait, or has seized the wheel
        self._seldom = 15  # looks at MPI for one at the links; few while those bring something
        self._waits = 0
        self._parked = False
        self._helper_asleep = False
        self._kick_due = False  # the helper sleeps, and must learn that it no longer drives
        self._resting = False  # the helper is in epoll
        self._rest_ends = 0.0  # when it looks by itself
        self._taken_at = 0.0  # when the wheel was last taken while it slept
        self._is_rare = False  # that was long before
        self._tick = threading.Lock()
        self._tick.acquire()
        self.interrupts = Interrupts(machine, self._end_sleeps, self._soonest)
        # `hold` and `leave` are written out where each call comes by before it leaves or returns.
        self._held, self._noted = self.interrupts.held, self.interrupts.noted
        self._main = self.interrupts.main
        self._seized_held = False  # whether the thread that has seized the wheel was held before
        self._usual_interval = sys.getswitchinterval()
        self._is_brisk = False
        self._stopped = True

    # Starting and stopping

    def start(self) -> None:
        """Open the wake-up descriptors and start the helper, once."""
        if not self._stopped:
            return
        self._stopped = False
        self._watched.open()
        self._bed = Bed(self._watched)
        self._helper = threading.Thread(target=self._help, name="hpcdist-progress", daemon=True)
        self._helper.start()

    def stop(self) -> None:
        """Stop the helper and close the descriptors; what is unsent stays unsent."""
        if self._stopped:
            return
        self._stopped = True
        self._kick()
        if _ident() != self._helper.ident:
            self._helper.join(5)
        self._close()
        self._timers.clear()
        self.dirty.clear()

    def forget_after_fork(self) -> None:
        """Close our ends in a forked child, and never drive again."""
        if not self._stopped:
            self._stopped = True
            self.plane = None
            self._close()

    def _close(self) -> None:
        self._helper_asleep = self._resting = False
        self._bed.close()
        self._watched.close()

    def tune(self, processes: int) -> None:
        """Wait in a way that fits so many processes on this host: the more a core, the less."""
        crowded = processes > _CORES + 1
        self.patience, self.spin = (10, 0.0001) if crowded else (60, 0.0002)
        self.crowding = max(1.0, processes / _CORES)
        # Where cores are shared, a receiver can hardly begin before we are through.
        self.linger = int(min(_LINGER * self.crowding**2, TICK * 1e9))

    def detach(self) -> None:
        """Stop polling the plane; on return no thread is in the middle of it."""
        self.wake()
        with self._wheel:
            self.plane = None

    def call_later(self, delay: float, fn: Callable[[], None]) -> None:
        """Let the driver call `fn` after a delay."""
        self._timers.add(delay, fn)
        self._rouse()

    # Sending

    def nudge(self, wait: float = 0.0) -> None:
        """Flush the outboxes now unless another thread is about to; or have it done in `wait`."""
        me = _ident()
        outer = me not in self._held and self.interrupts.hold(me)
        try:
            wait = 0.0 if self._driver == me else wait  # a handler of the driver
            if wait and self._asleep:
                self.wake()
            if self._wheel.acquire(wait > 0, wait or -1):
                try:
                    self._take_wheel()
                    self._flush()
                finally:
                    self._release()
            elif self._asleep:
                self.wake()
        finally:
            if outer:
                self.interrupts.leave(me)

    def flush(self) -> None:
        """Flush now. Only for a thread about to wait: its wait does the rest of a driver's work."""
        if self.seize():
            try:
                self._flush()
            finally:
                self.let_go()

    def seize(self) -> bool:
        """Take the wheel for a moment if it is free; `let_go` gives it back.

        For a thread that waits next: that wait wakes the helper, if it has to be.
        """
        me, held = _ident(), self._held
        # Before the wheel is ours: an interrupt must not come between.
        outer = me not in held
        if outer:
            if me == self._main:
                held[me] = False
            else:
                self.interrupts.hold(me)
        if self._wheel.acquire(False):
            self._driver = me
            self._seized_held = not outer
            return True
        if outer:
            self.interrupts.leave(me)
        return False

    def let_go(self) -> None:
        """Give the wheel back."""
        held = self._seized_held
        try:
            self._release()
        finally:
            if not held:
                self.interrupts.leave(_ident())
        if self._slept:
            _yield()  # the waker may wait for this very core, and for the message just sent

    def soon(self) -> None:
        """See to it that what was posted leaves within a tick."""
        sleeps = self._asleep or self._parked or self._helper_asleep
        if sleeps and self._driver != _ident():  # a driver, whose handler we are, flushes next
            self._rouse()

    def wake(self) -> None:
        """Wake the driver from its sleep."""
        if not self._stopped:
            self._watched.wake()

    def _rouse(self) -> None:
        if self._parked or self._helper_asleep:
            self._kick()
        if self._asleep:
            self.wake()

    def stay_alert(self) -> None:
        """Look often for a while: MPI may need many looks for a first message."""
        self._busy_at = _now()

    # Waiting

    def complete(self, slot: Waitable) -> None:
        """End the wait for a slot, whichever thread it is in."""
        slot.ready = True
        latch = slot.latch
        if latch is not None:
            open_latch(latch)
        elif self._asleep:
            # The sleeping driver may be the waiter (we are another thread).
            self.wake()

    def wait(self, slot: Waitable, deadline: float | None = None, lasting: bool = False) -> None:
        """Drive, or sleep while another drives, until the slot is ready."""
        self._waits += 1
        me, held, noted = _ident(), self._held, self._noted
        # Before the wheel is ours: an interrupt must not come between.
        outer = me not in held and self.interrupts.hold(me)
        try:
            while not slot.ready:
                if noted:
                    self.interrupts.look(me)
                if self._wheel.acquire(False):
                    try:
                        self._take_wheel()
                        self._driver = me
                        self._drive(slot, deadline, me, lasting)
                    finally:
                        self._release(waited=True)
                else:
                    self._follow(slot, deadline, me)
        finally:
            if outer:
                if me in noted:
                    self.interrupts.leave(me)
                else:
                    del held[me]

    def _end_sleeps(self) -> None:
        """Let every thread that waits look whether its wait has been interrupted."""
        for latch in list(self._followers):
            open_latch(latch)
        if self._asleep:
            self.wake()

    def _soonest(self, fn: Callable[[], None]) -> None:
        self.start()
        self.call_later(0.0, fn)

    def _take_wheel(self) -> None:
        if self._helper_asleep:
            self._helper_asleep = False
            self._kick_due = True  # not now: it would want the interpreter while we are in a hurry
            now = _now()
            self._is_rare = now - self._taken_at > _RARE
            self._taken_at = now
            if self.plane is not None:
                self.plane.disarm()
            else:  # what we wait for comes there, and would wake it
                self._bed.listen(False)
        if self._is_brisk:
            self._is_brisk = False
            sys.setswitchinterval(self._usual_interval)

    def _release(self, waited: bool = False) -> None:
        """Give the wheel up, and notify the thread that needs it next."""
        kick = self._kick_due
        try:
            if kick:
                self._kick_due = False
                if waited and self._is_rare:
                    kick = not self._give_back()
        finally:
            self._driver = 0
            self._wheel.release()
            if kick:
                self._kick()
            if self.dirty or self._followers:
                self._pass_wheel_on()

    def _give_back(self) -> bool:
        """Let the helper sleep on as if nothing had been, if it does; tell whether it may.

        To wake it costs 50 us. What finalisers have left to be done waits until it wakes by itself.
        """
        plane = self.plane
        if not self._resting or self.dirty or self.spans_hosts:
            return False
        if plane is not None:
            plane.arm()
            if plane.poll() or plane.poll() or plane.poll() or plane.busy():
                plane.disarm()
                return False
        self._be_brisk()
        self._bed.listen(True)
        self._helper_asleep = self._resting  # else it wakes just now, and looks after us anyway
        # Another thread's timers: from here on they rouse the helper by themselves.
        return self._timers.first() >= self._rest_ends

    def _be_brisk(self) -> None:
        """Let the helper have the interpreter soon, if it wants it while no thread waits."""
        if not self._is_brisk:
            self._is_brisk = True
            sys.setswitchinterval(_BRISK)

    def _pass_wheel_on(self) -> None:
        while self.dirty and self._wheel.acquire(False):
            try:
                self._flush()
            finally:
                self._wheel.release()
        if self._followers:
            self._release_follower()

    def _follow(self, slot: Waitable, deadline: float | None, me: int) -> None:
        latch = threading.Lock()
        latch.acquire()
        slot.latch = latch
        self._followers.append(latch)
        try:
            if slot.ready or me in self._noted or not self._wheel.locked():
                return
            if self._asleep and self.dirty:
                self.wake()
            # No longer than that: a signal that comes just before does not end this sleep.
            left = _SLEEP_MAX if deadline is None else min(_SLEEP_MAX, deadline - _now())
            if left > 0:
                latch.acquire(timeout=left)
            if deadline is not None and not slot.ready and _now() >= deadline:
                raise TimeoutError
        finally:
            slot.latch = None
            try:
                self._followers.remove(latch)
            except ValueError:
                # Taken off to be woken: if we leave for another reason, the next one must know.
                if self._followers and not self._wheel.locked():
                    self._release_follower()

    def _drive(self, slot: Waitable, deadline: float | None, me: int, lasting: bool) -> None:
        """Look at MPI and the sockets until the slot is ready; look less often, then sleep.

        `turn` counts looks in a row that found nothing: the first `patience` of them follow each
        other at once, later ones give the core away in between, every eighth of these asks the
        clock. `rest` is when to sleep, 0 until the clock was asked; `push` until when to go on
        for the sake of what MPI moves in pieces, which takes a look of ours for each piece.
        """
        plane = self.plane
        poll_fds, patience = self._watched.epoll.poll, 0 if lasting else self.patience
        turn, looks, rest, push = 0, 0, 0.0, 0.0
        if self._slept or self.woke or (plane is not None and plane.woke):
            self._slept = False
            self._flush()
            _yield()  # the kernel often puts the woken process on the waker's core
            patience = 0
            if plane is not None:
                plane.poll()  # one look can miss what has come meanwhile
        while True:
            if self.dirty:
                self._flush()
            if plane is not None:
                active = plane.poll()
                if active:
                    self._seldom = 15
                if slot.ready:
                    return
            else:
                active = False
            # Asking the kernel for sockets costs ten looks at MPI: each 16th time, each 2nd while
            # they bring something.
            if plane is None or looks & self._seldom == 0:
                for fd, events in poll_fds(0):
                    active = True
                    self._seldom = 1
                    self._watched.handle(fd, events)
                if slot.ready:
                    return
            if self._noted and me in self._noted:
                return  # `wait` raises it once the wheel is free
            looks += 1
            if active:
                turn, rest = 0, 0.0
                if self.spans_hosts:
                    self._busy_at = _now()
                continue
            turn += 1
            if turn <= patience:
                continue  # a reply is most often there within these: no system call before it
            busy = plane is not None and plane.busy()  # with what needs polling
            if not lasting:
                _yield()
            if turn & 7 == 0 or (lasting and not busy):
                now = _now()
                if deadline is not None and now >= deadline:
                    raise TimeoutError
                self._timers.run(now)
                # Where the wait is for long work, `lasting`, there is no spinning to be timed.
                if rest == 0.0 and (busy or not lasting):
                    rest, push = now + self.spin, now + _PUSH
                    if self.woke or (plane is not None and plane.woke):
                        # A sleeper takes a while to wake: falling asleep too would double it.
                        rest = now + _WAKE_UP
                        self.woke = False
                        if plane is not None:
                            plane.woke = False
                elif now > rest:
                    # While large buffers move, go on; once a whole `_PUSH` has moved none of them,
                    # `_spent` remembers how far they were, and nobody pushes again until they move.
                    if plane is not None and busy and not lasting:
                        if now < push and plane.moved != self._spent:
                            continue
                        self._spent = plane.moved
                    self._sleep(slot, deadline)
                    self._slept = True
                    if slot.ready:
                        return
                    # Awake: somebody has rung. From now on no looks without a pause between them:
                    # who rang may need this core. The plane may have been detached meanwhile.
                    turn, rest, patience, plane = 0, 0.0, 0, self.plane

    def _flush(self) -> None:
        dirty = self.dirty
        while dirty:
            try:
                outbox = dirty.popleft()
            except IndexError:
                return
            outbox.queued = False
            outbox.flush()

    def _sleep(self, slot: Waitable, deadline: float | None) -> None:
        """Sleep until something happens, having made sure that whatever happens wakes us."""
        interrupts = self.interrupts
        on_main = self._driver == interrupts.main
        guard = InterruptGuard(interrupts.on_sigint) if on_main else None
        try:
            self._asleep = True
            timeout = self._get_ready_to_sleep(deadline)
            events = []
            if timeout > 0 and not (slot.ready or self.dirty or self._driver in self._noted):
                events = self._watched.epoll.poll(timeout)
            self._asleep = False
            plane = self.plane
            if plane is not None:
                plane.disarm()
                # What the bell rang for is nearer; who looks next silences it. One look can miss.
                if events and (plane.poll() or plane.poll()) and slot.ready:
                    return
            for fd, event in events:
                self._watched.handle(fd, event)
        finally:
            self._asleep = False
            if guard is not None:
                guard.end()

    def _get_ready_to_sleep(self, deadline: float | None) -> float:
        """Flush, raise the flag, look again; return how long one may sleep."""
        for fn in self.before_sleep:
            fn()
        self._flush()
        now = _now()
        self._timers.run(now)
        timeout = min(_SLEEP_MAX, self._timers.first() - now)
        if deadline is not None:
            timeout = min(timeout, deadline - now)
        plane = self.plane
        if plane is not None:
            plane.arm()
            # One look can miss a message that has arrived (60 times of 60): look three times.
            if plane.poll() or plane.poll() or plane.poll():
                self._busy_at = now
                return 0.0
            if plane.busy():
                timeout = min(timeout, 0.0005)
            elif self.spans_hosts:  # ever longer
                nap = max(TICK * self.crowding, (now - self._busy_at) / 8)
                timeout = min(timeout, nap, _FAR_NAP_MAX)
        return timeout

    # The helper

    def _help(self) -> None:
        seen, nap = -1, TICK
        while not self._stopped:
            if self._wheel.acquire(False):
                if self._waits == seen:
                    nap = TICK
                    self._help_drive()
                    continue
                seen = self._waits
                try:
                    self._pass()
                finally:
                    self._release()
            elif self._asleep:
                self._parked = True
                if not self._asleep:
                    self._parked = False
                    continue
                self._tick.acquire(timeout=nap)
                self._parked = False
                nap = min(2 * nap, _NAP_MAX)
                continue
            nap = TICK
            self._tick.acquire(timeout=TICK)

    def _pass(self) -> None:
        """Do once what a driver does."""
        self._flush()
        if self.plane is not None and self.plane.poll() and self.spans_hosts:
            self._busy_at = _now()
        for fd, events in self._watched.epoll.poll(0):
            self._watched.handle(fd, events)

    def _help_drive(self) -> None:
        """Drive for want of a waiter. Called with the wheel held."""
        timeout = 0.0
        try:
            self._pass()
            timeout = self._get_ready_to_sleep(None)
            self._bed.listen(True)
            self._helper_asleep = timeout > 0
        finally:
            if self._helper_asleep:
                self._wheel.release()
            else:
                self._release()
        if timeout <= 0:
            return
        if self._followers:
            self._release_follower()
        self._be_brisk()
        ends, first = _now() + timeout, self._timers.first()
        if self.dirty or first < ends - TICK:  # another thread's, just now
            self._helper_asleep = False
            return
        self._rest_ends = min(ends, first)
        self._resting = True
        self._bed.sleep(timeout)
        self._resting = False
        if not self._helper_asleep:  # a waiter took over; it has disarmed the plane
            return
        if self._wheel.acquire(False):
            self._helper_asleep = False
            if self.plane is not None:
                self.plane.disarm()
            try:
                self._pass()
            finally:
                self._release()

    def _release_follower(self) -> None:
        try:
            open_latch(self._followers.popleft())
        except IndexError:
            pass

    def _kick(self) -> None:
        if self._parked:
            self._parked = False
            open_latch(self._tick)
        if self._bed is not None:
            self._bed.kick()
