"""Futures of the standard library that may be waited for inside a worker's call.

A task that submits tasks and waits for them must give its turn away meanwhile, or the workers wait
for each other for ever. So every way of waiting for such a future ends in a wait of ours.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from hpcdist._frames import cut
from hpcdist._remote.futures import Snapshot, snapshot_of
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec

_DONE = ("FINISHED", "CANCELLED", "CANCELLED_AND_NOTIFIED")
_NOTHING: Any = object()


class TaskFuture(Future[Any]):
    """The future of a task: the first thread that asks unpickles its result.

    So no thread of ours ever holds the result itself, and it goes when its user lets go of it.

    Args:
        node: The process that waits for it.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self._slots: list[Slot] = []
        self._waiters: Any = _Waiters(node)
        self._payload: Any = _NOTHING

    @property
    def has_callbacks(self) -> bool:
        """Whether somebody's code is to be called at its end."""
        return bool(self._done_callbacks)  # type: ignore[attr-defined]

    def deliver(self, payload: object) -> None:
        """Set the result, still pickled, unless it is done already."""
        if not self.done():
            self._payload = payload
            self.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Set the error, unless it is done already."""
        if not self.done():
            self.set_exception(error)

    def set_running_or_notify_cancel_once(self) -> None:
        """Notify the waiters that it was cancelled, unless they know."""
        if self._state == "CANCELLED":
            self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, waiting for it."""
        try:
            self._await(timeout)
            if self._payload is not _NOTHING and self._state == "FINISHED":
                self._unpack()
            return super().result(0)
        except BaseException as exc:
            cut(exc)
            raise
        finally:
            del self  # an exception's traceback would keep it alive

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the task's error, waiting for its end."""
        self._await(timeout)
        return super().exception(0)

    def _get_snapshot(self) -> Snapshot:
        return snapshot_of(self)

    def _unpack(self) -> None:
        with self._condition:
            payload = self._payload
            if payload is _NOTHING:
                return
            try:
                self._result = payload() if callable(payload) else _loaded(payload)
            except Exception as exc:  # what came cannot be rebuilt here: the user's classes
                self._exception = exc
            self._payload = _NOTHING

    def _await(self, timeout: float | None) -> None:
        slot = Slot()
        with self._condition:
            if self._state in _DONE:
                return
            self._slots.append(slot)
        try:
            self._node.wait(slot, timeout)
        finally:
            with self._condition:
                if slot in self._slots:
                    self._slots.remove(slot)
            del self

    def _invoke_callbacks(self) -> None:
        with self._condition:
            slots, self._slots = self._slots, []
        for slot in slots:
            self._node.complete(slot)
        super()._invoke_callbacks()  # type: ignore[misc]


def _loaded(payload: Any) -> Any:
    return codec.loads(payload.body, payload.buffers)


class _Waiters(list[Any]):
    """Those who watch a future: `concurrent.futures.wait` and `as_completed`.

    They sleep on an event of theirs. Ours takes its place, as it can give a turn away.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    def append(self, waiter: Any) -> None:
        if type(waiter.event) is threading.Event and not waiter.event.is_set():
            waiter.event = TurnEvent(self._node)
        super().append(waiter)


class TurnEvent(threading.Event):
    """An event; in a worker's call, waiting for it gives the turn away."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self._sleepers: list[Slot] = []

    def set(self) -> None:
        super().set()
        sleepers, self._sleepers = self._sleepers, []
        for slot in sleepers:
            self._node.complete(slot)

    def wait(self, timeout: float | None = None) -> bool:
        slot = Slot()
        self._sleepers.append(slot)
        if not self.is_set():
            try:
                self._node.wait(slot, timeout)
            except TimeoutError:
                pass
        return self.is_set()
