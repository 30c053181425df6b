"""Futures: one value, set once, fetched anywhere.

A future's value lives with its owner, in a cell of the owner's table. The process that made the
call gets word as soon as it ends; a small value comes along, a large one when it is fetched.
"""

from __future__ import annotations

import concurrent.futures
import copy
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Self

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._frames import brief, cut
from hpcdist._hints import Hinting
from hpcdist._public import public
from hpcdist._remote.cells import ONCE, Cell, Cells
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference, References, Value
from hpcdist._transport.contracts import Slot, Waitable
from hpcdist._wire import codec, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    CANCELLED,
    FAILED,
    KEPT,
    OK,
    OURS,
    OUTCOME,
    REFS,
    Buffer,
)
from hpcdist._wire.messages import AskReady, AskRunning, CancelCall, Fetch, Sent, SetFuture

_NOTHING = object()


# What others' futures have, and how it is written here.
_ELSEWHERE = {
    "get": "future.fetch(), or future.result()",
    "take": "future.fetch(): a fetched value stays",
    "join": "future.wait()",
    "successful": "future.exception() is None",
    "then": "future.add_done_callback(fn)",
}


@public
class Future(Hinting, Reference, Waitable, concurrent.futures.Future[Value]):
    """The result of a call, on its way; or, made by hand, a value somebody will `put`.

    It is a `concurrent.futures.Future`, and it may be sent to any process.

    Example:
        >>> import hpcdist
        >>> f = hpcdist.remotecall(pow, 1, 2, 10)
        >>> f.fetch()
        1024
    """

    _elsewhere = _ELSEWHERE

    # Set in the class, not in __init__: 20,000 futures are made in a breath.
    _futures: Futures  # of the process that has this handle
    value: Any = None  # what arrived: (flags, body, buffers)
    is_call = False
    _payload: Payload | None = None
    _cached: Any = _NOTHING
    _cond: threading.Condition | None = None
    _watchers: list[Any] | None = None
    _due: list[Any] | None = None  # watchers that were there when somebody saw that we are done
    _callbacks: list[Callable[[Any], Any]] | None = None
    _hooks: list[Callable[[], None]] | None = None
    _subscribed = False

    def __init__(self, pid: int | None = None) -> None:
        futures = self._futures = Futures.here()
        node = futures.node
        node.admit()
        self.whence = node.me
        self.where = node.me if pid is None else pid
        self.id = next(node.ids)
        self._references = futures.references
        self._held = 1
        if self.where == node.me:
            futures.cells.cell_of(self.key)
            self._references.count(self.key, node.me, 1)
        else:
            peer = node.peer(self.where)
            peer.send(Sent(self.whence, self.id, node.me))

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> Future[Value]:
        self: Future[Value] = cls.__new__(cls)
        self._futures = Futures.here()
        self.where, self.whence, self.id, self.is_call = where, whence, ident, facts
        return self

    def _facts(self) -> bool:
        return self.is_call

    def __reduce__(self) -> Any:
        if self._cached is not _NOTHING:
            return _fetched, (self.where, self.whence, self.id, self.is_call, self._cached)
        self._travels()
        return _future, (self.where, self.whence, self.id, self.is_call)

    def __del__(self) -> None:
        if self._held:
            self._let_go()

    def __repr__(self) -> str:
        state = "ready" if self.ready or self._cached is not _NOTHING else "pending"
        return f"<Future of process {self.where}, id {(self.whence, self.id)}, {state}>"

    # Waiting

    def _subscribe(self) -> None:
        """Ask the owner, once, to tell when the value is there."""
        if self._subscribed or self.ready or self._cached is not _NOTHING:
            return
        with self._futures.lock:
            if self._subscribed:
                return
            self._subscribed = True
        node = self._futures.node
        if self.where == node.me:
            self._cell.when_set(self._set_here)
            return
        ident = next(node.ids)
        node.pending[ident] = self
        try:
            peer = node.peer(self.where)
        except (ProcessExitedException, ValueError) as exc:
            node.pending.pop(ident, None)
            self.error = exc
            node.complete(self)
            return
        peer.send(Fetch(self.key, False), ident)
        peer.hurry()

    @property
    def _cell(self) -> Cell:
        """Where the value lies, if this process owns it."""
        return self._futures.cells.cell_of(self.key)

    def _set_here(self) -> None:
        cell = self._cell
        if cell.outcome == OK:  # put from elsewhere: still pickled
            self.value = (OK, cell.pickled, ())
        else:
            self.value = (cell.outcome, cell.body, ())
        self._futures.node.complete(self)

    def _arrive(self, timeout: float | None) -> None:
        if not self.ready:
            self._subscribe()
            self._futures.node.wait(self, timeout)

    def arrived(self) -> None:
        """Notify the watchers. The driver calls it once the future is ready."""
        hooks = self._hooks
        if hooks:
            self._hooks = None
            for hook in hooks:
                hook()
        if self._cond is None:
            return
        with self._cond:
            self._cond.notify_all()
            watchers = list(self._watchers or ()) if self._due is None else self._due
            self._due = []  # whoever comes from now on sees that we are done
            callbacks, self._callbacks = self._callbacks, None
            late, self._hooks = self._hooks, None  # hooked while we were on our way here
        for hook in late or ():
            hook()
        for watcher in watchers:
            if self._outcome() == CANCELLED:
                watcher.add_cancelled(self)
            elif self._outcome() == FAILED or self.error is not None:
                watcher.add_exception(self)
            else:
                watcher.add_result(self)
        if callbacks:
            self._futures.node.turns.background(lambda: self._call_back(callbacks))

    def _call_back(self, callbacks: Sequence[Callable[[Any], Any]]) -> None:
        for fn in callbacks:
            try:
                fn(self)
            except Exception:
                concurrent.futures._base.LOGGER.exception("exception calling callback for %r", self)

    def _outcome(self) -> int:
        """Return how the call ended; without meaning before it has."""
        return (self.value[0] & OUTCOME) if self.value is not None else FAILED

    def _lost(self) -> BaseException | None:
        """Return the error of a value that went with its owner."""
        members = self._futures.node.members
        if self._cached is _NOTHING and self.where in members.gone:
            return members.death(self.where)
        return None

    # Taking the value

    def fetch(self, timeout: float | None = None) -> Value:
        """Wait for the value and return it; later calls return the same object."""
        cached: Value = self._cached
        if cached is not _NOTHING:
            return cached
        try:
            arrived = self.value
            if self.ready and arrived is not None and arrived[0] == OK:
                return self._take()  # after an interrupt it can be taken again
            # What comes now is kept before an interrupt.
            with self._futures.interrupts.section():
                self._arrive(timeout)
                return self._take()
        except BaseException as exc:
            cut(exc)
            raise

    result = fetch

    def _take(self) -> Value:
        cached: Value = self._cached
        if cached is not _NOTHING:
            return cached
        if self.error is not None:
            raise _copied(self.error)
        if self.where in self._futures.node.members.gone:  # it went with its owner
            lost = self._lost()
            try:
                if lost is not None:
                    raise lost
            finally:
                del lost  # this frame is one of its traceback
        flags, body, buffers = self.value
        outcome = flags & OUTCOME
        if outcome == OURS:
            return self._keep(body)
        if outcome == FAILED:
            raise _errors.decode_error(bytes(body))
        if outcome == CANCELLED:
            raise concurrent.futures.CancelledError
        if outcome == KEPT:
            flags, body, buffers = self._ask_for_all()
        if isinstance(body, Payload):
            parcel = body
        elif not len(body):
            return self._keep(None)
        else:
            with self._futures.lock:
                parcel = self._payload or self._references.arrived(
                    body, buffers, bool(flags & REFS)
                )
                if flags & REFS:
                    self._payload = parcel
        return self._keep(codec.loads(parcel.body, parcel.buffers))

    @property
    def has_plain_value(self) -> bool:
        """Whether the value came, pickled, and holds no references: `raw` then does not block."""
        return self.ready and self.value is not None and self.value[0] == OK

    def raw(self) -> Any:
        """Return what came, not yet unpickled: a payload; or a function that returns the value.

        For an owner that keeps results for others: they let go of the value when they like.
        """
        if self._cached is not _NOTHING:
            value = self._cached
            return lambda: value
        flags, body, buffers = self.value
        if flags & OUTCOME == OURS:
            return lambda: body
        if flags & OUTCOME == KEPT:
            flags, body, buffers = self._ask_for_all()
        if isinstance(body, Payload):
            return body
        return (
            self._references.arrived(body, buffers, bool(flags & REFS))
            if len(body)
            else lambda: None
        )

    def _asked(
        self, message: NamedTuple, body: bytes = b"", buffers: Sequence[Buffer] = ()
    ) -> Slot:
        """Ask the owner, and wait for the answer."""
        node = self._futures.node
        slot = node.request(self.where, message, body, buffers)
        node.wait(slot)
        return slot

    def _ask_for_all(self) -> Any:
        slot = self._asked(Fetch(self.key, True))
        if slot.error is not None:
            raise slot.failure()
        if slot.value[0] & OUTCOME == FAILED:
            raise _errors.decode_error(bytes(slot.value[1]))
        return slot.value

    def _keep(self, value: Any) -> Value:
        kept: Value = self.__dict__.setdefault("_cached", value)
        self.value = (OURS, None, ())
        self._payload = None
        if self._held:
            self._let_go()
        return kept

    @brief
    def wait(self, timeout: float | None = None) -> Self:
        """Wait for the value without fetching it; raise if the call failed."""
        if self._cached is _NOTHING:
            self._arrive(timeout)
            problem = self._problem()
            if problem is not None:
                try:
                    raise problem
                finally:
                    del problem  # this frame is one of its traceback
        return self

    def _problem(self) -> BaseException | None:
        if self._cached is not _NOTHING:
            return None
        if self.error is not None:
            return _copied(self.error)
        outcome = self._outcome()
        if outcome == CANCELLED:
            raise concurrent.futures.CancelledError
        if outcome == FAILED:
            return _errors.decode_error(bytes(self.value[1]))
        return self._lost()

    @brief
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the call to end and return its error, or None."""
        if self._cached is _NOTHING:
            self._arrive(timeout)
        return self._problem()

    def isready(self) -> bool:
        """Tell whether the value (or the error) is there."""
        if self._cached is not _NOTHING:
            return True
        lost = self._lost()
        if lost is not None:
            try:
                raise lost
            finally:
                del lost  # this frame is one of its traceback
        if self.ready:
            return True
        if self.where == self._futures.node.me:
            return self._cell.outcome >= 0 or self.ready
        slot = self._asked(AskReady(self.key))
        if slot.error is not None:
            raise slot.failure()
        return bool(self.ready or slot.value[1])

    # Setting it

    def put(self, value: Value) -> None:
        """Set the value, once."""
        if self.is_call:
            if self.done():
                raise RuntimeError(ONCE)
            raise RuntimeError("the call this Future belongs to sets it")
        if self._cached is not _NOTHING or self.ready:
            raise RuntimeError(ONCE)
        if self.where == self._futures.node.me:
            if not self._cell.set(OURS, value):
                raise RuntimeError(ONCE)
            self._keep_put(value)
            return
        body, buffers, with_refs = self._references.outgoing(
            object_paths.dumps(value, "the value"), self.where
        )
        slot = self._asked(SetFuture(self.key, with_refs), body, buffers)
        if slot.error is not None:
            raise slot.failure()
        if slot.value[0] == FAILED:
            raise _errors.decode_error(bytes(slot.value[1]))
        self._keep_put(value)

    def _keep_put(self, value: object) -> None:
        self.__dict__.setdefault("_cached", value)
        self.value = (OURS, None, ())
        if not self.ready:
            self._futures.node.complete(self)

    def set_result(self, result: Value) -> None:
        """Set the value: `put` by the standard library's name."""
        self.put(result)

    # The standard library's face

    def done(self) -> bool:
        """Tell whether the call has ended, or its process."""
        gone = self._futures.node.members.gone
        if self.ready or self._cached is not _NOTHING or self.where in gone:
            return True
        if self._subscribed:
            return bool(self.ready)
        self._subscribe()
        return self.isready()

    def cancelled(self) -> bool:
        """Tell whether the call was cancelled before it started."""
        return self.ready and self.value is not None and self._outcome() == CANCELLED

    def running(self) -> bool:
        """Ask the owner whether the call has started and not ended."""
        if self.done() or not self.is_call:
            return False
        node = self._futures.node
        if self.where == node.me:
            return not node.turns.is_queued(None, self.id)
        slot = self._asked(AskRunning(self.key))
        return slot.error is None and bool(slot.value[1]) and not self.ready

    def cancel(self) -> bool:
        """Take the call back if it has not started; tell whether it was."""
        if self.cancelled():
            return True
        if self.done() or not self.is_call:
            return False
        node = self._futures.node
        if self.where == node.me:
            if not node.turns.withdraw(None, self.id):
                return False
            self._futures.cells.settle(self.whence, self.id, CANCELLED, b"")
            self.value = (CANCELLED, b"", ())
            node.complete(self)
            return True
        slot = self._asked(CancelCall(self.key))
        if slot.error is not None or not slot.value[1]:
            return self.cancelled()
        if self.whence == node.me:
            node.wait(self)  # the owner's word that it was cancelled follows at once
        return True

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        """Call `fn(self)` when the call has ended, on a thread of ours; at once if it has."""
        with self._condition:
            if not self.ready:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(fn)
                return
        self._call_back([fn])

    def __await__(self) -> Generator[Any, None, Value]:
        import asyncio

        if not (self.ready or self._cached is not _NOTHING):
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()

            def finish() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            def wake_loop() -> None:
                try:
                    loop.call_soon_threadsafe(finish)
                except RuntimeError:  # the loop has been closed: nothing waits any more
                    pass

            if self._hook(wake_loop):
                yield from waiter
        return self.fetch()

    def _hook(self, fn: Callable[[], None]) -> bool:
        """Let the driver call `fn` once the future is ready; tell whether it is still to come."""
        with self._condition:
            if self.ready:
                return False
            self._hooks = [*(self._hooks or ()), fn]
        return True

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        node = self._futures.node
        if self._cond is None:
            with self._futures.lock:
                if self._cond is None:
                    self._cond = node.machine.condition()
        self._subscribe()
        if not self.ready and self._cached is _NOTHING:
            lost = self._lost()
            if lost is not None:
                self.error = lost
                node.complete(self)
            node.start()
            node.progress.nudge()
        return self._cond

    def _get_snapshot(self) -> Snapshot:
        return snapshot_of(self)

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        if self._watchers is None:
            self._watchers = []
        return self._watchers

    @property
    def _state(self) -> str:  # type: ignore[override]
        """What `concurrent.futures` looks at, with the condition held, before it adds a watcher.

        One that sees us done is not to hear of it again, though `arrived` may still be to come.
        """
        if not self.cancelled() and not self.ready and self._cached is _NOTHING:
            return "PENDING"
        if self._due is None:
            self._due = list(self._watchers or ())
        return "CANCELLED_AND_NOTIFIED" if self.cancelled() else "FINISHED"


class Futures(Service):
    """What the futures of one process share."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.references = node.service(References)
        self.cells = node.service(Cells)
        self.interrupts = node.progress.interrupts
        self.lock = node.machine.lock()  # guards the lazy parts of futures

    def of_call(self, where: int, ident: int, called: str) -> Future[Any]:
        """Make the future of a call this process is about to make; it holds nothing before that."""
        future: Future[Any] = Future.__new__(Future)
        future._futures = self
        future._references = self.references
        future.where = where
        future.whence = self.node.me
        future.id = ident
        future.is_call = True
        future._subscribed = True
        future.called = called
        return future

    def fail(self, future: Future[Any], error: BaseException) -> None:
        """Set an error in place of the value, which is owned here."""
        future.error = error
        self.cells.cell_of(future.key).set(FAILED, _errors.encode_error(error, self.node.me))
        if not future.ready:
            self.node.complete(future)


Snapshot = tuple[bool, bool, Any, BaseException | None]


def snapshot_of(future: concurrent.futures.Future[Any]) -> Snapshot:
    """Tell what asyncio asks of a future since Python 3.14: is it done, cancelled; value, error."""
    if not future.done() or future.cancelled():
        return future.done(), future.cancelled(), None, None
    try:
        return True, False, future.result(), None
    except Exception as exc:
        return True, False, None, exc


def _copied(error: BaseException) -> BaseException:
    """Copy a kept error, to be raised: its frames hold the future, and must not grow in number."""
    if isinstance(error, ProcessExitedException):
        return error.copy()
    return copy.copy(error)


def _future(where: int, whence: int, ident: int, is_call: bool) -> Future[Any]:
    """Unpickle a future."""
    found: Future[Any] = References.here().handle(Future, where, whence, ident, is_call)
    return found


def _fetched(where: int, whence: int, ident: int, is_call: bool, value: object) -> Future[Any]:
    """Unpickle a future that travels with its value."""
    found = _future(where, whence, ident, is_call)
    if found._cached is _NOTHING:
        found.__dict__.setdefault("_cached", value)
        if not found.ready:
            found.value = (OURS, None, ())
            found._futures.node.complete(found)
    return found
