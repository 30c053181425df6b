"""The standard library's executor, on our workers.

Tasks wait here, and only some milliseconds' worth of them are on their way to each worker at any
time: so they can be cancelled, and the next one goes to a free worker.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from concurrent.futures import Executor as _StandardExecutor
from functools import partial
from typing import Any, TypeVar, overload

from hpcdist._errors import ProcessExitedException
from hpcdist._hints import Hinting, suggesting
from hpcdist._integrations import mapping
from hpcdist._integrations import tasks as _tasks
from hpcdist._integrations.endings import Endings
from hpcdist._integrations.executors import ELSEWHERE, Executors, checked
from hpcdist._integrations.originals import named, original
from hpcdist._integrations.ranked_tasks import SECTIONS, RankedTasks
from hpcdist._integrations.tasks import NOBODY, Lane, Pace, Step, Task
from hpcdist._integrations.waiting import TaskFuture
from hpcdist._items import random_numbers
from hpcdist._maps import fitting
from hpcdist._maps.default_pool import is_default
from hpcdist._maps.demand import Want
from hpcdist._public import public
from hpcdist._remote.futures import Future as RemoteFuture
from hpcdist._transport.contracts import Slot
from hpcdist._typing import Async
from hpcdist._wire.messages import CancelCall

R = TypeVar("R")
_LOSSES = 3  # how often a task that had not begun is sent again after the death of its worker

_LOOK_FOR_WORKERS = 1.0  # seconds; those that come tell


@public
class Executor(Hinting, _StandardExecutor):
    """A `concurrent.futures.Executor` whose tasks run on the cluster's workers.

    Its futures raise the original exceptions; the worker's traceback is their `__cause__`.

    Args:
        pool: Pids, a pool, or a tag; default all workers, also those that join later.
        max_workers: Use no more workers than this.
        initializer: Called on each worker before its first task of this executor.
        initargs: Its arguments.
        duration: How many seconds a task takes at most. A worker whose job ends sooner gets none;
            by default what earlier tasks of the function have taken decides.
        ranks: Run each task on so many workers of one world; see `spmd`. Its result is rank 0's.

    Example:
        >>> import hpcdist
        >>> pids = hpcdist.addprocs(2)
        >>> with hpcdist.Executor() as executor:
        ...     list(executor.map(pow, [2, 3, 4], [10, 10, 10]))
        [1024, 59049, 1048576]
        >>> hpcdist.shutdown()
    """

    _elsewhere = ELSEWHERE

    @suggesting
    def __init__(
        self,
        pool: object = None,
        *,
        max_workers: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[object] = (),
        duration: float | None = None,
        ranks: int | None = None,
    ) -> None:
        self._executors = Executors.here()
        self._node = node = self._executors.node
        node.admit()
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._ranked = None if ranks is None else RankedTasks(node, ranks, max_workers)
        self._pool = checked(pool, node)
        self._max_workers = max_workers
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._now = node.machine.now
        self._lock = node.machine.lock()  # guards all below
        self._queue: deque[Task] = deque()
        self._lanes: dict[int, Lane] = {}
        self._pace = Pace()
        self._endings = Endings(node, fitting.checked(duration))
        self._usable: list[int] = []  # the workers that tasks go to now
        self._serial = itertools.count()
        self._is_watching = False
        self._prepared: set[int] = set()  # workers whose initializer is done
        self._preparing: set[int] = set()
        self._arrivals: deque[tuple[int, Task, RemoteFuture[Any]]] = deque()  # ended, not looked at
        self._is_looking = False
        self._first_lost: dict[int, TaskFuture] = {}  # by dead worker: what it ran
        self._settling = 0  # tasks that have ended and whose futures are about to say so
        self._broken: str | bool = False
        self._is_shut_down = False
        self._had_workers = False
        self._idle_slots: list[Slot] = []
        self._executors.add(self)

    def __repr__(self) -> str:
        with self._lock:
            flying = sum(len(lane.tasks) for lane in self._lanes.values())
            state = "shut down" if self._is_shut_down else "open"
            return f"<hpcdist.Executor, {state}: {flying} tasks running, {len(self._queue)} queued>"

    # What users call

    @overload
    def submit(self, fn: Async[R], /, *args: object, **kwargs: object) -> Future[R]: ...
    @overload
    def submit(self, fn: Callable[..., R], /, *args: object, **kwargs: object) -> Future[R]: ...
    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future[Any]:
        """Schedule `fn(*args, **kwargs)` and return its future.

        Raises:
            RuntimeError: The executor has been shut down.
            BrokenExecutor: The initializer has failed on a worker.
        """
        return self._submit(Task(self._node, fn, args, kwargs))

    def _submit(self, task: Task) -> Future[Any]:
        with self._lock:
            if self._broken:
                raise BrokenExecutor(self._broken)
            if self._is_shut_down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._executors.ended:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            task.serial = next(self._serial)
            self._queue.append(task)
        future: Future[Any] = task.future
        del task  # nobody but the queue holds what was given
        self._dispatch()
        return future

    @suggesting
    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        seed: int | None = None,
        progress: bool = False,
        duration: float | None = None,
    ) -> Iterator[R]:
        """Return an iterator of `fn`'s results, in order.

        Args:
            fn: The function; it takes one item of each iterable.
            *iterables: Consumed at once, unless `buffersize` is given.
            timeout: Seconds from now within which each result has to be there.
            chunksize: How many items go to a worker as one task.
            buffersize: How many tasks may be ahead of the results taken.
            seed: Of the numbers that `rng()` gives in the items; by default drawn anew.
            progress: Show a bar, on a terminal or in a notebook; elsewhere a line every 10 s.
            duration: How many seconds an item takes at most, as for `pmap`.

        Raises:
            TimeoutError: From the iterator.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else self._now() + timeout
        seed = None if seed is None else random_numbers.checked(seed)
        fits = self._endings.of_map(fitting.checked(duration), chunksize, self._usable)
        tasks = mapping.tasks(self._node, fn, zip(*iterables, strict=False), chunksize, seed, fits)
        total = mapping.count_of(iterables) if progress else None
        bar = None
        if progress:
            bar = mapping.MapBar(self._node.machine, total, self)
            tasks = bar.counted(tasks)
        first = tasks if buffersize is None else itertools.islice(tasks, buffersize)
        futures = deque(map(self._submit, first))
        more = iter(()) if buffersize is None else tasks
        now = self._now
        left = lambda: None if deadline is None else deadline - now()
        results = mapping.results(weakref.ref(self), futures, more, left)
        if bar is not None:
            results = bar.closing(results)
        return mapping.flattened(results) if chunksize > 1 else results

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

    def _end_with_program(self) -> None:
        self._wait_idle()

    def _wait_idle(self) -> None:
        slot = Slot()
        with self._lock:
            if self._is_idle():
                return
            self._idle_slots.append(slot)
        self._node.wait(slot)

    def _is_idle(self) -> bool:
        return not (self._queue or self._settling or self._is_flying())

    def want(self) -> Want | None:
        """Tell what of its tasks waits for workers; None: for none that could come."""
        tag: str = getattr(self._pool, "tag", "")
        if self._pool is not None and not (tag or is_default(self._pool)):
            return None
        with self._lock:
            flying = sum(len(lane.tasks) for lane in self._lanes.values())
            if not (self._queue or flying):
                return None
            seconds = self._pace.seconds(self._queue[0]) if self._queue else None
            ranks = self._ranked.ranks if self._ranked is not None else 1
            waiting, flying = len(self._queue) * ranks, flying * ranks
            return Want(waiting, flying, seconds, tag, self._max_workers)

    @property
    def _workers_now(self) -> int:
        return len(self._usable)

    def _is_flying(self) -> bool:
        return any(lane.tasks for lane in self._lanes.values())

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
                self._watch()
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
        """Return the workers we were told to use. Not under our lock: a pool may live elsewhere."""
        if self._pool is None:
            return []
        return self._pool if isinstance(self._pool, list) else list(self._pool.workers())

    def _next(self, wanted: list[int]) -> Step | None:
        """Choose the next thing to do, if there is any."""
        queue = self._queue
        while queue and queue[0].future.cancelled():
            queue.popleft().future.set_running_or_notify_cancel_once()
        if not queue:
            self._wake_if_idle()
            return None
        if self._broken:  # a task has come back since: nothing may run any more
            return NOBODY
        pids = self._workers(wanted)
        if not pids:
            waits = self._is_flying() or self._preparing or self._awaits()
            return None if waits else NOBODY
        if self._initializer is not None:
            for pid in pids:
                if pid not in self._prepared and pid not in self._preparing:
                    self._preparing.add(pid)
                    return Step(pid, prepare=True)
            pids = [pid for pid in pids if pid in self._prepared]
        now = self._now()
        lanes = {pid: self._lane(pid) for pid in pids}
        free = self._endings.with_time(queue[0], lanes)
        self._usable = [pid for pid in pids if pid in free or lanes[pid].tasks]
        if self._ranked is None:
            pid = _tasks.shortest(free, now, self._pace.depth(queue[0]))
        else:
            flying = len(self._lane(SECTIONS).tasks) + len(self._preparing)
            pid = SECTIONS if self._ranked.has_room(flying, self._usable) else 0
        if not pid:
            return None
        task = queue.popleft()
        if not task.is_started:
            if not task.future.set_running_or_notify_cancel():
                return self._next(wanted)
            task.is_started = True
        self._lanes[pid].add(task, now)
        return Step(pid, task)

    def _awaits(self) -> bool:
        """Tell whether all workers are dead and others are on their way in their place."""
        members = self._node.members
        if self._pool is None:
            return bool(members.awaited) and not members.living
        tag: str = getattr(self._pool, "tag", "")
        return bool(tag) and members.awaits(tag) and not members.tagged(tag)

    def _lane(self, pid: int) -> Lane:
        lane = self._lanes.get(pid)
        if lane is None:
            lane = self._lanes[pid] = Lane()
        return lane

    def _workers(self, wanted: list[int]) -> list[int]:
        """Return the workers of now: some may have died, others may have joined."""
        node = self._node
        living = node.members.living
        if self._pool is None:
            pids = sorted(living)
        else:
            pids = [pid for pid in wanted if pid in living or pid == 1]
        if pids:
            self._had_workers = True
        elif self._pool is None and not (
            self._had_workers or self._awaits() or node.members.deserted()
        ):
            node.workers()  # a word to one who is alone
            pids = [1]  # alone: process 1 is its own worker. Never after the last one has died.
        return pids[: self._max_workers]

    def _send(self, pid: int, task: Task) -> None:
        try:
            how = self._ranked or self._executors.calls
            call = how.remotecall(task.fn, pid, task.args, task.kwargs)
        except ProcessExitedException as exc:
            with self._lock:  # it never got there: as if it had not been sent
                if self._again(pid, task):
                    return
            self._finish(pid, task, error=exc)
        except Exception as exc:  # what cannot be pickled: that task's failure alone
            self._finish(pid, task, error=exc)
        else:
            task.call = call
            hook = partial(self._arrived, pid, task, call)
            if not call._hook(hook):
                hook()

    # Ends

    def _arrived(self, pid: int, task: Task, call: RemoteFuture[Any]) -> None:
        """Take note that a task has ended. Called by the driver: no user code, no pickling."""
        simple = call.error is None and call.has_plain_value and not task.future.has_callbacks
        if simple and not self._queue:
            self._finish(pid, task, call.raw(), dispatch=False)
            if not self._queue:
                self._watch()
                return
        else:
            self._arrivals.append((pid, task, call))
        self._look_soon()

    def _workers_changed(self) -> None:
        """Give the workers that have come what waits behind long tasks."""
        if self._queue:
            self._look_soon()

    def _look_soon(self) -> None:
        with self._lock:
            if self._is_looking:
                return
            self._is_looking = True
        self._node.turns.background(self._look)

    def _look(self) -> None:
        """See to the tasks that have ended, and send the next ones; one thread at a time."""
        while True:
            while self._arrivals:
                self._ended(*self._arrivals.popleft())
            self._recall()
            self._dispatch()
            with self._lock:
                if not self._arrivals:
                    self._is_looking = False
                    return

    def _ended(self, pid: int, task: Task, call: RemoteFuture[Any]) -> None:
        error: BaseException | None
        payload: Any = None
        try:
            error = call.exception()
            if error is None:
                payload = call.raw()
        except CancelledError:  # we have asked for it, and it had not started
            with self._lock:
                self._lane(pid).came_back(task, self._now())
                self._requeue(task)
            return
        except BaseException as exc:  # the worker died with a large result
            error = exc
        if isinstance(error, ProcessExitedException) and pid != SECTIONS:
            self._lost(pid, task, error)
        else:
            self._finish(pid, task, payload, named(task, original(error)))

    def _lost(self, pid: int, task: Task, error: ProcessExitedException) -> None:
        """Fail the task a dead worker ran; send those behind it elsewhere, once."""
        with self._lock:
            flying = self._lane(pid).tasks
            unfinished = [t for t in flying if t.call is None or not _succeeded(t.call)]
            first = (unfinished or [task])[0].future
            ran = task.future is self._first_lost.setdefault(pid, first)
            if not ran and self._again(pid, task):
                return
            took = self._lane(pid).age(self._now())
            fate = self._endings.fate(task, pid, took, error) if ran else error
            if fate is None:
                self._send_back(pid, task)
                return
        self._finish(pid, task, error=named(task, fate))

    def _again(self, pid: int, task: Task) -> bool:
        """Queue a task that had not begun when its worker died, unless that was so too often."""
        task.losses += 1
        if task.losses > _LOSSES:
            return False
        self._send_back(pid, task)
        return True

    def _send_back(self, pid: int, task: Task) -> None:
        self._lane(pid).drop(task, self._now())
        self._requeue(task)

    def _requeue(self, task: Task) -> None:
        task.call = None
        task.is_asked = False
        _tasks.put_back(self._queue, task)

    def _finish(
        self,
        pid: int,
        task: Task,
        payload: object = None,
        error: BaseException | None = None,
        dispatch: bool = True,
    ) -> None:
        with self._lock:
            took = self._lane(pid).ended(task, self._pace, self._now())
            if took is not None and error is None:
                self._endings.note(task, took)
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
            self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._is_idle():
            for slot in self._idle_slots:
                self._node.complete(slot)
            self._idle_slots.clear()

    def _fail_all(self) -> None:
        """Fail all waiting tasks: no worker is left, or none that is initialised."""
        members = self._node.members
        with self._lock:
            tasks, self._queue = list(self._queue), deque()
            self._settling += 1
            wanted = self._pool if isinstance(self._pool, list) else sorted(members.gone)
        gone = [pid for pid in wanted if pid in members.gone]
        for task in tasks:
            if task.is_started or task.future.set_running_or_notify_cancel():
                error: Exception = ProcessExitedException(1, "it has no workers left")
                if self._broken:
                    error = BrokenExecutor(self._broken)
                elif gone:
                    error = members.death(gone[-1])
                    error.add_note("No worker is left. addprocs() starts new ones")
                task.future.fail(error)
        with self._lock:
            self._settling -= 1
            self._wake_if_idle()

    # Taking back what waits behind a long task

    def _watch(self) -> None:
        """Look again in a moment, if a task may have to be taken back then."""
        with self._lock:
            may_change = _tasks.may_change(self._used(), not self._queue)
            waits = self._queue and (self._endings.left_out or self._awaits())
            if self._is_watching or not (may_change or waits):
                return
            self._is_watching = True
        pause = _tasks.PATIENCE if may_change else _LOOK_FOR_WORKERS
        self._node.progress.call_later(pause, self._look_again)

    def _look_again(self) -> None:
        self._is_watching = False
        self._look_soon()

    def _recall(self) -> None:
        node = self._node
        with self._lock:
            wanted = _tasks.to_recall(self._used(), self._now(), not self._queue)
            for task in wanted:
                task.is_asked = True
        for task in wanted:
            call = task.call
            if call is None:
                continue
            if call.where == node.me:
                call.cancel()
                continue
            try:
                node.request(call.where, CancelCall(call.key))  # the call itself says how it went
            except ProcessExitedException:
                continue

    def _used(self) -> list[Lane]:
        living = self._node.members.living if self._ranked is None else ()
        return [self._lane(pid) for pid in self._usable if pid in living or pid == 1]

    # The initializer

    def _prepare(self, pid: int) -> None:
        assert self._initializer is not None
        try:
            call = self._executors.calls.remotecall(self._initializer, pid, self._initargs, {})
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
        """Fail the waiting tasks: the initializer failed, and no task may run without it."""
        import logging

        with self._lock:
            if self._broken:
                return
            self._broken = f"the initializer failed on worker {pid}: {error!r}"
            tasks, self._queue = list(self._queue), deque()
            self._settling += 1
        logger = logging.getLogger("concurrent.futures")
        logger.critical("Exception in initializer:", exc_info=original(error))
        for task in tasks:
            if task.is_started or task.future.set_running_or_notify_cancel():
                broken = BrokenExecutor(self._broken)
                broken.__cause__ = error
                task.future.fail(broken)
        with self._lock:
            self._settling -= 1
            self._wake_if_idle()


def _succeeded(call: RemoteFuture[Any]) -> bool:
    return call.ready and call.error is None
