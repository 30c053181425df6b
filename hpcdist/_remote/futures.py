"""Futures: one value, set once, fetched anywhere.

A future's value lives with its owner, in a cell of the owner's table. The process that made the
call is told as soon as it ends; a small value comes along, a large one when it is fetched.
"""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._remote.cells import ONCE, cell_of, settle
from hpcdist._runtime import references
from hpcdist._runtime.controls import CANCEL, FETCH, PUT, READY, RUNNING, SENT
from hpcdist._runtime.node import node, pack_head
from hpcdist._runtime.references import Parcel, Reference, outgoing
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    CANCELLED,
    FAILED,
    KEPT,
    OK,
    OURS,
    OUTCOME,
    REFS,
)

_NOTHING = object()
_lock = threading.Lock()  # guards the lazy parts of futures


class Future(Reference, concurrent.futures.Future[Any]):
    """The result of a call, on its way; or, made by hand, a value somebody will `put`.

    It is a `concurrent.futures.Future`, and it may be sent to any process.

    Example:
        >>> import hpcdist
        >>> f = hpcdist.remotecall(pow, 1, 2, 10)
        >>> f.fetch()
        1024
    """

    # Set in the class, not in __init__: 20,000 futures are made in a breath.
    ready = False
    latch: Any = None
    error: BaseException | None = None
    value: Any = None  # what arrived: (flags, body, buffers)
    is_call = False
    _payload: Payload | None = None
    _cached: Any = _NOTHING
    _cond: threading.Condition | None = None
    _watchers: list[Any] | None = None
    _callbacks: list[Callable[[Any], Any]] | None = None
    _hooks: list[Callable[[], None]] | None = None
    _subscribed = False

    def __init__(self, pid: int | None = None) -> None:
        self.whence = node.me
        self.where = node.me if pid is None else pid
        self.id = next(node.ids)
        self._held = 1
        if self.where == node.me:
            cell_of(self.key)
            references.count(self.key, node.me, 1)
        else:
            peer = node.peer(self.where)
            peer.control(SENT, 0, pickle.dumps((self.whence, self.id, node.me), 5))

    @classmethod
    def _of_call(cls, where: int, ident: int) -> Future:
        """Make the future of a call this process is about to make."""
        self: Future = cls.__new__(cls)
        self.where = where
        self.whence = node.me
        self.id = ident
        self.is_call = True
        self._subscribed = True
        self._held = 1
        return self

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> Future:
        self: Future = cls.__new__(cls)
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
        with _lock:
            if self._subscribed:
                return
            self._subscribed = True
        if self.where == node.me:
            cell_of(self.key).when_set(self._set_here)
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
        peer.control(FETCH, ident, pack_head((self.key, False)))
        peer.hurry()

    def _set_here(self) -> None:
        cell = cell_of(self.key)
        if cell.outcome == OK:  # put from elsewhere: still pickled
            self.value = (OK, cell._payload, ())
        else:
            self.value = (cell.outcome, cell.body, ())
        node.complete(self)

    def _arrive(self, timeout: float | None) -> None:
        if not self.ready:
            self._subscribe()
            node.wait(self, timeout)

    def arrived(self) -> None:
        """Tell whoever watches. Called by the driver once the future is ready."""
        hooks = self._hooks
        if hooks:
            self._hooks = None
            for hook in hooks:
                hook()
        if self._cond is None:
            return
        with self._cond:
            self._cond.notify_all()
            watchers = list(self._watchers or ())
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
            node.turns.background(lambda: self._call_back(callbacks))

    def _call_back(self, callbacks: Sequence[Callable[[Any], Any]]) -> None:
        for fn in callbacks:
            try:
                fn(self)
            except Exception:
                concurrent.futures._base.LOGGER.exception("exception calling callback for %r", self)

    def _outcome(self) -> int:
        """How the call ended; of no meaning before it did."""
        return (self.value[0] & OUTCOME) if self.value is not None else FAILED

    def _lost(self) -> BaseException | None:
        """The error of a value that went with its owner."""
        if self._cached is _NOTHING and self.where in node.members.gone:
            return node.members.death(self.where)
        return None

    # Taking the value

    def fetch(self, timeout: float | None = None) -> Any:
        """Wait for the value and return it; later calls return the same object."""
        cached = self._cached
        if cached is not _NOTHING:
            return cached
        self._arrive(timeout)
        return self._take()

    result = fetch

    def _take(self) -> Any:
        cached = self._cached
        if cached is not _NOTHING:
            return cached
        if self.error is not None:
            raise _copied(self.error)
        lost = self._lost()
        if lost is not None:
            raise lost
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
            with _lock:
                parcel = self._payload or Parcel.of(body, buffers, bool(flags & REFS))
                if flags & REFS:
                    self._payload = parcel
        return self._keep(codec.loads(parcel.body, parcel.buffers))

    @property
    def has_plain_value(self) -> bool:
        """Whether the value came, pickled, and holds no references: `raw` then does not block."""
        return self.ready and self.value is not None and self.value[0] == OK

    def raw(self) -> Any:
        """Return what came, not yet unpickled: a payload; or a function that returns the value.

        For whoever keeps results for others: they let go of the value when they like.
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
        return Parcel.of(body, buffers, bool(flags & REFS)) if len(body) else lambda: None

    def _ask_for_all(self) -> Any:
        slot = node.request(self.where, FETCH, (self.key, True))
        node.wait(slot)
        if slot.error is not None:
            raise slot.error
        if slot.value[0] & OUTCOME == FAILED:
            raise _errors.decode_error(bytes(slot.value[1]))
        return slot.value

    def _keep(self, value: Any) -> Any:
        value = self.__dict__.setdefault("_cached", value)
        self.value = (OURS, None, ())
        self._payload = None
        if self._held:
            self._let_go()
        return value

    def wait(self, timeout: float | None = None) -> Future:
        """Wait for the value without fetching it; raise if the call failed."""
        if self._cached is _NOTHING:
            self._arrive(timeout)
            problem = self._problem()
            if problem is not None:
                raise problem
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
            raise lost
        if self.ready:
            return True
        if self.where == node.me:
            return cell_of(self.key).outcome >= 0 or self.ready
        slot = node.request(self.where, READY, self.key)
        node.wait(slot)
        if slot.error is not None:
            raise slot.error
        return bool(self.ready or slot.value[1])

    # Setting it

    def put(self, value: Any) -> None:
        """Set the value, once."""
        if self.is_call:
            if self.done():
                raise RuntimeError(ONCE)
            raise RuntimeError("the call this Future belongs to sets it")
        if self._cached is not _NOTHING or self.ready:
            raise RuntimeError(ONCE)
        if self.where == node.me:
            if not cell_of(self.key).set(OURS, value):
                raise RuntimeError(ONCE)
            self._keep_put(value)
            return
        body, buffers, with_refs = outgoing(codec.dumps(value), self.where)
        slot = node.request(self.where, PUT, (self.key, with_refs), body, buffers)
        node.wait(slot)
        if slot.error is not None:
            raise slot.error
        if slot.value[0] == FAILED:
            raise _errors.decode_error(bytes(slot.value[1]))
        self._keep_put(value)

    def _keep_put(self, value: Any) -> None:
        self.__dict__.setdefault("_cached", value)
        self.value = (OURS, None, ())
        if not self.ready:
            node.complete(self)

    def set_result(self, result: Any) -> None:
        """Set the value: `put` by the standard library's name."""
        self.put(result)

    # The standard library's face

    def done(self) -> bool:
        """Tell whether the call has ended, or its process."""
        if self.ready or self._cached is not _NOTHING or self.where in node.members.gone:
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
        if self.where == node.me:
            return not node.turns.is_queued(None, self.id)
        slot = node.request(self.where, RUNNING, self.key)
        node.wait(slot)
        return slot.error is None and bool(slot.value[1]) and not self.ready

    def cancel(self) -> bool:
        """Take the call back if it has not started; tell whether it was."""
        if self.cancelled():
            return True
        if self.done() or not self.is_call:
            return False
        if self.where == node.me:
            if not node.turns.withdraw(None, self.id):
                return False
            settle(self.whence, self.id, CANCELLED, b"")
            return True
        slot = node.request(self.where, CANCEL, self.key)
        node.wait(slot)
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

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        if not (self.ready or self._cached is not _NOTHING):
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()

            def finish() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            def tell() -> None:
                try:
                    loop.call_soon_threadsafe(finish)
                except RuntimeError:  # the loop has been closed: nobody waits any more
                    pass

            if self._hook(tell):
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
        if self._cond is None:
            with _lock:
                if self._cond is None:
                    self._cond = threading.Condition()
        self._subscribe()
        if not self.ready and self._cached is _NOTHING:
            lost = self._lost()
            if lost is not None:
                self.error = lost
                node.complete(self)
            node.start()
            node.progress.nudge()
        return self._cond

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        if self._watchers is None:
            self._watchers = []
        return self._watchers

    @property
    def _state(self) -> str:  # type: ignore[override]
        if self.cancelled():
            return "CANCELLED_AND_NOTIFIED"
        return "FINISHED" if self.ready or self._cached is not _NOTHING else "PENDING"


def _copied(error: BaseException) -> BaseException:
    """Raise a kept error anew: the traceback of one raising must not grow with the next."""
    if isinstance(error, ProcessExitedException):
        return ProcessExitedException(error.pid, error.why, error.host, error.stderr)
    return error


def _future(where: int, whence: int, ident: int, is_call: bool) -> Future:
    """Unpickle a future."""
    found: Future = references.handle(Future, where, whence, ident, is_call)
    return found


def _fetched(where: int, whence: int, ident: int, is_call: bool, value: Any) -> Future:
    """Unpickle a future that travels with its value."""
    found = _future(where, whence, ident, is_call)
    if found._cached is _NOTHING:
        found.__dict__.setdefault("_cached", value)
        if not found.ready:
            found.value = (OURS, None, ())
            node.complete(found)
    return found
