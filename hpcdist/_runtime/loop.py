"""The event loop of a process: where `async def` functions run, interleaved, without a turn."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from hpcdist._transport.machine import Machine

if TYPE_CHECKING:
    import asyncio


class Loop:
    """An asyncio loop on a thread of its own, started when first needed."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._starting = machine.lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._interrupted: set[asyncio.Task[None]] = set()
        self.begun = 0  # coroutines so far

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                loop = self._machine.event_loop()
                self._machine.start(lambda: self._run(loop), "hpcdist-loop")
                self._loop = loop
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        asyncio.set_event_loop(loop)
        loop.run_forever()

    def start(
        self,
        begin: Callable[[], Coroutine[Any, Any, Any]],
        end: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Run the coroutine that `begin` makes, and tell `end` its result or its error."""
        loop = self._loop or self._started()
        self.begun += 1
        loop.call_soon_threadsafe(self._spawn, loop, begin, end)

    def _spawn(
        self,
        loop: asyncio.AbstractEventLoop,
        begin: Callable[[], Coroutine[Any, Any, Any]],
        end: Callable[[Any, BaseException | None], None],
    ) -> None:
        task = loop.create_task(self._finish(begin, end))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(
        self,
        begin: Callable[[], Coroutine[Any, Any, Any]],
        end: Callable[[Any, BaseException | None], None],
    ) -> None:
        import asyncio

        value: Any = None
        error: BaseException | None = None
        try:
            value = await begin()
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            error = KeyboardInterrupt() if task in self._interrupted else exc
        except BaseException as exc:  # whatever it is belongs to the caller, not to our loop
            error = exc
        end(value, error)

    @property
    def running(self) -> int:
        """How many coroutines have started and not ended."""
        return len(self._tasks)

    def interrupt(self) -> None:
        """End every coroutine with KeyboardInterrupt, as seen by its caller."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        assert self._loop is not None
        for task in list(self._tasks):
            # One that is cancelled before its first step never takes it, and tells nobody. This
            # comes behind that step, which the loop has in its queue already.
            self._loop.call_soon(self._cancel, task)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        if not task.done():
            self._interrupted.add(task)
            task.add_done_callback(self._interrupted.discard)
            task.cancel()
