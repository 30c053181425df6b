"""`Executor.map`: items become tasks, and tasks become results, in order."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import CoroutineType
from typing import Any, Protocol

from hpcdist._collective.section_members import SectionMembers
from hpcdist._integrations.tasks import Task, one
from hpcdist._items import item_names, progress_bars, random_numbers
from hpcdist._maps.fitting import Fitting
from hpcdist._remote.answers import PackedResult
from hpcdist._runtime.node import Node
from hpcdist._transport.machine import Machine
from hpcdist._wire import codec
from hpcdist._wire.generators import Repeats


class Submits(Protocol):
    """What takes tasks: an executor."""

    def _submit(self, task: Task) -> Future[Any]: ...

    @property
    def _workers_now(self) -> int: ...


def tasks(
    node: Node,
    fn: Callable[..., object],
    items: Iterator[tuple[object, ...]],
    chunksize: int,
    seed: int | None,
    fitting: Fitting,
) -> Iterator[Task]:
    """Make the tasks of a map, as they are asked for."""
    for task in _tasks(node, fn, items, chunksize, seed):
        task.fitting = fitting
        yield task


def _tasks(
    node: Node,
    fn: Callable[..., object],
    items: Iterator[tuple[object, ...]],
    chunksize: int,
    seed: int | None,
) -> Iterator[Task]:
    items = Repeats(fn).watched(items)
    if chunksize == 1:
        for index, args in enumerate(items):
            if seed is None:
                yield Task(node, fn, args, {}, index, args)
            else:
                seeded = (fn, seed, index, args)
                yield Task(node, run_seeded, seeded, {}, index, args, fn)
        return
    start = 0
    while chunk := list(itertools.islice(items, chunksize)):
        yield Task(node, run_chunk, (fn, chunk, start, seed), {}, kind=fn)
        start += chunksize


def run_seeded(fn: Callable[..., object], seed: int, index: int, args: tuple[object, ...]) -> Any:
    """Run an item with random numbers of its own; each rank of a task with several has some."""
    rank = SectionMembers.here().rank_here()
    return random_numbers.run_item(fn, seed, index, args, rank)


def run_chunk(
    fn: Callable[..., Any], chunk: list[tuple[Any, ...]], start: int, seed: int | None
) -> Any:
    """Run the items of a task that has several; return the list of results, or what awaits it."""
    values: Iterator[Any]
    if seed is None:
        values = itertools.starmap(fn, chunk)
    else:
        values = (run_seeded(fn, seed, start + k, args) for k, args in enumerate(chunk))
    return collected(values, lambda k: one(chunk[k]), start)


def collected(values: Iterator[Any], item: Callable[[int], object], start: int) -> Any:
    """Return the list of values, pickled, or what awaits it.

    Args:
        values: Come as a function is called for one item after the other.
        item: Gives the item that a value belongs to: an error names it.
        start: The place of the first item in its map.
    """
    done: list[Any] = []
    try:
        done.extend(values)
    except Exception as exc:
        item_names.name_item(exc, start + len(done), item(len(done)))
        raise
    try:  # no coroutine can be pickled: to look for one takes as long as items that do nothing
        return PackedResult(codec.dumps(done), done)
    except Exception:
        return _awaited(done, item, start) if CoroutineType in set(map(type, done)) else done


async def _awaited(done: list[Any], item: Callable[[int], object], start: int) -> list[Any]:
    """Wait for the coroutines among the results of a task, one after the other."""
    for k, value in enumerate(done):
        if type(value) is not CoroutineType:
            continue
        try:
            done[k] = await value
        except Exception as exc:
            for other in done[k + 1 :]:
                if type(other) is CoroutineType:
                    other.close()
            item_names.name_item(exc, start + k, item(k))
            raise
    return done


def results(
    executor: weakref.ref[Submits],
    futures: deque[Future[Any]],
    more: Iterator[Task],
    left: Callable[[], float | None],
) -> Iterator[Any]:
    """Yield results in order, holding on to none; what is not taken is cancelled.

    Args:
        executor: Takes the tasks.
        futures: Of the tasks that it has taken.
        more: The other tasks.
        left: Tells how long the next result may take.
    """
    try:
        while futures:
            owner = executor()
            task = next(more, None) if owner is not None else None
            if owner is not None and task is not None:
                futures.append(owner._submit(task))
            del owner, task
            yield _taken(futures.popleft(), left())
    finally:
        for future in futures:
            future.cancel()


def _taken(future: Future[Any], timeout: float | None) -> Any:
    try:
        return future.result(timeout)
    except BaseException:
        future.cancel()
        raise
    finally:
        del future  # an exception's traceback would keep it, and the result, alive


def flattened(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


# The bar of `progress=True`


def count_of(iterables: Sequence[Any]) -> int | None:
    """Tell how many items a map has, if that is known."""
    if not iterables or not all(hasattr(items, "__len__") for items in iterables):
        return None
    return min(map(len, iterables))


class MapBar:
    """The bar of a map."""

    def __init__(self, machine: Machine, total: int | None, executor: Submits) -> None:
        self.failures = 0
        self._executor = weakref.ref(executor)
        self._workers = 0
        self._open: dict[Future[Any], int] = {}  # what is not counted yet, and how many items
        self._bar = progress_bars.bar(machine, total)
        self._bar.watch(self)

    @property
    def workers(self) -> int:
        """How many workers the executor uses; once it is gone, how many it used."""
        self._look()
        return self._workers

    def _look(self) -> None:
        executor = self._executor()
        if executor is not None:
            self._workers = executor._workers_now

    def counted(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """Count the items of each task when it ends."""
        for task in tasks:
            self._open[task.future] = len(task.args[1]) if task.fn is run_chunk else 1
            task.future.add_done_callback(self._count)
            yield task
            self._look()  # it goes to somebody now

    def _count(self, future: Future[Any]) -> None:
        items = self._open.pop(future, 0)
        if not items or future.cancelled():
            return
        if future.exception() is not None:
            self.failures += 1
        else:
            self._bar.add(items)

    def closing(self, results: Iterator[object]) -> Iterator[Any]:
        """Leave the bar as it is when the last result has been taken.

        A result can be taken in the instant before another thread calls its future's callbacks.
        """
        try:
            yield from results
        finally:
            for future in list(self._open):
                if future.done():
                    self._count(future)
            self._open.clear()
            self._bar.close()
