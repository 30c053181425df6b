"""The event loop of a process: where `async def` functions run, interleaved, without a turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class Loop:
    """An asyncio loop on a thread of its own, started when first needed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._interrupted: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._run, name="hpcdist-loop", daemon=True).start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def start(
        self,
        begin: Callable[[], Coroutine[Any, Any, Any]],
        end: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Run the coroutine that `begin` makes, and tell `end` its result or its error."""
        self._loop.call_soon_threadsafe(self._spawn, begin, end)

    def _spawn(
        self,
        begin: Callable[[], Coroutine[Any, Any, Any]],
        end: Callable[[Any, BaseException | None], None],
    ) -> None:
        task = self._loop.create_task(self._finish(begin, end))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(
        self,
        begin: Callable[[], Coroutine[Any, Any, Any]],
        end: Callable[[Any, BaseException | None], None],
    ) -> None:
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
        self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in list(self._tasks):
            self._interrupted.add(task)
            task.add_done_callback(self._interrupted.discard)
            task.cancel()
