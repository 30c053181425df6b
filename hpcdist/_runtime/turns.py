"""Whose call runs: calls start in the order they came, one at a time unless told otherwise.

A worker's main thread runs calls. A call that blocks in one of our waits gives its turn away: the
next one starts on a spare thread, and the first goes on once its wait is over and a turn is free.
Process 1 keeps its main thread to itself: there a spare thread serves.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from hpcdist._transport.contracts import Slot

if TYPE_CHECKING:
    from hpcdist._runtime.node import Node

_SUSPENDED_MOST = 256
_SPARE_MOST = 8
_ident = threading.get_ident
MAIN = threading.main_thread().ident or 0


class Call:
    """A call that has arrived."""

    __slots__ = (
        "aux",
        "body",
        "buffers",
        "flags",
        "ident",
        "peer",
        "refs",
        "run",
        "thread",
        "waits",
    )

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


class Turns:
    """The queue of calls, and the threads that run them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()  # guards all below
        self._queue: deque[Call] = deque()
        self._limit: float = 1
        self._running = 0
        self._suspended = 0
        self._waiting_to_resume: deque[Slot] = deque()
        self.calls: dict[int, Call] = {}  # started calls by thread
        self._idle = Slot()
        self._spares: list[_Spare] = []
        self._main_idle: Slot | None = None  # the main thread waits for a call on this
        self._main_due = False  # it has been woken, and takes the next call
        self.main_in_call = False
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
        if not self._wake_main():
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
        self._node.progress.complete(idle)
        return True

    def withdraw(self, peer: Any, ident: int) -> Call | None:
        """Take back a call that has not started; None: there is none."""
        with self._lock:
            for call in list(self._queue):
                if call.ident == ident and call.peer is peer:
                    self._queue.remove(call)
                    return call
        return None

    def drop_queue(self) -> None:
        """Forget the calls that have not started: nobody waits for them any more."""
        with self._lock:
            self._queue.clear()

    def is_queued(self, peer: Any, ident: int) -> bool:
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
        if not self._queue or taken >= self._limit or self._waiting_to_resume:
            return None
        self._running += 1
        return self._queue.popleft()

    def _can_start(self) -> bool:
        return bool(self._queue and self._running < self._limit and not self._waiting_to_resume)

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
                "stay queued. A function that mostly waits had better be `async def`.",
                file=sys.stderr,
            )

    # Running

    def serve(self) -> None:
        """Run calls on this (the main) thread until stopped."""
        progress, idle = self._node.progress, self._idle
        while not self._stopped:
            call = self._next_of_main()
            while call is not None:
                try:
                    self._run(call)
                except BaseException:
                    self._pass_on()
                    raise
                call = self._keep_turn()
            idle.ready = False
            self._main_idle = idle
            try:
                if not self._stopped and not self._can_start():
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
            self._node.progress.complete(idle)

    def restart(self) -> None:
        """Allow `serve` again."""
        self._stopped = False

    def expect_main(self) -> None:
        """The main thread will serve: a call that comes before that waits for it."""
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
        self.calls[me] = call
        try:
            call.run(call)
        except KeyboardInterrupt:  # an interrupt that came as the call ended
            pass
        finally:
            self.calls.pop(me, None)

    def _keep_turn(self) -> Call | None:
        """Take the next call, for a thread whose call has ended; none: its turn is passed on."""
        if self._queue and not self._stopped:
            with self._lock:
                fits = self._running <= self._limit and not self._waiting_to_resume
                if self._queue and fits:
                    return self._queue.popleft()
        self._pass_on()
        return None

    def _pass_on(self) -> None:
        """Give a turn back: to a call that wants to go on, or to the next one."""
        with self._lock:
            if self._waiting_to_resume:
                heir = self._waiting_to_resume.popleft()
            else:
                self._running -= 1
                heir = None
        if heir is not None:
            self._node.progress.complete(heir)
        elif not self._queue or self._wake_main():
            return
        elif self._limit > 1 or self._suspended or not self._node.serving:
            self._start_spare()

    def about_to_wait(self, call: Call) -> bool:
        """Tell whether the call's thread flushes what it posts without being asked.

        The main thread waits next, unless there is another call to run.
        """
        return call.thread == MAIN and not self._queue and self._node.serving

    # Calls that wait

    def suspend(self, call: Call, slot: Any) -> None:
        """Give the turn of a call away while it waits."""
        call.waits = True
        with self._lock:
            self._suspended += 1
            if self._waiting_to_resume:
                heir = self._waiting_to_resume.popleft()
            else:
                self._running -= 1
                heir = None
        if heir is not None:
            self._node.progress.complete(heir)
        elif self._queue:
            self._start_spare()

    def resume(self, call: Call) -> None:
        """Take a turn again: before calls that have not started."""
        with self._lock:
            self._suspended -= 1
            if self._running < self._limit and not self._waiting_to_resume:
                self._running += 1
                slot = None
            else:
                slot = Slot()
                self._waiting_to_resume.append(slot)
        interrupted = False
        while slot is not None:
            try:
                self._node.progress.wait(slot)
                slot = None
            except KeyboardInterrupt:  # raised once the turn is ours
                interrupted = True
        call.waits = False
        if interrupted:
            raise KeyboardInterrupt

    # Interrupting

    def interrupt(self) -> None:
        """End every started call with KeyboardInterrupt."""
        for thread, call in list(self.calls.items()):
            if call.waits:
                self._node.progress.interrupt(thread)
            elif thread == MAIN:
                signal.pthread_kill(thread, signal.SIGINT)
            else:
                _raise_in(thread)

    def on_sigint(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGINT in a worker: it is meant for the call that runs, if one does."""
        if self.main_in_call:
            self._node.progress.on_sigint(signum, frame)

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
        self._latch = threading.Lock()
        self._latch.acquire()
        self._thread = threading.Thread(target=self._loop, name=f"hpcdist-{number}", daemon=True)
        self._thread.start()

    def give(self, work: Any) -> None:
        self._work = work
        self._latch.release()

    def _loop(self) -> None:
        while True:
            self._latch.acquire()
            work, self._work = self._work, None
            try:
                if isinstance(work, Call):
                    self._turns.run(work)
                else:
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


def _raise_in(thread: int) -> None:
    import ctypes  # 4 ms: not at start-up

    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt)
    )
