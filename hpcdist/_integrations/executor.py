"""The standard library's executor, on our workers.

Tasks wait here, and few are on their way to each worker at any time: so they can be cancelled, and
the next one goes to whoever is free.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from concurrent.futures import Executor as _StandardExecutor
from functools import partial
from typing import Any

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException, RemoteException
from hpcdist._integrations.waiting import TaskFuture
from hpcdist._remote.calls import remotecall
from hpcdist._remote.futures import Future as RemoteFuture
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot

_IN_FLIGHT = 2  # one runs, the next is there when it ends; the others can still be cancelled
_LONG_WAIT = 3600.0


class RemoteTraceback(Exception):
    """The traceback of a task's error, as the worker would have printed it."""

    def __init__(self, pid: int, text: str) -> None:
        super().__init__(text)
        self.pid = pid

    def __str__(self) -> str:
        return f'\nOn worker {self.pid}:\n"""\n{self.args[0].rstrip()}\n"""'


class _Task:
    """A call that has not ended."""

    __slots__ = ("args", "call", "fn", "future", "is_retried", "is_started", "kwargs")

    def __init__(self, fn: Any, args: Any, kwargs: Any) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.future = TaskFuture()
        self.call: RemoteFuture | None = None
        self.is_started = False  # its future says "running"
        self.is_retried = False


class Executor(_StandardExecutor):
    """A `concurrent.futures.Executor` whose tasks run on the cluster's workers.

    Its futures raise the original exceptions; the worker's traceback is their `__cause__`.

    Args:
        pool: Pids, or a pool; default all workers, also those that join later.
        max_workers: Use no more workers than this.
        initializer: Called on each worker before its first task of this executor.
        initargs: Its arguments.

    Example:
        >>> import hpcdist
        >>> pids = hpcdist.addprocs(2)
        >>> with hpcdist.Executor() as executor:
        ...     list(executor.map(pow, [2, 3, 4], [10, 10, 10]))
        [1024, 59049, 1048576]
        >>> hpcdist.shutdown()
    """

    def __init__(
        self,
        pool: Any = None,
        *,
        max_workers: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._pool = _checked(pool)
        self._max_workers = max_workers
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._lock = threading.Lock()  # guards all below
        self._queue: deque[_Task] = deque()
        self._in_flight: dict[int, list[_Task]] = {}
        self._prepared: set[int] = set()  # workers whose initializer is done
        self._preparing: set[int] = set()
        self._arrivals: deque[tuple[int, _Task, RemoteFuture]] = deque()  # ended, not looked at
        self._is_looking = False
        self._first_lost: dict[int, _Task] = {}  # by dead worker: what it ran
        self._settling = 0  # tasks that have ended and whose futures are about to say so
        self._broken: str | bool = False
        self._is_shut_down = False
        self._had_workers = False
        self._idle_slots: list[Slot] = []
        _executors.add(self)

    def __repr__(self) -> str:
        with self._lock:
            flying = sum(map(len, self._in_flight.values()))
            state = "shut down" if self._is_shut_down else "open"
            return f"<hpcdist.Executor, {state}: {flying} tasks running, {len(self._queue)} queued>"

    # What users call

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule `fn(*args, **kwargs)` and return its future.

        Raises:
            RuntimeError: The executor has been shut down.
            BrokenExecutor: The initializer has failed on a worker.
        """
        task = _Task(fn, args, kwargs)
        with self._lock:
            if self._broken:
                raise BrokenExecutor(self._broken)
            if self._is_shut_down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if _exiting:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            self._queue.append(task)
        future: Future[Any] = task.future
        del task, fn, args, kwargs  # nobody but the queue holds what was given
        self._dispatch()
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Return an iterator of `fn`'s results, in order.

        Args:
            fn: The function; it takes one item of each iterable.
            *iterables: Consumed at once, unless `buffersize` is given.
            timeout: Seconds from now within which each result has to be there.
            chunksize: How many items go to a worker as one task.
            buffersize: How many tasks may be ahead of the results taken.

        Raises:
            TimeoutError: From the iterator.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        items: Iterator[Any] = zip(*iterables, strict=False)
        run = fn
        if chunksize > 1:
            items = ((chunk,) for chunk in _chunks(items, chunksize))
            run = partial(_run_chunk, fn)
        first = items if buffersize is None else itertools.islice(items, buffersize)
        futures = deque(self.submit(run, *args) for args in first)
        more = iter(()) if buffersize is None else items
        results = _results(weakref.ref(self), run, futures, more, deadline)
        if chunksize > 1:
            return _flattened(results)
        return results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks. The workers stay.

        Args:
            wait: Return only when all tasks have ended.
            cancel_futures: Cancel those that have not started.
        """
        with self._lock:
            self._is_shut_down = True
            dropped = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
        for task in dropped:
            if task.is_started or not task.future.cancel():
                task.future.fail(CancelledError())
            task.future.set_running_or_notify_cancel_once()
        dropped.clear()
        self._dispatch()  # lets go of what was cancelled
        if wait:
            self._wait_idle()

    def _wait_idle(self) -> None:
        slot = Slot()
        with self._lock:
            if self._is_idle():
                return
            self._idle_slots.append(slot)
        node.wait(slot)

    def _is_idle(self) -> bool:
        return not (self._queue or self._settling or any(self._in_flight.values()))

    # Sending

    def _dispatch(self) -> None:
        """Send what can be sent. No lock is held while anything is pickled."""
        while True:
            wanted = self._wanted() if self._queue else None
            with self._lock:
                if wanted is None and self._queue:  # a task has come just now
                    continue
                found = self._next(wanted or [])
            if found is None:
                return
            pid, task, prepare = found
            if prepare:
                self._prepare(pid)
            elif task is not None:
                self._send(pid, task)
            else:
                self._fail_all()
            del found, task

    def _wanted(self) -> list[int]:
        """The workers we were told to use. Not under our lock: a pool may live elsewhere."""
        if self._pool is None:
            return []
        return self._pool if isinstance(self._pool, list) else list(self._pool.workers())

    def _next(self, wanted: list[int]) -> tuple[int, _Task | None, bool] | None:
        """Choose the next thing to do: (pid, task, whether to initialise the worker first)."""
        queue = self._queue
        while queue and queue[0].future.cancelled():
            queue.popleft().future.set_running_or_notify_cancel_once()
        if not queue:
            self._tell_idle()
            return None
        pids = self._workers(wanted)
        if not pids:
            return None if any(self._in_flight.values()) or self._preparing else (0, None, False)
        if self._initializer is not None:
            for pid in pids:
                if pid not in self._prepared and pid not in self._preparing:
                    self._preparing.add(pid)
                    return pid, None, True
            pids = [pid for pid in pids if pid in self._prepared]
        load = {pid: len(self._in_flight.get(pid, ())) for pid in pids}
        pid = min(load, key=load.__getitem__, default=0)
        if not pid or load[pid] >= _IN_FLIGHT:
            return None
        task = queue.popleft()
        if not task.is_started:
            if not task.future.set_running_or_notify_cancel():
                return self._next(wanted)
            task.is_started = True
        self._in_flight.setdefault(pid, []).append(task)
        return pid, task, False

    def _workers(self, wanted: list[int]) -> list[int]:
        """The workers of now: some may have died, others may have joined."""
        living = node.members.living
        if self._pool is None:
            pids = sorted(living)
        else:
            pids = [pid for pid in wanted if pid in living or pid == 1]
        if pids:
            self._had_workers = True
        elif self._pool is None and not self._had_workers:
            pids = [1]  # alone: process 1 is its own worker. Never after the last one has died.
        return pids[: self._max_workers]

    def _send(self, pid: int, task: _Task) -> None:
        try:
            call = remotecall(task.fn, pid, *task.args, **task.kwargs)
        except ProcessExitedException as exc:
            with self._lock:  # it never got there: as if it had not been sent
                if not task.is_retried:
                    task.is_retried = True
                    self._in_flight[pid].remove(task)
                    self._queue.appendleft(task)
                    return
            self._settle(pid, task, error=exc)
        except Exception as exc:  # what cannot be pickled: that task's failure alone
            self._settle(pid, task, error=exc)
        else:
            task.call = call
            hook = partial(self._arrived, pid, task, call)
            if not call._hook(hook):
                hook()

    # Ends

    def _arrived(self, pid: int, task: _Task, call: RemoteFuture) -> None:
        """Take note that a task has ended. Called by the driver: no user code, no pickling."""
        simple = call.error is None and call.has_plain_value and not task.future.has_callbacks
        if simple and not self._queue:
            self._settle(pid, task, call.raw(), dispatch=False)
            if not self._queue:
                return
        else:
            self._arrivals.append((pid, task, call))
        with self._lock:
            if self._is_looking:
                return
            self._is_looking = True
        node.turns.background(self._look)

    def _look(self) -> None:
        """See to the tasks that have ended, and send the next ones; one thread at a time."""
        while True:
            while self._arrivals:
                self._ended(*self._arrivals.popleft())
            self._dispatch()
            with self._lock:
                if not self._arrivals:
                    self._is_looking = False
                    return

    def _ended(self, pid: int, task: _Task, call: RemoteFuture) -> None:
        error: BaseException | None
        payload: Any = None
        try:
            error = call.exception()
            if error is None:
                payload = call.raw()
        except BaseException as exc:  # the worker died with a large result, or CancelledError
            error = exc
        if isinstance(error, ProcessExitedException):
            self._lost(pid, task, error)
        else:
            self._settle(pid, task, payload, _original(error))

    def _lost(self, pid: int, task: _Task, error: ProcessExitedException) -> None:
        """A worker died. What it ran fails; what waited behind that goes elsewhere, once."""
        with self._lock:
            flying = self._in_flight.get(pid, [])
            unfinished = [t for t in flying if t.call is None or not _succeeded(t.call)]
            ran = task is self._first_lost.setdefault(pid, (unfinished or [task])[0])
            if not ran and not task.is_retried:
                task.is_retried = True
                flying.remove(task)
                self._queue.appendleft(task)
                return
        self._settle(pid, task, error=error)

    def _settle(
        self,
        pid: int,
        task: _Task,
        payload: Any = None,
        error: BaseException | None = None,
        dispatch: bool = True,
    ) -> None:
        with self._lock:
            flying = self._in_flight.get(pid, [])
            if task in flying:
                flying.remove(task)
            self._settling += 1
        if dispatch:
            self._dispatch()  # the worker first: callbacks may take their time
        future = task.future
        del task
        if error is not None:
            future.fail(error)
        else:
            future.deliver(payload)
        with self._lock:
            self._settling -= 1
            self._tell_idle()

    def _tell_idle(self) -> None:
        if self._is_idle():
            for slot in self._idle_slots:
                node.complete(slot)
            self._idle_slots.clear()

    def _fail_all(self) -> None:
        """No worker is left: nothing of what waits can ever run."""
        with self._lock:
            tasks, self._queue = list(self._queue), deque()
            self._settling += 1
            wanted = self._pool if isinstance(self._pool, list) else sorted(node.members.gone)
        gone = [pid for pid in wanted if pid in node.members.gone]
        for task in tasks:
            if task.is_started or task.future.set_running_or_notify_cancel():
                error: Exception = ProcessExitedException(1, "it has no workers left")
                task.future.fail(node.members.death(gone[-1]) if gone else error)
        with self._lock:
            self._settling -= 1
            self._tell_idle()

    # The initializer

    def _prepare(self, pid: int) -> None:
        assert self._initializer is not None
        try:
            call = remotecall(self._initializer, pid, *self._initargs)
        except ProcessExitedException:
            self._is_prepared(pid, None)
        except Exception as exc:  # it cannot be pickled
            self._is_prepared(pid, exc)
        else:
            call.add_done_callback(lambda call: self._is_prepared(pid, call.exception()))

    def _is_prepared(self, pid: int, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, ProcessExitedException):
            self._break(pid, error)
        with self._lock:
            self._preparing.discard(pid)
            if error is None:
                self._prepared.add(pid)
        self._dispatch()

    def _break(self, pid: int, error: BaseException) -> None:
        """The initializer has failed: nothing that waits may run on a worker it has not seen."""
        import logging

        with self._lock:
            if self._broken:
                return
            self._broken = f"the initializer failed on worker {pid}: {error!r}"
            tasks, self._queue = list(self._queue), deque()
            self._settling += 1
        logger = logging.getLogger("concurrent.futures")
        logger.critical("Exception in initializer:", exc_info=_original(error))
        for task in tasks:
            if task.is_started or task.future.set_running_or_notify_cancel():
                broken = BrokenExecutor(self._broken)
                broken.__cause__ = error
                task.future.fail(broken)
        with self._lock:
            self._settling -= 1
            self._tell_idle()


def _checked(pool: Any) -> Any:
    if pool is None or callable(getattr(pool, "workers", None)):
        return pool
    pids = [pool] if hasattr(pool, "__index__") else list(pool)
    if not pids:
        raise ValueError("an Executor needs at least one worker")
    if node.refusal:
        raise RuntimeError(node.refusal)
    for pid in pids:
        if pid != node.me:
            node.peer(pid)
    return pids


def _succeeded(call: RemoteFuture) -> bool:
    return call.ready and call.error is None


def _original(error: BaseException | None) -> BaseException | None:
    """Give back what the function raised, its remote traceback attached."""
    if not isinstance(error, RemoteException):
        return error
    cause = error.cause
    if isinstance(cause, _errors.RemoteCause):  # only its name and text came through
        return error
    cause.__cause__ = RemoteTraceback(error.pid, error.traceback)
    return cause


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _run_chunk(fn: Callable[..., Any], chunk: list[Any]) -> list[Any]:
    return [fn(*args) for args in chunk]


def _results(
    executor: weakref.ref[Executor],
    fn: Callable[..., Any],
    futures: deque[Future[Any]],
    more: Iterator[Any],
    deadline: float | None,
) -> Iterator[Any]:
    """Yield results in order, holding on to none; what is not taken is cancelled."""
    try:
        while futures:
            owner = executor()
            args = next(more, None) if owner is not None else None
            if owner is not None and args is not None:
                futures.append(owner.submit(fn, *args))
            del owner, args
            yield _taken(futures.popleft(), deadline)
    finally:
        for future in futures:
            future.cancel()


def _taken(future: Future[Any], deadline: float | None) -> Any:
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    except BaseException:
        future.cancel()
        raise
    finally:
        del future  # an exception's traceback would keep it, and the result, alive


def _flattened(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


# The end of the program: like the standard library's executors, ours finish what they were given.

_executors: weakref.WeakSet[Executor] = weakref.WeakSet()
_exiting = False


def _at_exit() -> None:
    global _exiting
    _exiting = True
    for executor in list(_executors):
        executor._wait_idle()


# Before the threads are joined and before atexit, where the workers are sent away: what
# concurrent.futures itself uses.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
