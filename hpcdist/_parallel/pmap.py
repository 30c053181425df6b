"""`pmap` and its kin: a function over collections, on all workers."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._parallel import lending, pools
from hpcdist._parallel.batches import Work
from hpcdist._parallel.engine import Engine, Failure, poke_all
from hpcdist._parallel.lanes import Delays
from hpcdist._parallel.pools import AbstractWorkerPool, CachingPool
from hpcdist._parallel.sources import Source
from hpcdist._runtime.node import node

lending.watchers.append(poke_all)


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


def pmap(
    f: Callable[..., Any],
    /,
    *collections: Iterable[Any],
    pool: AbstractWorkerPool | None = None,
    distributed: bool = True,
    batch_size: int | str = "auto",
    on_error: Callable[[Exception], Any] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[BaseException], Any] | None = None,
    on_exit: str = "retry",
    progress: bool = False,
) -> list[Any]:
    """Call a function on every item, on the workers, and return the results in order.

    Args:
        f: The function. It is sent once to each worker, with the data it has captured.
        collections: Its arguments, as for `map`: with several, the shortest ends it.
        pool: The workers to use; by default all, also those that join meanwhile.
        distributed: False: run here.
        batch_size: How many items travel together: a number, or "auto" for 5 ms of work.
        on_error: Called on the worker with the exception of an item; returns its result.
        retry_delays: Try a failed item again after these seconds, `ExponentialBackOff(3)` say.
        retry_check: Called here with the exception; tells whether to try again at all.
        on_exit: What becomes of the item a worker was running when it died: "retry" runs it
            elsewhere, at most twice; "raise" ends the map.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        RemoteException: The function failed. No new items were started, those running ended.
        ProcessExitedException: An item has ended its worker too often, or no worker is left.

    Example:
        >>> import hpcdist
        >>> hpcdist.pmap(pow, range(5), [2, 2, 2, 3])
        [0, 1, 4, 27]
    """
    job = _Job(
        f, collections, pool, distributed, batch_size, on_error, retry_delays, retry_check,
        on_exit, progress,
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
        job.bar.watch(engine)
        engine.run()
    return out


def imap(
    f: Callable[..., Any],
    /,
    *collections: Iterable[Any],
    pool: AbstractWorkerPool | None = None,
    distributed: bool = True,
    batch_size: int | str = "auto",
    on_error: Callable[[Exception], Any] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[BaseException], Any] | None = None,
    on_exit: str = "retry",
    progress: bool = False,
) -> Iterator[Any]:
    """Like `pmap`, but yield the results one by one, in order.

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
        on_exit, progress, copy=True, in_order=True,
    )  # fmt: skip
    return _in_order(job)


def _in_order(job: _Job) -> Iterator[Any]:
    ready: dict[int, list[Any]] = {}
    with job:
        engine = job.engine(ready.__setitem__)
        if engine is None:
            yield from job.here()
            return
        job.bar.watch(engine)
        given = 0
        engine.look_ahead = lambda: given
        arrived = lambda: given in ready
        failed: Failure | None = None
        while True:
            while (results := ready.pop(given, None)) is not None:
                for value in results:
                    given += 1
                    yield value
            if failed is not None:
                raise failed
            if engine.over:
                return
            try:
                engine.run(until=arrived)
            except Failure as failure:
                failed = failure


def imap_unordered(
    f: Callable[..., Any],
    /,
    *collections: Iterable[Any],
    pool: AbstractWorkerPool | None = None,
    distributed: bool = True,
    batch_size: int | str = "auto",
    on_error: Callable[[Exception], Any] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[BaseException], Any] | None = None,
    on_exit: str = "retry",
    progress: bool = False,
) -> Iterator[Any]:
    """Like `imap`, but yield each result as soon as it is there.

    Example:
        >>> import hpcdist
        >>> sorted(hpcdist.imap_unordered(abs, [-3, 1, -2]))
        [1, 2, 3]
    """
    job = _Job(
        f, collections, pool, distributed, batch_size, on_error, retry_delays, retry_check,
        on_exit, progress, copy=True,
    )  # fmt: skip
    return _as_they_come(job)


def _as_they_come(job: _Job) -> Iterator[Any]:
    ready: deque[Any] = deque()
    with job:
        engine = job.engine(lambda start, results: ready.extend(results))
        if engine is None:
            yield from job.here()
            return
        job.bar.watch(engine)
        given = 0
        engine.look_ahead = lambda: given
        failed: Failure | None = None
        while True:
            while ready:
                given += 1
                yield ready.popleft()
            if failed is not None:
                raise failed
            if engine.over:
                return
            try:
                engine.run(until=lambda: bool(ready))
            except Failure as failure:
                failed = failure


class _Job:
    """The arguments of a map, checked; a context that ends it."""

    def __init__(
        self,
        f: Callable[..., Any],
        collections: Sequence[Iterable[Any]],
        pool: AbstractWorkerPool | None,
        distributed: bool,
        batch_size: int | str,
        on_error: Callable[[Exception], Any] | None,
        retry_delays: Iterable[float],
        retry_check: Callable[[BaseException], Any] | None,
        on_exit: str,
        progress: bool,
        *,
        copy: bool = False,
        in_order: bool = False,
    ) -> None:
        if not callable(f):
            raise TypeError(f"a function is needed to map, not {f!r}")
        if not collections:
            raise TypeError("a map needs at least one collection")
        if pool is not None and not isinstance(pool, AbstractWorkerPool):
            raise TypeError(f"pool is a WorkerPool or the like, not {pool!r}")
        for what, name in ((on_error, "on_error"), (retry_check, "retry_check")):
            if what is not None and not callable(what):
                raise TypeError(f"{name} is a function, not {what!r}")
        if on_exit not in ("retry", "raise"):
            raise ValueError(f'on_exit is "retry" or "raise", not {on_exit!r}')
        if node.refusal:
            raise RuntimeError(node.refusal)
        self.unit = _unit(batch_size)
        self.source = Source(collections)
        self.work = Work(f, on_error, len(collections) > 1)
        self.delays = None if _is_empty(retry_delays) else Delays(retry_delays)
        self.check = retry_check
        self.rerun = on_exit == "retry"
        self.distributed = distributed
        self.pool = pool if pool is not None else pools.replaced()
        self.copy = copy
        self.in_order = in_order
        self.bar = _bar(self.source.size) if progress else Bar()
        self._engine: Engine | None = None

    def engine(self, sink: Callable[[int, list[Any]], None]) -> Engine | None:
        """Make the engine; None if the map is to run here."""
        if not self.distributed:
            return None
        if self.pool is None:
            members: Callable[[], Sequence[int]] = lambda: sorted(node.members.living)
        else:
            members = self.pool._usable
        token, told = None, None
        if isinstance(self.pool, CachingPool):
            token, told = self.pool._entry(self.work.f, self.work.on_error, self.work.several)
        engine = Engine(
            self.work,
            self.source,
            members,
            self.bar.sink(sink),
            unit=self.unit,
            delays=self.delays,
            check=self.check,
            rerun=self.rerun,
            copy=self.copy,
            in_order=self.in_order,
            token=token,
            told=told,
        )
        self._engine = engine
        if engine.begin():
            return engine
        engine.end()
        self._engine = None
        return None

    def here(self) -> Iterator[Any]:
        """Run the map in this process, one item after the other."""
        tries = 0
        while (part := self.source.take(1)) is not None:
            item = tuple(c[0] for c in part.columns)
            tries = 0
            while True:
                try:
                    f = self.work.f if self.work.on_error is None else self.work.guarded
                    value = f(*item)
                    break
                except Exception as exc:
                    tries += 1
                    self.bar.failed()
                    error = _errors.decode_error(_errors.encode_error(exc, node.me))
                    delay = self.delays.get(tries) if self.delays is not None else None
                    if delay is None or (self.check is not None and not self.check(error)):
                        raise Failure(error) from None
                    time.sleep(delay)
            self.bar.add(1)
            yield value

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._engine is not None:
            self._engine.end()
        self.bar.close()
        if isinstance(error, Failure):
            raise error.error from None


def _unit(batch_size: Any) -> int | None:
    if batch_size == "auto":
        return None
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__"):
        raise TypeError(f'batch_size is a number or "auto", not {batch_size!r}')
    size = int(batch_size.__index__())
    if size < 1:
        raise ValueError(f"batch_size is 1 or more, not {size}")
    return size


def _is_empty(delays: Any) -> bool:
    return hasattr(delays, "__len__") and len(delays) == 0


# The bar


class Bar:
    """No bar."""

    def watch(self, engine: Engine) -> None:
        """Know the engine whose failures and workers are shown."""

    def sink(self, sink: Callable[[int, list[Any]], None]) -> Callable[[int, list[Any]], None]:
        """Count what goes into a sink."""
        return sink

    def add(self, count: int) -> None:
        """Count items that are done."""

    def failed(self) -> None:
        """Count an item that failed."""

    def close(self) -> None:
        """Leave the bar as it is."""


class _Tqdm(Bar):
    """A bar of tqdm's."""

    def __init__(self, kind: Any, total: int | None) -> None:
        self._bar = kind(total=total, file=sys.stderr, unit="item", **_width())
        self._engine: Engine | None = None
        self._failures = 0

    def watch(self, engine: Engine) -> None:
        self._engine = engine

    def sink(self, sink: Callable[[int, list[Any]], None]) -> Callable[[int, list[Any]], None]:
        def counted(start: int, results: list[Any]) -> None:
            sink(start, results)
            self.add(len(results))

        return counted

    def add(self, count: int) -> None:
        self._show()
        self._bar.update(count)

    def failed(self) -> None:
        self._failures += 1

    def _show(self) -> None:
        engine = self._engine
        failures = self._failures if engine is None else engine.failures
        workers = 1 if engine is None else engine.workers
        self._bar.set_postfix(failures=failures, workers=workers, refresh=False)

    def close(self) -> None:
        self._show()
        self._bar.close()


def _width() -> dict[str, Any]:
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 100, "nrows": 24}


def _bar(total: int | None) -> Bar:
    if sys.stderr is None or not sys.stderr.isatty():
        return Bar()
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "progress=True shows its bar by tqdm, which is not installed: "
            "pip install 'hpcdist[progress]'"
        ) from None

    class Quiet(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that would outlive the map

    return _Tqdm(Quiet, total)
