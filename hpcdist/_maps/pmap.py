"""`pmap`, `imap` and `imap_unordered`: a function over collections, on all workers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from os import PathLike
from types import CoroutineType
from typing import Any, TypeVar, Unpack, overload

from hpcdist import _errors
from hpcdist._collective.spmd import checked_ranks
from hpcdist._frames import brief, cut
from hpcdist._hints import suggesting
from hpcdist._items import random_numbers
from hpcdist._items.progress_bars import Bar, bar
from hpcdist._items.random_numbers import Streams
from hpcdist._maps import fitting
from hpcdist._maps.backlog import Retries
from hpcdist._maps.blame import name_part
from hpcdist._maps.caching_pools import CachingPool
from hpcdist._maps.default_pool import DefaultPool, is_default
from hpcdist._maps.engine import Engine
from hpcdist._maps.failure import Failure
from hpcdist._maps.keeping import keeping
from hpcdist._maps.map_options import MapOptions
from hpcdist._maps.map_worker import Work
from hpcdist._maps.pools import AbstractWorkerPool, named
from hpcdist._maps.ranked import RankedEngine
from hpcdist._maps.results import Arrived, AsTheyCome, InOrder, Results
from hpcdist._maps.sources import Source
from hpcdist._maps.terms import Terms
from hpcdist._maps.under_way import Maps
from hpcdist._monitor import output
from hpcdist._public import public
from hpcdist._runtime.running import Runners
from hpcdist._transport.contracts import Slot
from hpcdist._transport.machine import Machine
from hpcdist._typing import Async


@public
class ExponentialBackOff:
    """Delays that grow: each is the one before times `factor`, give or take some chance.

    Args:
        n: How many delays.
        first_delay: The first of them, in seconds.
        max_delay: None is longer.
        factor: How much longer than the one before.
        jitter: By which part of itself a delay may be off.

    Example:
        >>> import hpcdist
        >>> list(hpcdist.ExponentialBackOff(4, 0.1, max_delay=3, factor=5, jitter=0))
        [0.1, 0.5, 2.5, 3]
    """

    def __init__(
        self,
        n: int = 1,
        first_delay: float = 0.05,
        max_delay: float = 10.0,
        factor: float = 5.0,
        jitter: float = 0.1,
    ) -> None:
        if min(n, first_delay, max_delay, factor, jitter) < 0:
            raise ValueError("all of n, first_delay, max_delay, factor, jitter must be 0 or more")
        self.n = n
        self.first_delay = first_delay
        self.max_delay = max_delay
        self.factor = factor
        self.jitter = jitter

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[float]:
        delay = min(self.first_delay, self.max_delay)
        for _ in range(self.n):
            yield delay
            chance = 1 - self.jitter + random.random() * 2 * self.jitter
            delay = min(self.max_delay, delay * self.factor * chance)

    def __repr__(self) -> str:
        return (
            f"ExponentialBackOff(n={self.n}, first_delay={self.first_delay}, "
            f"max_delay={self.max_delay}, factor={self.factor}, jitter={self.jitter})"
        )


R = TypeVar("R")


@overload
def pmap(
    f: Async[R],
    /,
    *collections: Iterable[Any],
    **how: Unpack[MapOptions],
) -> list[R]: ...
@overload
def pmap(
    f: Callable[..., R], /, *collections: Iterable[Any], **how: Unpack[MapOptions]
) -> list[R]: ...
@public
@brief
@suggesting
def pmap(
    f: Callable[..., Any],
    /,
    *collections: Iterable[object],
    pool: AbstractWorkerPool | str | None = None,
    distributed: bool = True,
    batch_size: int | str = "auto",
    on_error: Callable[[Exception], object] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[BaseException], object] | None = None,
    on_exit: str = "retry",
    progress: bool = False,
    seed: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Any], object] | None = None,
    duration: float | None = None,
    ranks: int | None = None,
) -> list[Any]:
    """Call a function on every item, on the workers, and return the results in order.

    Args:
        f: The function. It is sent once to each worker, with the data it has captured.
        collections: Its arguments, as for `map`: with several, the shortest ends it.
        pool: The workers to use: a pool, or a tag; by default all. Of a tag, and of all, also
            those that join meanwhile.
        distributed: False: run here.
        batch_size: How many items travel together: a number, or "auto" for 5 ms of work.
        on_error: Called on the worker with the exception of an item; returns its result. The
            exception says which item: `.index` and `.item`.
        retry_delays: Try a failed item again after these seconds, `ExponentialBackOff(3)` say.
        retry_check: Called here with the exception; tells whether to try again at all.
        on_exit: What becomes of the item a worker was running when it died: "retry" runs it
            elsewhere, at most twice; "raise" ends the map.
        progress: Show a bar, on a terminal or in a notebook; elsewhere a line every 10 s.
        seed: Of the numbers that `rng()` gives in the items; by default drawn anew.
        checkpoint: A file that keeps the results as they come. A map that finds some in it runs
            only the others.
        key: Names an item in the checkpoint; by default its index does.
        duration: How many seconds an item takes at most. A worker whose job ends sooner gets none;
            by default what earlier items of the map have taken decides.
        ranks: Run each item on so many workers of one world, with a communicator: see `spmd`. Its
            result is that of rank 0.

    Raises:
        CheckpointMismatch: The checkpoint is of another function, or of another number of items.
        RemoteException: The function failed. No new items were started, those running ended.
        ProcessExitedException: An item has ended its worker too often, or no worker is left.
            An error says which item it belongs to, in a note and as `.index` and `.item`.

    Example:
        >>> import hpcdist
        >>> hpcdist.pmap(pow, range(5), [2, 2, 2, 3])
        [0, 1, 4, 27]
    """
    job = _Job(
        f, collections, pool, distributed, batch_size, on_error, retry_delays, retry_check,
        on_exit, progress, seed, checkpoint, key, duration, ranks,
    )  # fmt: skip
    out: list[Any] = []
    if job.source.size is not None:
        out = [None] * job.source.size

    def sink(start: int, results: list[Any]) -> None:
        end = start + len(results)
        if end > len(out):
            out.extend([None] * (end - len(out)))
        out[start:end] = results

    with job:
        engine = job.engine(sink)
        if engine is None:
            return list(job.here())
        engine.run()
        while (run := job.finished()) is not None:
            sink(*run)
    return out


@overload
def imap(
    f: Async[R],
    /,
    *collections: Iterable[Any],
    **how: Unpack[MapOptions],
) -> Results[R]: ...
@overload
def imap(
    f: Callable[..., R], /, *collections: Iterable[Any], **how: Unpack[MapOptions]
) -> Results[R]: ...
@public
@suggesting
def imap(
    f: Callable[..., Any],
    /,
    *collections: Iterable[object],
    pool: AbstractWorkerPool | str | None = None,
    distributed: bool = True,
    batch_size: int | str = "auto",
    on_error: Callable[[Exception], object] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[BaseException], object] | None = None,
    on_exit: str = "retry",
    progress: bool = False,
    seed: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Any], object] | None = None,
    duration: float | None = None,
    ranks: int | None = None,
) -> Results[Any]:
    """Yield the results of a map one by one, in order; else like `pmap`.

    It takes no more from the collections than keeps the workers busy, so they may be endless.
    An error is raised once the results before it have been given.
    `close()` ends the map; what runs then ends by itself.

    Example:
        >>> import hpcdist, itertools
        >>> squares = hpcdist.imap(lambda x: x * x, itertools.count())
        >>> next(squares), next(squares), next(squares)
        (0, 1, 4)
        >>> squares.close()
    """
    job = _Job(
        f, collections, pool, distributed, batch_size, on_error, retry_delays, retry_check,
        on_exit, progress, seed, checkpoint, key, duration, ranks, copy=True, in_order=True,
    )  # fmt: skip
    return Results(_yielded(job, InOrder()), job.seed)


@overload
def imap_unordered(
    f: Async[R],
    /,
    *collections: Iterable[Any],
    **how: Unpack[MapOptions],
) -> Results[R]: ...
@overload
def imap_unordered(
    f: Callable[..., R], /, *collections: Iterable[Any], **how: Unpack[MapOptions]
) -> Results[R]: ...
@public
@suggesting
def imap_unordered(
    f: Callable[..., Any],
    /,
    *collections: Iterable[object],
    pool: AbstractWorkerPool | str | None = None,
    distributed: bool = True,
    batch_size: int | str = "auto",
    on_error: Callable[[Exception], object] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[BaseException], object] | None = None,
    on_exit: str = "retry",
    progress: bool = False,
    seed: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Any], object] | None = None,
    duration: float | None = None,
    ranks: int | None = None,
) -> Results[Any]:
    """Yield each result of a map as soon as it is there; else like `imap`.

    Example:
        >>> import hpcdist
        >>> sorted(hpcdist.imap_unordered(abs, [-3, 1, -2]))
        [1, 2, 3]
    """
    job = _Job(
        f, collections, pool, distributed, batch_size, on_error, retry_delays, retry_check,
        on_exit, progress, seed, checkpoint, key, duration, ranks, copy=True,
    )  # fmt: skip
    return Results(_yielded(job, AsTheyCome()), job.seed)


def _yielded(job: _Job, ready: Arrived) -> Generator[Any, None, None]:
    """Run a map as its results are asked for."""
    with job:
        engine = job.engine(ready.put)
        if engine is None:
            yield from job.here()
            return
        given = 0
        engine.backlog.look_ahead = lambda: given - job.keeping.given
        arrived: Callable[[], bool] = lambda: ready.has(given) or job.keeping.has(ready.next(given))
        failed: list[BaseException] = []  # to be emptied: its frames lead here
        while True:
            while arrived():
                results = deque(ready.take(given) or job.finished_from(ready.next(given)))
                while results:  # none is held here once it has been given
                    given += 1
                    yield results.popleft()
            if failed:
                raise Failure(failed.pop())
            if engine.over:
                return
            try:
                engine.run(until=arrived)
            except Failure as failure:
                failed.append(failure.taken())


class _Job:
    """The arguments of a map, checked; a context that ends it."""

    def __init__(
        self,
        f: Callable[..., Any],
        collections: Sequence[Iterable[object]],
        pool: AbstractWorkerPool | str | None,
        distributed: bool,
        batch_size: int | str,
        on_error: Callable[[Exception], object] | None,
        retry_delays: Iterable[float],
        retry_check: Callable[[BaseException], object] | None,
        on_exit: str,
        progress: bool,
        seed: int | None,
        checkpoint: str | PathLike[str] | None,
        key: Callable[[Any], object] | None,
        duration: float | None,
        ranks: int | None,
        *,
        copy: bool = False,
        in_order: bool = False,
    ) -> None:
        if not callable(f):
            raise TypeError(f"a function is needed to map, not {f!r}")
        if not collections:
            raise TypeError("a map needs at least one collection")
        for what, name in ((on_error, "on_error"), (retry_check, "retry_check")):
            if what is not None and not callable(what):
                raise TypeError(f"{name} is a function, not {what!r}")
        if on_exit not in ("retry", "raise"):
            raise ValueError(f'on_exit is "retry" or "raise", not {on_exit!r}')
        self._maps = Maps.here()
        self._node = self._maps.node
        self._node.admit()
        unit = _unit(batch_size)
        self._ranks = None if ranks is None else checked_ranks(ranks)
        if ranks is not None and unit not in (None, 1):
            raise ValueError(f"with ranks= each item is a task of its own: batch_size={unit} is 1")
        if ranks is not None and not distributed:
            raise ValueError("ranks= needs workers, and distributed=False uses none")
        self.source = Source(collections)
        self.work = Work(f, on_error, len(collections) > 1)
        self.retries = Retries(retry_delays, retry_check)
        self.distributed = distributed
        default = self._node.service(DefaultPool)
        given = named(pool)
        self.pool = given if given is not None else default.replaced
        tag = self.pool.tag if self.pool is not None else ""
        self.seed = _seed(seed, self._node.machine)
        self.keeping = keeping(
            checkpoint, key, f, self.source.size, self.seed, seeded=seed is not None
        )
        if self.keeping.seed is not None:
            self.seed = self.keeping.seed
        self._tells_seed = seed is None and progress
        self._drew = False  # an item has asked for random numbers
        self.terms = Terms(
            unit=unit,
            rerun=on_exit == "retry",
            copy=copy,
            in_order=in_order,
            seed=self.seed,
            patient=is_default(self.pool) or bool(tag),
            duration=fitting.checked(duration),
            tag=tag,
            early=checkpoint is not None,
        )
        self.bar = bar(self._node.machine, self.source.size) if progress else Bar()
        self._engine: Engine | None = None

    def engine(self, sink: Callable[[int, list[Any]], None]) -> Engine | None:
        """Make the engine; None if the map is to run here."""
        if not self.distributed:
            return None
        node = self._node
        if self.pool is None:
            node.workers()  # a word to one who is alone
            members: Callable[[], Sequence[int]] = lambda: sorted(node.members.living)
        else:
            members = self.pool._usable
        engine = self._engine = self._made(members, self.keeping.sink(self.bar.sink(sink)))
        if engine.begin():
            self.bar.watch(engine)
            self.keeping.watch(engine)
            return engine
        engine.end()
        self._engine = None
        death = node.members.deserted() if self.pool is None else self.pool._deserted()
        if death is not None:
            death.add_note(
                "No worker is left. addprocs() starts new ones; distributed=False runs here"
            )
            raise death
        return None

    def _made(
        self, members: Callable[[], Sequence[int]], sink: Callable[[int, list[Any]], None]
    ) -> Engine:
        parts = self._maps, self.work, self.source, self.terms, self.retries, members, sink
        if self._ranks is not None:
            return RankedEngine(*parts, self._ranks)
        known = None
        if isinstance(self.pool, CachingPool):
            known = self.pool._entry(self.work.f, self.work.on_error, self.work.several)
        return Engine(*parts, known)

    def here(self) -> Iterator[Any]:
        """Run the map in this process, one item after the other."""
        keep = self.keeping.sink(lambda start, results: self.bar.add(len(results)))
        while True:
            part = self.source.take(1)
            while self.keeping.has():
                yield from self.finished_from(None)
            if part is None:
                return
            item = tuple(c[0] for c in part.columns)
            while True:
                streams = Streams.of_item(self.seed, part.start)
                try:
                    with streams:
                        value = self._value(item)
                    self._drew = self._drew or streams.were_used
                    break
                except Exception as exc:
                    self.bar.failed()
                    error = _errors.decode_error(_errors.encode_error(exc, self._node.me))
                    name_part(error, part)
                    delay = self.retries.delay(part, error, self._node.me)
                    if delay is None:
                        try:
                            raise Failure(error) from None
                        finally:
                            del error  # its frames lead here
                    self._pause(delay)
            keep(part.start, [value])
            yield value

    def finished(self, index: int | None = None) -> tuple[int, list[Any]] | None:
        """Take the results of neighbouring items that a checkpoint had, and their first index."""
        run = self.keeping.take(index)
        if run is not None:
            self.bar.add(len(run[1]))
        return run

    def finished_from(self, index: int | None) -> list[Any]:
        """Take such results from an item on, or any."""
        run = self.finished(index)
        return [] if run is None else run[1]

    def _pause(self, seconds: float) -> None:
        try:
            self._node.wait(Slot(), seconds)
        except TimeoutError:
            pass

    def _value(self, item: tuple[object, ...]) -> Any:
        """Run one item in this process."""
        try:
            value = self.work.f(*item)
            if type(value) is CoroutineType:
                return self._node.service(Runners).awaited(value)
            return value
        except Exception as exc:
            if self.work.on_error is None:
                raise
            return self.work.handled(exc, item if self.work.several else item[0])

    def __enter__(self) -> _Job:
        self.source = self.keeping.begin(self.source)
        return self

    def __exit__(self, kind: object, error: Any, traceback: object) -> None:
        self.bar.close()
        if self._engine is not None:
            self._engine.end()
            self._drew = self._engine.drew
            self._engine = None
        self.keeping.end()
        if self._tells_seed and self._drew:
            output.say(f"hpcdist: the random numbers of this map: seed={self.seed}")
        if isinstance(error, Failure):
            raise error.taken() from None
        if error is not None:
            cut(error)


def _seed(seed: int | None, machine: Machine) -> int:
    return random_numbers.draw(machine) if seed is None else random_numbers.checked(seed)


def _unit(batch_size: object) -> int | None:
    if batch_size == "auto":
        return None
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__"):
        raise TypeError(f'batch_size is a number or "auto", not {batch_size!r}')
    size = int(batch_size.__index__())
    if size < 1:
        raise ValueError(f"batch_size is 1 or more, not {size}")
    return size
