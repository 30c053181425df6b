"""Ctrl-C and `interrupt()`: KeyboardInterrupt comes where it tears nothing.

A thread in the middle of a message, or of an operation that moves an item, is *held*: an interrupt
is only noted, and raised where the operation allows it: in its wait, at its decision, at its end.
In a thread that is not held it is raised at once. The threads that run calls are held except while
they are in the user's function.

All of this rests on when CPython looks for signals and for exceptions from other threads: when a
Python function begins, at the end of a loop's turn, and after a call of anything but a plain Python
function; never between two other instructions. So to read `noted` and to write `held` in the
statement behind is one act, and so are a last write to `held` and the `return` to the caller. Hence
the plain dictionaries, and no `set`, whose `add` is such a call.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from importlib import import_module
from types import FrameType, TracebackType
from typing import TypeVar

from hpcdist._transport.machine import Machine, SignalHandler

_ident = threading.get_ident
_SIGINT = int(signal.SIGINT)
# The function in C: that of `signal` makes enums of numbers, which takes 5 us.
_handler_of = import_module("_signal").getsignal
_T = TypeVar("_T")
_Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]


class Interrupts:
    """The threads held back from interrupts, and those with one to come.

    Args:
        machine: Says which is the main thread, and how to reach a thread.
        rouse: Ends the sleep of threads that wait, so that they look at `noted`.
        later: Calls a function on another thread, in a moment.
    """

    def __init__(
        self,
        machine: Machine,
        rouse: Callable[[], None],
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        self.main = machine.main
        self.signalled = machine.signalled
        self.held: dict[int, bool] = {}  # by thread; true once its operation is decided
        self.noted: dict[int, bool] = {}  # threads that are to get KeyboardInterrupt
        self.postponed: dict[int, bool] = {}  # those that get it in a moment
        self._machine = machine
        self._settle = machine.settle
        self._rouse = rouse
        self._later = later

    # Who interrupts

    def on_sigint(self, signum: int, frame: FrameType | None) -> None:
        """Handle Ctrl-C, on the main thread."""
        if self.main in self.held:
            self.note(self.main)
        else:
            raise KeyboardInterrupt

    def note(self, thread: int) -> None:
        """End the wait that a held thread is in, or the next one, with KeyboardInterrupt."""
        self.noted[thread] = True
        self._rouse()

    def interrupt(self, thread: int) -> None:
        """Let a thread have KeyboardInterrupt as soon as it may."""
        if thread == self.main:
            self._machine.interrupt_main()  # its handler knows what may be
            return
        raise_in = self._machine.aim(thread, KeyboardInterrupt)
        # The test and what follows are one act: the thread does not run between them.
        if thread in self.held:
            self.noted[thread] = True
            self._rouse()
        else:
            raise_in()

    # Who is interrupted

    def hold(self, me: int) -> bool:
        """Begin to hold this thread; tell whether it was not held before: then `leave` ends it."""
        held = self.held
        if me in held:
            return False
        held[me] = False
        if me != self.main:
            try:
                # What another thread has raised in us, and is still to come, comes here.
                self._settle()
            except KeyboardInterrupt:
                del held[me]
                raise
        return True

    def leave(self, me: int) -> None:
        """Hold this thread no longer; raise an interrupt that was noted."""
        if me in self.noted:
            del self.noted[me]
            del self.held[me]
            raise KeyboardInterrupt
        del self.held[me]

    def look(self, me: int) -> None:
        """Raise an interrupt that was noted; the thread stays held."""
        if me in self.noted:
            del self.noted[me]
            raise KeyboardInterrupt

    def allow(self, me: int) -> None:
        """Hold this thread no longer: it goes into a user's function. `held[me] = False` ends that.

        The end is that bare statement: a function's beginning would be too late a place.
        """
        if me in self.noted:
            del self.noted[me]
            raise KeyboardInterrupt
        del self.held[me]

    def forget(self, me: int) -> None:
        """Drop interrupts of this thread that came too late for the call they were meant for."""
        self.noted.pop(me, None)
        self.postponed.pop(me, None)

    def postpone(self, me: int) -> None:
        """Let an interrupt that was noted come in a moment: what it was meant for is done."""
        del self.noted[me]
        self.postponed[me] = True
        self._later(lambda: self._again(me))

    def _again(self, thread: int) -> None:
        if self.postponed.pop(thread, None):
            self.interrupt(thread)

    def section(self) -> Section:
        """Make a section for this thread."""
        return Section(self)


class Section:
    """A stretch of an operation during which its thread is held.

    An interrupt ends a wait inside. One that comes outside of a wait is raised by `decide`, or at
    the end of the section; once the operation is decided, it is raised a moment after that.

    It begins when it is made, and ends with `with`; or with `end`, which takes fewer calls.
    """

    __slots__ = ("_interrupts", "_is_outer", "_me")

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        me = self._me = _ident()
        if me == interrupts.signalled and _handler_of(_SIGINT) is signal.default_int_handler:
            # Notebooks install the default handler anew before each cell.
            signal.signal(signal.SIGINT, interrupts.on_sigint)
        self._is_outer = interrupts.hold(me)

    def __enter__(self) -> Section:
        return self

    def decide(self) -> None:
        """Raise an interrupt that has come; else what was done is done, and it comes too late."""
        me, interrupts = self._me, self._interrupts
        if me in interrupts.noted:
            del interrupts.noted[me]
            raise KeyboardInterrupt
        interrupts.held[me] = True

    def succeed(self) -> None:
        """Say that what was to be done is done: an interrupt is raised after the section."""
        self._interrupts.held[self._me] = True

    def again(self) -> None:
        """Note an interrupt again that was raised, and caught."""
        self._interrupts.noted[self._me] = True

    def openly(self, fn: Callable[..., _T], *args: object) -> _T:
        """Call somebody else's function, in which an interrupt is raised at once."""
        me, interrupts = self._me, self._interrupts
        if not self._is_outer:
            return fn(*args)
        if me in interrupts.noted:
            del interrupts.noted[me]
            raise KeyboardInterrupt
        del interrupts.held[me]
        try:
            return fn(*args)
        finally:
            interrupts.held[me] = False

    @property
    def __exit__(self) -> _Exit:
        """What ends the section: a plain function, after which CPython does not look for signals.

        After a method it does, as `with` calls it: what was taken would be lost on its way out.
        """
        return lambda kind, error, trace: self.end(kind)

    def end(self, kind: type[BaseException] | None = None) -> None:
        """End the section; `kind` is what leaves it."""
        if not self._is_outer:
            return
        me, interrupts = self._me, self._interrupts
        while me in interrupts.noted:
            if not interrupts.held[me] and kind is not KeyboardInterrupt:
                interrupts.leave(me)
            if kind is KeyboardInterrupt:
                del interrupts.noted[me]  # one is on its way already
            else:
                interrupts.postpone(me)
        del interrupts.held[me]


class InterruptGuard:
    """While the main thread sleeps in our loop, Ctrl-C is ours even where others take it.

    Notebooks install the default handler anew before each cell.
    """

    def __init__(self, handler: SignalHandler) -> None:
        self._replaced = None
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._replaced = signal.signal(signal.SIGINT, handler)

    def end(self) -> None:
        """Give it back."""
        if self._replaced is not None:
            signal.signal(signal.SIGINT, self._replaced)
