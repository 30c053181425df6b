"""How users' functions run in this process: on threads that hold a turn, or on the event loop.

There is one way for all that run such functions: calls, parts of maps, jobs of trees. An interrupt
(Ctrl-C, `interrupt()`) is for the user's function alone. What comes before it, the message, and
what comes after it, the answer, must not be torn: there the thread is held, as
`_transport/interrupts.py` explains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CoroutineType
from typing import Any, TypeVar

from hpcdist._runtime.loop import Loop
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.turns import Call
from hpcdist._transport.contracts import Slot

T = TypeVar("T")
Unpacked = tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]  # function, arguments
Unpack = Callable[[Call], Unpacked]
Answer = Callable[[Call, Any, BaseException | None], None]


class Runners(Service):
    """What runs users' functions, and the event loop for those that are coroutines."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.interrupts = node.progress.interrupts
        self.event_loop = Loop(node.machine)
        self.all: list[Runner] = []

    def of(self, unpack: Unpack, answer: Answer) -> Runner:
        """Make what runs calls of one kind.

        Args:
            unpack: Gives the function, its arguments and its keywords. An error of it is the
                call's, and it can be interrupted as the function can.
            answer: Gives the caller the value, or the error. It is called again if an interrupt
                that came too late for the function has broken it off.
        """
        made = Runner(self, unpack, answer)
        self.all.append(made)
        return made

    def openly(self, call: Call, fn: Callable[..., T], *args: object) -> T:
        """Run more of the user's code for a call, where an interrupt is raised at once."""
        interrupts = self.interrupts
        try:
            interrupts.allow(call.thread)
            return fn(*args)
        finally:
            interrupts.held[call.thread] = False

    def awaited(self, coroutine: CoroutineType[Any, Any, Any]) -> Any:
        """Run a coroutine on the event loop, wait for it and return its result."""
        slot = Slot()

        def end(value: object, error: BaseException | None) -> None:
            slot.value, slot.error = value, error
            self.node.complete(slot)

        self.event_loop.start(lambda: coroutine, end)
        self.node.wait(slot)
        if slot.error is not None:
            raise slot.failure()
        return slot.value

    def interrupt(self) -> None:
        """End every started call with KeyboardInterrupt."""
        self.node.turns.interrupt()
        self.event_loop.interrupt()

    @property
    def counts(self) -> tuple[int, int]:
        """How many calls have started, and how many wait for a turn."""
        turns = self.node.turns
        return turns.running + self.event_loop.running, turns.queued

    @property
    def begun(self) -> int:
        """How many calls have been begun so far; two answers alike: none between them."""
        return self.node.turns.begun + self.event_loop.begun


class Runner:
    """What runs calls of one kind, and answers them."""

    def __init__(self, runners: Runners, unpack: Unpack, answer: Answer) -> None:
        self._interrupts = runners.interrupts
        self._event_loop = runners.event_loop
        self._unpack = unpack
        self._answer = answer

    def run(self, call: Call) -> None:
        """Run a call on this thread, which holds a turn, and answer it."""
        error: BaseException | None = None
        value, thread, interrupts = None, call.thread, self._interrupts
        held, noted = interrupts.held, interrupts.noted
        try:
            try:
                if noted:
                    interrupts.allow(thread)
                else:
                    del held[thread]
                f, args, kw = self._unpack(call)
                value = f(*args, **kw) if kw else f(*args) if args else f()
            finally:
                held[thread] = False
        except BaseException as exc:  # the edge of this process: it belongs to the caller
            error = exc
        while True:
            try:
                if type(value) is CoroutineType:
                    self._go_on(call, value)
                else:
                    self._answer(call, value, error)
                return
            except KeyboardInterrupt:  # an interrupt that came too late for the function
                continue

    def start(self, call: Call) -> None:
        """Run a call of a coroutine function on the event loop, and answer it."""

        async def begin() -> Any:
            f, args, kw = self._unpack(call)
            return await f(*args, **kw)

        self._event_loop.start(begin, lambda value, error: self._end(call, value, error))

    def _go_on(self, call: Call, coroutine: CoroutineType[Any, Any, Any]) -> None:
        """Run the coroutine that a function has returned."""
        self._event_loop.start(lambda: coroutine, lambda v, error: self._end(call, v, error))

    def _end(self, call: Call, value: object, error: BaseException | None) -> None:
        while True:
            try:
                self._answer(call, value, error)
                return
            except KeyboardInterrupt:  # as above
                continue
