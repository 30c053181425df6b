"""Whose call runs: calls start in the order they came, one at a time unless told otherwise.

A worker's main thread runs calls. A call that blocks in one of our waits gives its turn away: the
next one starts on a spare thread, and the first goes on once its wait is over and a turn is free.
Process 1 keeps its main thread to itself: there a spare thread serves.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from hpcdist._runtime.lines import Line
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._transport.wait_loop import WaitLoop

_SUSPENDED_MOST = 256
_SPARE_MOST = 8
_ident = threading.get_ident


class Call:
    """A call that has arrived."""

    __slots__ = (
        "aux",
        "began",
        "body",
        "buffers",
        "flags",
        "ident",
        "line",
        "peer",
        "refs",
        "run",
        "thread",
        "waits",
    )

    began: float  # when it has started, by the machine's clock: set only then

    def __init__(
        self,
        run: Callable[[Call], None],
        peer: Any,
        flags: int,
        ident: int,
        aux: int,
        body: Any,
        buffers: Any,
    ) -> None:
        self.run = run
        self.peer = peer
        self.flags = flags
        self.ident = ident
        self.aux = aux
        self.body = body
        self.buffers = buffers
        self.refs: Any = ()  # the references among its arguments: held until it ends
        self.thread = 0
        self.waits = False
        self.line: Line | None = None  # of the object whose method it is


class Turns:
    """The queue of calls, and the threads that run them."""

    def __init__(self, progress: WaitLoop) -> None:
        self._progress = progress
        self._machine = progress.machine
        self._main = progress.machine.main
        self._now = progress.machine.now
        self.serving = False  # whether the main thread runs others' calls
        self.interrupts = progress.interrupts
        self._lock = self._machine.lock()  # guards all below
        self._queue: deque[Call] = deque()
        self._limit: float = 1
        self._running = 0
        self._suspended = 0
        self._waiting_to_resume: deque[tuple[Slot, Line | None]] = deque()
        self.calls: dict[int, Call] = {}  # started calls by thread
        self.begun = 0  # calls so far, or fewer by some that began at one moment
        self._idle = Slot()
        self._spares: list[_Spare] = []
        self._main_idle: Slot | None = None  # the main thread waits for a call on this
        self._main_due = False  # it has been woken, and takes the next call
        self._stopped = False
        self._names = itertools.count(1)
        self._warned = False

    def set_limit(self, limit: int | None) -> None:
        """Let so many calls run at once (None: any number)."""
        self._limit = float("inf") if limit is None else limit

    @property
    def running(self) -> int:
        """How many calls have started and not ended."""
        return len(self.calls)

    @property
    def queued(self) -> int:
        """How many calls wait for a turn."""
        return len(self._queue)

    # Arrival

    def submit(self, call: Call) -> None:
        """Queue a call; somebody runs it when there is a turn."""
        self._queue.append(call)
        if self._main_idle is not None and self._wake_main():
            return
        if self._running + self._main_due < self._limit:  # else who ends looks at the queue
            self._start_spare()

    def _wake_main(self) -> bool:
        """Let the main thread take the next call, if it waits for one."""
        if self._main_idle is None:
            return False
        with self._lock:
            idle = self._main_idle
            if idle is None:
                return False
            self._main_idle = None
            self._main_due = True
            idle.ready = True  # here already: an interrupt may hit us before the next line
        self._progress.complete(idle)
        return True

    def withdraw(self, peer: Peer | None, ident: int) -> Call | None:
        """Take back a call that has not started; None: there is none."""
        with self._lock:
            for call in list(self._queue):
                if call.ident == ident and call.peer is peer:
                    self._queue.remove(call)
                    return call
        return None

    def drop_queue(self) -> None:
        """Drop the calls that have not started: nothing waits for them any more."""
        with self._lock:
            self._queue.clear()

    def is_queued(self, peer: Peer | None, ident: int) -> bool:
        """Tell whether a call has not started."""
        with self._lock:
            return any(c.ident == ident and c.peer is peer for c in list(self._queue))

    def _next(self) -> Call | None:
        if not self._queue:
            return None
        with self._lock:
            return self._take()

    def _next_of_main(self) -> Call | None:
        """Take a call on the main thread, which is awake now."""
        with self._lock:
            self._main_idle = None
            self._main_due = False
            return self._take()

    def _take(self) -> Call | None:
        """Take the next call if there is a turn for it. Called with the lock held."""
        taken = self._running + self._main_due
        if not self._queue or taken >= self._limit:
            return None
        if self._waiting_to_resume and self._is_claimed():
            return None
        # The first of all, most often: only methods of objects have to look further.
        call = self._queue.popleft() if self._queue[0].line is None else self._pop()
        if call is not None:
            self._running += 1
        return call

    def _pop(self) -> Call | None:
        """Take the first call that may start off the queue. Called with the lock held."""
        line = self._queue[0].line
        if line is None:
            return self._queue.popleft()
        if line.is_free:
            line.busy = True
            return self._queue.popleft()
        found = self._first_free()
        if found is not None:
            self._queue.remove(found)
            if found.line is not None:
                found.line.busy = True
        return found

    def _first_free(self) -> Call | None:
        """Find the first call whose object, if it has one, runs no other method."""
        waiting = list(self._queue)  # a copy: `submit` does not take the lock
        return next((call for call in waiting if call.line is None or call.line.is_free), None)

    def _can_start(self) -> bool:
        with self._lock:
            if self._running >= self._limit or self._is_claimed():
                return False
            return self._first_free() is not None

    def _is_claimed(self) -> bool:
        """Tell whether a call that has waited can go on now. Called with the lock held."""
        return any(line is None or line.is_free for _, line in self._waiting_to_resume)

    def _heir(self) -> Slot | None:
        """Take out the first call that has waited and can go on. Called with the lock held."""
        for entry in self._waiting_to_resume:
            slot, line = entry
            if line is None or line.is_free:
                self._waiting_to_resume.remove(entry)
                if line is not None:
                    line.busy = True
                return slot
        return None

    def _start_spare(self) -> None:
        """Hand the next call to a spare thread, if there is a turn for it."""
        if self._suspended >= _SUSPENDED_MOST:
            self._warn()
            return
        call = self._next()
        if call is None:
            return
        with self._lock:
            spare = self._spares.pop() if self._spares else None
        if spare is None:
            spare = _Spare(self, next(self._names))
        spare.give(call)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"hpcdist: {_SUSPENDED_MOST} calls are suspended in this process; further ones "
                "stay queued. Make a function that mostly waits `async def`.",
                file=sys.stderr,
            )

    # Running

    def serve(self) -> None:
        """Run calls on this (the main) thread until stopped."""
        self.interrupts.hold(self._main)
        try:
            self._serve()
        finally:
            self.interrupts.forget(self._main)
            self.interrupts.leave(self._main)

    def _serve(self) -> None:
        progress, idle = self._progress, self._idle
        while not self._stopped:
            call = self._next_of_main()
            while call is not None:
                try:
                    self._run(call)
                except BaseException:
                    self._pass_on()
                    raise
                if self._queue:
                    call = self._keep_turn()
                else:
                    self._pass_on()
                    call = None
            idle.ready = False
            self._main_idle = idle
            try:
                if not self._stopped and not (self._queue and self._can_start()):
                    progress.wait(idle)
            except KeyboardInterrupt:  # came too late for the call it was meant for
                pass
        with self._lock:
            self._main_idle = None
            self._main_due = False

    def stop(self) -> None:
        """Let `serve` return after the call it is in."""
        self._stopped = True
        idle = self._main_idle
        if idle is not None:
            self._progress.complete(idle)

    def restart(self) -> None:
        """Allow `serve` again."""
        self._stopped = False

    def expect_main(self) -> None:
        """Make calls wait for the main thread, which will serve."""
        with self._lock:
            self._main_due = True

    def run(self, call: Call) -> None:
        """Run one call on this thread, which holds a turn, and pass the turn on."""
        try:
            self._run(call)
        finally:
            self._pass_on()

    def _run(self, call: Call) -> None:
        me = _ident()
        call.thread = me
        interrupts = self.interrupts
        if interrupts.noted or interrupts.postponed:
            interrupts.forget(me)
        call.began = self._now()
        self.calls[me] = call
        self.begun += 1
        try:
            call.run(call)
        except KeyboardInterrupt:  # an interrupt that came as the call ended
            pass
        finally:
            self.calls.pop(me, None)
            if call.line is not None:
                with self._lock:
                    call.line.busy = False

    def _keep_turn(self) -> Call | None:
        """Take the next call, for a thread whose call has ended; none: its turn is passed on."""
        if not self._stopped:
            with self._lock:
                claimed = self._waiting_to_resume and self._is_claimed()
                if claimed or not self._queue or self._running > self._limit:
                    call = None
                else:
                    call = self._pop()
            if call is not None:
                return call
        self._pass_on()
        return None

    def _pass_on(self) -> None:
        """Give a turn back: to a call that wants to go on, or to the next one."""
        with self._lock:
            heir = self._heir() if self._waiting_to_resume else None
            if heir is None:
                self._running -= 1
        if heir is not None:
            self._progress.complete(heir)
        elif self._queue:
            self._start_next()

    def _start_next(self) -> None:
        """Let somebody run the next call, if there is one."""
        if not self._queue or self._wake_main():
            return
        if self._limit > 1 or self._suspended or not self.serving:
            self._start_spare()

    def about_to_wait(self, call: Call) -> bool:
        """Tell whether the call's thread flushes what it posts without being asked.

        The main thread waits next, unless there is another call to run.
        """
        return call.thread == self._main and not self._queue and self.serving

    # Calls that wait

    def suspend(self, call: Call, slot: object) -> None:
        """Give the turn of a call away while it waits."""
        call.waits = True
        with self._lock:
            self._suspended += 1
            if call.line is not None:
                call.line.busy = False
            heir = self._heir()
            if heir is None:
                self._running -= 1
        if heir is not None:
            self._progress.complete(heir)
        elif self._queue:
            self._start_spare()

    def resume(self, call: Call) -> None:
        """Take a turn again: before calls that have not started."""
        with self._lock:
            self._suspended -= 1
            line = call.line
            free = line is None or line.is_free
            if free and self._running < self._limit and not self._is_claimed():
                self._running += 1
                slot = None
                if line is not None:
                    line.busy = True
            else:
                slot = Slot()
                self._waiting_to_resume.append((slot, line))
        interrupted = False
        while slot is not None:
            try:
                self._progress.wait(slot)
                slot = None
            except KeyboardInterrupt:  # raised once the turn is ours
                interrupted = True
        call.waits = False
        if interrupted:
            raise KeyboardInterrupt

    # Methods of objects

    def begin(self, line: Line) -> bool:
        """Let a coroutine of an object begin now; or tell that methods are to end before it."""
        with self._lock:
            if line.busy or any(call.line is line for call in list(self._queue)):
                return False
            line.beginning += 1
            return True

    def will_begin(self, line: Line) -> None:
        """Let a coroutine begin whose turn has come: it was queued as a method is."""
        with self._lock:
            line.beginning += 1

    def has_begun(self, line: Line) -> None:
        """Let the object's next method start: a coroutine has come to its first `await`."""
        with self._lock:
            line.beginning -= 1
            heir = self._heir() if self._running < self._limit else None
            if heir is not None:
                self._running += 1
        if heir is not None:
            self._progress.complete(heir)
        self._start_next()

    # Interrupting

    def interrupt(self) -> None:
        """End every started call with KeyboardInterrupt."""
        for thread in list(self.calls):
            self.interrupts.interrupt(thread)

    def on_sigint(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGINT in a worker: it is meant for the call that runs, if one does."""
        if self._main in self.calls:
            self.interrupts.on_sigint(signum, frame)

    # Threads without a turn

    def background(self, fn: Callable[[], None]) -> None:
        """Run something that may block on a spare thread; it takes no turn."""
        with self._lock:
            spare = self._spares.pop() if self._spares else None
        if spare is None:
            spare = _Spare(self, next(self._names))
        spare.give(fn)


class _Spare:
    """A thread that runs a call now and then."""

    def __init__(self, turns: Turns, number: int) -> None:
        self._turns = turns
        self._work: Any = None
        self._latch = turns._machine.lock()
        self._latch.acquire()
        turns._machine.start(self._loop, f"hpcdist-{number}")

    def give(self, work: object) -> None:
        self._work = work
        self._latch.release()

    def _loop(self) -> None:
        me = _ident()
        interrupts = self._turns.interrupts
        interrupts.hold(me)
        try:
            self._work_on()
        finally:
            interrupts.forget(me)
            interrupts.leave(me)

    def _work_on(self) -> None:
        while True:
            self._latch.acquire()
            work, self._work = self._work, None
            try:
                if isinstance(work, Call):
                    self._turns.run(work)
                else:
                    # One that was meant for a call, and found this thread between two.
                    self._turns.interrupts.forget(_ident())
                    work()
            except KeyboardInterrupt:
                pass
            except Exception:
                sys.excepthook(*sys.exc_info())
            del work
            with self._turns._lock:
                if len(self._turns._spares) >= _SPARE_MOST:
                    return
                self._turns._spares.append(self)
