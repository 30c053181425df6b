"""`pmap`, `imap`, `imap_unordered`: order, laziness, batches, errors, retries, deaths, arrivals."""

import itertools
import os
import pty
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpcdist
from hpcdist import (
    ExponentialBackOff,
    ProcessExitedException,
    RemoteException,
    WorkerPool,
    imap,
    imap_unordered,
    interrupt,
    myid,
    pmap,
    remotecall,
    remotecall_fetch,
    workers,
)
from hpcdist._items.timings import Timings
from hpcdist._maps.engine import Engine
from tests._leftovers import descriptors
from tests.helpers import eventually, kill9

pytestmark = pytest.mark.any_mpi

MAPS: list[Any] = [
    pmap,
    lambda *a, **k: list(imap(*a, **k)),
    lambda *a, **k: sorted(imap_unordered(*a, **k)),
]
each_map = pytest.mark.parametrize("run", MAPS, ids=["pmap", "imap", "imap_unordered"])


def square(x: Any) -> Any:
    return x * x


def nap(x: Any, seconds: float = 0.01) -> Any:
    time.sleep(seconds)
    return x


def log_to(path: str, line: Any) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


def logged(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


# --- results --------------------------------------------------------------------------------------


@each_map
def test_like_map(pids: list[int], run: Any) -> None:
    assert run(square, range(1000)) == [x * x for x in range(1000)]
    assert run(square, []) == []
    assert run(square, (3,)) == [9]
    assert run(square, iter([1, 2])) == [1, 4]
    assert run(str.upper, "abc") == ["A", "B", "C"]
    assert run(len, {"one": 1, "three": 2}) == [3, 5]


@each_map
def test_several_collections_end_with_the_shortest(pids: list[int], run: Any) -> None:
    assert run(pow, range(1, 5), [2, 2, 2, 2, 2]) == [1, 4, 9, 16]
    assert run(lambda a, b, c: a + b + c, itertools.count(), range(3), (1, 1, 1, 1)) == [1, 3, 5]


def test_arrays(pids: list[int]) -> None:
    assert pmap(float, np.arange(100.0)) == [float(k) for k in range(100)]
    rows = pmap(np.sum, np.arange(12).reshape(4, 3))
    assert rows == [3, 12, 21, 30]
    halves = pmap(lambda a: a / 2, [np.full(50_000, k) for k in range(8)])
    assert all((h == k / 2).all() for k, h in enumerate(halves))


def test_all_workers_take_part(pids: list[int]) -> None:
    assert set(pmap(lambda _: (time.sleep(0.02), myid())[1], range(30))) == set(pids)


def test_quick_items_with_large_results_are_never_sent_by_the_hundred(
    pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    send = Engine._send

    def noted(self: Engine, lane: Any, part: Any) -> bool:
        sizes.append(part.size)
        return send(self, lane, part)

    monkeypatch.setattr(Engine, "_send", noted)
    for _ in range(2):  # the second time it would be known how quick it is
        pmap(lambda i: bytes(100_000), range(400))
    assert max(sizes) <= 64, sizes


def test_a_function_that_has_become_slow_is_shared_out_anew(pids: list[int]) -> None:
    f = lambda seconds: (time.sleep(seconds), hpcdist.myid())[1]
    for _ in range(2):  # the second time it is known how quick it was
        hpcdist.pmap(f, [0.0] * 1000)
    assert set(hpcdist.pmap(f, [0.02] * 10 * len(pids))) == set(pids)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(0, 300),
    size=st.one_of(st.just("auto"), st.integers(1, 350)),
    lazy=st.booleans(),
    how=st.integers(0, 2),
    slow=st.sets(st.integers(0, 300), max_size=3),
)
def test_any_batch_size_gives_the_same(
    pids: list[int], n: int, size: Any, lazy: bool, how: int, slow: set[int]
) -> None:
    def f(x: int) -> int:
        if x in slow:
            time.sleep(0.01)
        return x + 1

    items = range(n)
    result = MAPS[how](f, iter(items) if lazy else items, batch_size=size)
    assert result == list(range(1, n + 1))


def test_a_batch_stays_together(pids: list[int]) -> None:
    where = pmap(lambda _: (time.sleep(0.005), myid())[1], range(24), batch_size=4)
    assert all(len(set(where[k : k + 4])) == 1 for k in range(0, 24, 4))
    assert len(set(where)) > 1


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_an_item(pids: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        pmap(square, [1], batch_size=size)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pmap(square),
        lambda: pmap(3, [1]),  # type: ignore[arg-type]
        lambda: pmap(square, [1], batch_size="large"),
        lambda: pmap(square, [1], batch_size=1.5),  # type: ignore[arg-type]
        lambda: pmap(square, [1], pool=[2]),  # type: ignore[arg-type]
        lambda: pmap(square, [1], on_error=3),  # type: ignore[arg-type]
        lambda: pmap(square, 5),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(pids: list[int], call: Any) -> None:
    with pytest.raises(TypeError):
        call()


def test_wrong_on_exit(pids: list[int]) -> None:
    with pytest.raises(ValueError, match="on_exit"):
        pmap(square, [1], on_exit="ignore")


@pytest.mark.parametrize("distributed", [True, False])
def test_coroutine_functions(pids: list[int], distributed: bool) -> None:
    async def double(x: int) -> int:
        import asyncio

        await asyncio.sleep(0.001)
        if x == 7:
            raise KeyError(x)
        return 2 * x

    run = partial(pmap, distributed=distributed)
    assert run(double, range(5)) == [0, 2, 4, 6, 8]
    assert run(lambda x: double(x), range(5), batch_size=5) == [0, 2, 4, 6, 8]
    assert run(double, range(6, 9), on_error=lambda e: -1) == [12, -1, 16]
    with pytest.raises(KeyError):
        run(double, range(10))


# --- laziness -------------------------------------------------------------------------------------


def counted(n: float, seen: list[int]) -> Iterator[int]:
    for k in itertools.count():
        if k >= n:
            return
        seen.append(k)
        yield k


def test_imap_consumes_lazily(pids: list[int]) -> None:
    seen: list[int] = []
    results = imap(square, counted(float("inf"), seen))
    assert seen == []
    assert next(results) == 0
    assert len(seen) <= 12
    assert [next(results) for _ in range(50)] == [k * k for k in range(1, 51)]
    assert len(seen) <= 2 * 51 + 12
    results.close()
    time.sleep(0.05)
    at_end = len(seen)
    assert len(seen) == at_end
    with pytest.raises(StopIteration):
        next(results)


def test_imap_bounds_what_it_looks_ahead(pids: list[int]) -> None:
    seen: list[int] = []
    results = imap(square, counted(100_000, seen))
    for k in range(20_000):
        assert next(results) == k * k
    assert len(seen) <= 20_000 + 3 * 512 + 1
    results.close()


@pytest.mark.parametrize("size", [1, "auto"])
def test_pmap_consumes_little_in_vain(size: Any, pids: list[int]) -> None:
    seen: list[int] = []
    with pytest.raises(ZeroDivisionError):
        pmap(lambda x: 1 // x, counted(1_000_000, seen), batch_size=size)
    assert len(seen) <= 100_000  # how much depends on when the first answer comes


def test_imap_yields_before_the_end(pids: list[int]) -> None:
    start = time.monotonic()
    results = imap(lambda x: nap(x, 0.05 if x < 3 else 4.0), range(6))
    assert next(results) == 0
    assert time.monotonic() - start < 3.5
    assert list(results) == list(range(1, 6))


def test_unordered_does_not_wait_for_the_slow(pids: list[int]) -> None:
    results = imap_unordered(lambda x: nap(x, 1.0 if x == 0 else 0.001), range(60))
    order = list(results)
    assert order[-1] == 0
    assert sorted(order) == list(range(60))


def test_a_collection_that_fails(pids: list[int]) -> None:
    def broken() -> Iterator[int]:
        yield from range(5)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        pmap(square, broken())
    results = imap(square, broken())
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(LookupError):
        next(results)


def test_an_abandoned_imap_leaves_the_workers_free(pids: list[int]) -> None:
    results = imap(nap, itertools.count())
    next(results)
    del results
    start = time.monotonic()
    assert remotecall_fetch(myid, pids[0]) == pids[0]
    assert time.monotonic() - start < 10
    assert pmap(square, range(10)) == [k * k for k in range(10)]


# --- balance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["auto", 1])
def test_a_slow_item_holds_up_nobody(pids: list[int], size: Any) -> None:
    order = list(
        imap_unordered(lambda x: nap(x, 3.0 if x == 0 else 0.01), range(100), batch_size=size)
    )
    assert order[-1] == 0
    assert sorted(order) == list(range(100))


def test_items_behind_a_slow_one_in_its_batch_are_handed_back(pids: list[int]) -> None:
    done_at = {}
    pmap(square, range(10))
    start = time.monotonic()
    for x in imap_unordered(lambda x: nap(x, 5.0) if x == 2000 else x, range(4000)):
        done_at[x] = time.monotonic() - start
    assert len(done_at) == 4000
    # Those before it in its batch are done too, but come with it.
    assert max(done_at[x] for x in range(2001, 4000)) < 4.5
    assert sum(t > 4.5 for t in done_at.values()) < 1000


def test_every_item_runs_once(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    delays = [random.choice([0, 0, 0.001, 0.03]) for _ in range(150)]

    def f(x: int) -> int:
        time.sleep(delays[x])
        log_to(path, x)
        return x

    assert pmap(f, range(150)) == list(range(150))
    assert Counter(logged(Path(path))) == {str(k): 1 for k in range(150)}


def test_a_worker_busy_since_before_its_first_map_does_not_hold_it_up(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    pids = fresh(2)
    busy = remotecall(lambda: gate.read_text(), pids[0])
    with open(gate, "w") as opened:  # once the worker reads it
        assert pmap(square, range(10), pool=WorkerPool(pids)) == [x * x for x in range(10)]
        assert not busy.done()
        opened.write("done")
    assert busy.fetch() == "done"


def test_busy_workers_do_not_hold_up_the_map(pids: list[int]) -> None:
    busy = remotecall(nap, pids[0], 0, seconds=30)
    assert pmap(nap, range(20)) == list(range(20))
    assert not busy.done()
    interrupt(pids[0])
    assert busy.exception() is not None


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["auto", 1, 7])
@pytest.mark.parametrize("run", MAPS[:2], ids=["pmap", "imap"])
def test_the_first_error(pids: list[int], run: Any, size: Any) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(lambda x: 1 // (x - 20), range(100), batch_size=size)
    assert isinstance(caught.value, RemoteException)
    assert caught.value.pid in pids
    assert "1 // (x - 20)" in str(caught.value) or "lambda" in str(caught.value)


def test_an_error_stops_new_items_and_waits_for_those_that_run(
    pids: list[int], tmp_path: Path
) -> None:
    path = str(tmp_path / "log")

    def f(x: int) -> None:
        log_to(path, f"begin{x}")
        time.sleep(0.05 if x == 0 else 0.3)
        log_to(path, f"end{x}")
        if x == 0:
            raise ValueError(x)

    with pytest.raises(ValueError, match="0"):
        pmap(f, range(100))
    lines = logged(Path(path))
    assert len(lines) <= 8
    assert sorted(x[5:] for x in lines if x[0] == "b") == sorted(
        x[3:] for x in lines if x[0] == "e"
    )


def test_later_items_of_a_batch_do_not_run(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")

    def f(x: int) -> None:
        log_to(path, x)
        if x == 3:
            raise ValueError

    with pytest.raises(ValueError):
        pmap(f, range(10), batch_size=10)
    assert logged(Path(path)) == ["0", "1", "2", "3"]


def test_imap_gives_what_came_before_the_error(pids: list[int]) -> None:
    results = imap(lambda x: 1 // (5 - x), range(10), batch_size=1)
    assert [next(results) for _ in range(5)] == [0, 0, 0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("size", ["auto", 1, 4, 100])
def test_on_error_runs_on_the_worker_with_the_original(pids: list[int], size: Any) -> None:
    def f(x: int) -> int:
        if x % 3 == 0:
            raise LookupError(x)
        return x

    told = lambda e: (type(e), e.args, myid())
    seen: list[Any] = pmap(f, range(20), batch_size=size, on_error=told)
    for x, got in enumerate(seen):
        if x % 3:
            assert got == x
        else:
            assert got[:2] == (LookupError, (x,))
            assert got[2] in pids


def test_on_error_of_a_coroutine_function_is_told_the_item(pids: list[int]) -> None:
    async def reciprocal(x: int) -> float:
        return 1 / x

    told = lambda e: (e.index, e.item)
    assert pmap(reciprocal, [1, 2, 0], on_error=told) == [1, 0.5, (2, 0)]


def test_on_error_when_every_item_fails(pids: list[int]) -> None:
    assert pmap(lambda x: 1 // 0, range(50), batch_size=10, on_error=lambda e: 0) == [0] * 50


def test_on_error_may_raise(pids: list[int]) -> None:
    def again(exc: Exception) -> None:
        raise KeyError("second") from exc

    with pytest.raises(KeyError, match="second"):
        pmap(lambda x: 1 // 0, range(5), on_error=again)


@pytest.mark.parametrize("size", ["auto", 1, 5])
def test_a_result_that_cannot_be_pickled(pids: list[int], size: Any) -> None:
    f = lambda x: threading.Lock() if x == 3 else x
    with pytest.raises(TypeError, match="pickle"):
        pmap(f, range(10), batch_size=size)
    got = pmap(f, range(10), batch_size=size, on_error=lambda e: type(e).__name__)
    assert got == [0, 1, 2, "TypeError", *range(4, 10)]


def test_an_item_or_function_that_cannot_be_pickled(pids: list[int]) -> None:
    lock = threading.Lock()
    with pytest.raises(TypeError):
        pmap(str, [1, lock])
    with pytest.raises(TypeError):
        pmap(lambda x: lock, [1, 2])
    assert pmap(square, range(5)) == [0, 1, 4, 9, 16]


class Unloadable:
    def __reduce__(self) -> Any:
        return int, ("x",)


def test_what_cannot_be_unpickled_there(pids: list[int]) -> None:
    broken = Unloadable()
    with pytest.raises(ValueError, match="invalid literal"):
        pmap(lambda x: broken, range(10))
    with pytest.raises(ValueError, match="invalid literal"):
        pmap(str, [broken])


def test_system_exit_ends_the_map_not_the_worker(pids: list[int]) -> None:
    with pytest.raises(RemoteException, match="SystemExit"):
        pmap(lambda x: sys.exit(3), range(4))
    assert workers() == pids


def test_interrupt_ends_the_map(pids: list[int]) -> None:
    threading.Timer(0.3, hpcdist.interrupt).start()
    with pytest.raises(RemoteException) as caught:
        pmap(lambda x: nap(x, 20), range(3))
    assert isinstance(caught.value.cause, KeyboardInterrupt)


# --- retries --------------------------------------------------------------------------------------


def flaky(path: str, times: int, x: int) -> int:
    log_to(path, x)
    if x == 5 and Counter(logged(Path(path)))["5"] <= times:
        raise ConnectionError(x)
    return x


@pytest.mark.parametrize("size", ["auto", 1, 8])
def test_a_failed_item_is_tried_again(pids: list[int], tmp_path: Path, size: Any) -> None:
    path = str(tmp_path / "log")
    f = lambda x: flaky(path, 3, x)
    assert pmap(f, range(10), batch_size=size, retry_delays=[0, 0, 0]) == list(range(10))
    assert Counter(logged(Path(path))) == {str(k): 4 if k == 5 else 1 for k in range(10)}


def test_attempts_come_to_an_end(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    with pytest.raises(ConnectionError):
        pmap(lambda x: flaky(path, 99, x), range(10), retry_delays=ExponentialBackOff(2, 0.01))
    assert Counter(logged(Path(path)))["5"] == 3


def test_delays_may_come_from_an_endless_iterator(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    delays = itertools.repeat(0.001)
    assert pmap(lambda x: flaky(path, 6, x), range(10), retry_delays=delays) == list(range(10))


def test_the_delay_is_kept(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    start = time.monotonic()
    pmap(lambda x: flaky(path, 1, x), range(10), retry_delays=[0.3])
    assert time.monotonic() - start > 0.29


def test_retry_check_decides(pids: list[int], tmp_path: Path) -> None:
    path, asked = str(tmp_path / "log"), []

    def check(exc: BaseException) -> bool:
        asked.append(exc)
        return not isinstance(exc, ConnectionError)

    with pytest.raises(ConnectionError):
        pmap(lambda x: flaky(path, 1, x), range(10), retry_delays=[0, 0], retry_check=check)
    assert len(asked) == 1
    assert Counter(logged(Path(path)))["5"] == 1


def test_on_error_spares_the_retries(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    got = pmap(lambda x: flaky(path, 9, x), range(10), retry_delays=[0], on_error=lambda e: -1)
    assert got == [0, 1, 2, 3, 4, -1, 6, 7, 8, 9]
    assert Counter(logged(Path(path)))["5"] == 1


def test_exponential_back_off() -> None:
    assert list(ExponentialBackOff()) == [0.05]
    assert list(ExponentialBackOff(0)) == []
    assert list(ExponentialBackOff(5, 1, 10, 3, 0)) == [1, 3, 9, 10, 10]
    delays = ExponentialBackOff(10)
    assert len(delays) == len(list(delays)) == 10
    one = list(delays)
    assert one != list(delays)
    assert max(one) <= 10
    for a, b in itertools.pairwise(one):
        assert b == 10 or 4.49 < b / a < 5.51
    with pytest.raises(ValueError):
        ExponentialBackOff(-1)


# --- deaths and arrivals --------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["auto", 1, 10])
def test_a_killed_worker_costs_nothing(fresh: Callable[..., list[int]], size: Any) -> None:
    pids = fresh(3)
    os_pid = remotecall_fetch(os.getpid, pids[0])
    threading.Timer(0.2, kill9, [os_pid]).start()
    assert pmap(nap, range(200), batch_size=size, pool=WorkerPool(pids)) == list(range(200))
    assert pmap(nap, range(20), pool=WorkerPool(pids)) == list(range(20))


def poison(path: str, x: int) -> int:
    log_to(path, x)
    if x == 17:
        os.kill(os.getpid(), 9)
    return x


@pytest.mark.parametrize("size", ["auto", 1, 10, 40])
def test_an_item_that_kills_runs_three_times(
    fresh: Callable[..., list[int]], tmp_path: Path, size: Any
) -> None:
    path = str(tmp_path / "log")
    pool = WorkerPool(fresh(4))
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        pmap(lambda x: poison(path, x), range(40), batch_size=size, pool=pool)
    assert Counter(logged(Path(path)))["17"] == 3
    assert len(pool) == 1


def test_an_item_that_kills_twice_is_done_at_the_third(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    path, pool = str(tmp_path / "log"), WorkerPool(fresh(3))

    def f(x: int) -> int:
        log_to(path, x)
        if x == 17 and Counter(logged(Path(path)))["17"] < 3:
            os.kill(os.getpid(), 9)
        time.sleep(0.001)
        return x

    assert pmap(f, range(40), batch_size=20, pool=pool) == list(range(40))


def test_only_the_running_item_is_charged(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    """Two items of a batch of slow ones kill once or twice: the others run once, or are re-sent."""
    path, pool = str(tmp_path / "log"), WorkerPool(fresh(3))

    def f(x: int) -> int:
        log_to(path, x)
        time.sleep(0.005)
        if x in (4, 6) and Counter(logged(Path(path)))[str(x)] == 1:
            os.kill(os.getpid(), 9)
        return x

    assert pmap(f, range(8), batch_size=8, pool=pool) == list(range(8))
    runs = Counter(logged(Path(path)))
    assert runs["4"] == runs["6"] == 2
    assert runs["7"] == 1


def test_on_exit_raise(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    path, pool = str(tmp_path / "log"), WorkerPool(fresh(2))
    with pytest.raises(ProcessExitedException):
        pmap(lambda x: poison(path, x), range(40), on_exit="raise", pool=pool)
    assert Counter(logged(Path(path)))["17"] == 1
    assert len(pool) == 1


def test_all_workers_gone(fresh: Callable[..., list[int]]) -> None:
    pool = WorkerPool(fresh(2))

    def doom(x: int) -> int:
        if x > 3:
            os.kill(os.getpid(), 9)
        return x

    with pytest.raises(ProcessExitedException):
        pmap(doom, range(10), pool=pool)
    assert len(pool) == 0


def test_workers_that_join_get_work(pids: list[int], fresh: Callable[..., list[int]]) -> None:
    new: list[int] = []
    thread = threading.Timer(0.1, lambda: new.extend(fresh(1)))
    thread.start()
    where: list[int] = []
    for pid in imap_unordered(lambda _: (time.sleep(0.01), myid())[1], itertools.count()):
        where.append(pid)
        if new and where.count(new[0]) > 3:
            break
        assert len(where) < 3000
    thread.join()


def test_a_worker_pushed_into_the_pool_gets_work(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    threading.Timer(0.1, pool.push, [pids[1]]).start()
    where = pmap(lambda _: (time.sleep(0.01), myid())[1], range(60), pool=pool)
    assert set(where) == set(pids[:2])


def test_a_removed_worker_loses_no_item(pids: list[int], fresh: Callable[..., list[int]]) -> None:
    new = fresh(1)
    threading.Timer(0.1, hpcdist.rmprocs, new).start()
    assert pmap(nap, range(100)) == list(range(100))
    eventually(lambda: workers() == pids)


# --- where it runs --------------------------------------------------------------------------------


def test_a_pool_says_where(pids: list[int]) -> None:
    assert set(pmap(lambda _: myid(), range(20), pool=WorkerPool(pids[1:2]))) == {pids[1]}
    where = pmap(lambda _: (time.sleep(0.01), myid())[1], range(20), pool=WorkerPool([1, pids[0]]))
    assert set(where) == {1, pids[0]}


def test_a_worker_that_is_lent_out_is_spared(pids: list[int]) -> None:
    pool = WorkerPool(pids)
    pool.take()
    assert set(pmap(lambda _: (time.sleep(0.01), myid())[1], range(20), pool=pool)) == set(pids[1:])


@each_map
def test_distributed_false_runs_here(pids: list[int], run: Any) -> None:
    seen: list[int] = []
    assert run(lambda x: seen.append(x) or myid(), range(3), distributed=False) == [1, 1, 1]
    assert seen == [0, 1, 2]
    got = run(lambda x: 1 // x, [1, 0, 1], distributed=False, on_error=lambda e: 2, batch_size=3)
    assert sorted(got) == [1, 1, 2]
    with pytest.raises(ZeroDivisionError) as caught:
        run(lambda x: 1 // x, [1, 0], distributed=False)
    assert isinstance(caught.value, RemoteException)
    assert caught.value.pid == 1


def test_retries_here(pids: list[int], tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    f = lambda x: flaky(path, 2, x)
    assert pmap(f, range(10), distributed=False, retry_delays=[0, 0]) == list(range(10))


def test_an_empty_pool_runs_here(pids: list[int]) -> None:
    assert pmap(lambda _: myid(), range(3), pool=WorkerPool([])) == [1, 1, 1]
    assert pmap(lambda _: myid(), range(3), pool=WorkerPool([1])) == [1, 1, 1]


def test_alone_it_runs_here(script: Callable[..., Any]) -> None:
    done = script(
        "from hpcdist import *\n"
        "print(pmap(lambda x: x + myid(), range(3)), list(imap(abs, [-1])))\n"
        "try:\n    pmap(lambda x: 1 // x, [0])\n"
        "except RemoteException as e:\n    print(e.pid, isinstance(e, ZeroDivisionError))\n"
    )
    assert done.rc == 0, done.err
    assert done.out.splitlines() == ["[1, 2, 3] [1]", "1 True"]


@pytest.mark.parametrize("size", ["auto", 1, 4])
def test_nested_maps(pids: list[int], size: Any) -> None:
    inner = lambda i: pmap(lambda j: (i, j, myid()), range(6), batch_size=size)
    got = pmap(inner, range(8), batch_size=size)
    assert [[(i, j) for i, j, _ in row] for row in got] == [
        [(i, j) for j in range(6)] for i in range(8)
    ]


def test_nested_maps_on_one_pool(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    outer = lambda i: sum(pmap(lambda j: i * j, range(4), pool=pool))
    assert pmap(outer, range(4), pool=pool) == [0, 6, 12, 18]


def test_a_map_from_a_worker_uses_all(pids: list[int]) -> None:
    def there() -> set[int]:
        return set(pmap(lambda _: (time.sleep(0.01), myid())[1], range(30)))

    assert remotecall_fetch(there, pids[0]) == set(pids)
    assert remotecall_fetch(lambda: list(imap(square, range(50))), pids[1]) == [
        k * k for k in range(50)
    ]


def test_maps_side_by_side(pids: list[int]) -> None:
    got: dict[int, list[int]] = {}

    def one(k: int) -> None:
        got[k] = pmap(lambda x: (time.sleep(0.001), x + k)[1], range(50))

    threads = [threading.Thread(target=one, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {k: list(range(k, 50 + k)) for k in range(4)}


def test_several_turns(fresh: Callable[..., list[int]]) -> None:
    pool = WorkerPool(fresh(2, concurrency=4))
    base = np.ones(200_000)
    assert pmap(lambda x: nap(x) + int(base[0]), range(60), pool=pool) == list(range(1, 61))


def test_the_function_is_sent_once_to_each_worker(pids: list[int]) -> None:
    class Counted:
        pickled = 0

        def __reduce__(self) -> Any:
            Counted.pickled += 1
            return int, (1,)

    one = Counted()
    assert pmap(lambda x: (time.sleep(0.002), x + one)[1], range(60)) == list(range(1, 61))
    assert Counted.pickled == 1


def test_references_travel(pids: list[int]) -> None:
    channel = hpcdist.RemoteChannel(100)
    pmap(lambda x: channel.put(x), range(20))
    channel.close()
    assert sorted(channel) == list(range(20))
    futures = pmap(lambda x: remotecall(square, pids[0], x), range(4))
    assert [f.fetch() for f in futures] == [0, 1, 4, 9]
    with hpcdist.RemoteChannel(1) as rc:
        rc.put(5)
        assert pmap(lambda c: c.fetch(), [rc, rc]) == [5, 5]


def test_workers_forget_the_function(pids: list[int]) -> None:
    def kept() -> int:
        from hpcdist._maps.kept_functions import KeptFunctions
        from hpcdist._maps.map_worker import Batches

        return len(KeptFunctions.here()._kept) + len(Batches.here()._active)

    before = [remotecall_fetch(kept, pid) for pid in pids]
    pmap(nap, range(20))
    with pytest.raises(ZeroDivisionError):
        pmap(lambda x: 1 // 0, range(20))
    results = imap(square, itertools.count())
    next(results)
    results.close()
    eventually(lambda: [remotecall_fetch(kept, pid) for pid in pids] == before)


def test_boards_are_opened_once_and_closed_with_their_process(
    fresh: Callable[..., list[int]],
) -> None:
    """The board of process 1's maps, and the one of a map that is another's and runs here."""

    def boards() -> int:
        return descriptors()["/memfd:hpcdist-board (deleted)"]

    assert pmap(square, range(4), pool=WorkerPool([1, *fresh(1)])) == [0, 1, 4, 9]
    assert boards() == 1
    (pid,) = fresh(1)
    there = lambda: pmap(square, range(4), pool=WorkerPool([1]))
    assert remotecall_fetch(there, pid) == [0, 1, 4, 9]
    assert boards() == 2
    hpcdist.rmprocs(pid)
    eventually(lambda: boards() == 1)


def test_changes_of_main_after_a_map_are_told(script: Callable[..., Any]) -> None:
    done = script(
        "from hpcdist import *\n"
        "def main():\n"
        "    global x\n"
        "    addprocs(1)\n"
        "    for x in (1, 2, 1):\n"
        "        f = (lambda: x) if x == 1 else (lambda _: x)\n"
        "        print(remotecall_fetch(f, 2) if x == 1 else pmap(f, [0])[0])\n"
        "if __name__ == '__main__': main()\n"
    )
    assert done.rc == 0, done.err
    assert done.out.split() == ["1", "2", "1"]


def test_ctrl_c_ends_the_map_and_harms_nothing(script: Callable[..., Any]) -> None:
    done = script(
        "import os, signal, threading, time\n"
        "from hpcdist import *\n"
        "addprocs(2)\n"
        "threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "start = time.monotonic()\n"
        "try:\n    pmap(lambda x: time.sleep(0.05), range(1000))\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
        "print(pmap(abs, range(-3, 3)), time.monotonic() - start < 5)\n"
    )
    assert done.rc == 0, done.err
    assert done.out.splitlines() == ["interrupted", "[3, 2, 1, 0, 1, 2] True"]


@pytest.mark.each_mpi
def test_in_an_mpi_launch(script: Callable[..., Any]) -> None:
    done = script(
        "from hpcdist import *\n"
        "import hpcdist; hpcdist.init()\n"
        "import time\n"
        "print(sorted(set(pmap(lambda x: (time.sleep(0.02), myid())[1], range(20)))))\n"
        "print(default_worker_pool().workers(), remote(myid)() in (2, 3))\n"
        "print(remotecall_fetch(lambda: sum(pmap(abs, range(50))), 2))\n",
        ranks=3,
    )
    assert done.rc == 0, done.err
    assert done.out.splitlines() == ["[2, 3]", "[2, 3] True", "1225"]


# --- the bar --------------------------------------------------------------------------------------


DRIVER = """
from hpcdist import *
if __name__ == "__main__":
    addprocs(2)
    import time
    f = lambda x: (time.sleep(0.01), 1 // (x % 10))
    assert len(pmap(f, range(100), progress=True, on_error=lambda e: 0)) == 100
    assert len(list(imap(abs, iter(range(50)), progress=True))) == 50
    try:
        pmap(lambda x: 1 // x, [1, 0], progress=True)
    except ZeroDivisionError:
        print("failed as it should")
"""


def test_the_bar_is_quiet_without_a_terminal(script: Callable[..., Any]) -> None:
    done = script(DRIVER)
    assert (done.rc, done.err) == (0, "")


def test_the_bar_on_a_terminal(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    main, terminal = pty.openpty()
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, str(driver)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "120"},
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            data = os.read(main, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not data:
            break
        shown += data
    os.close(main)
    assert process.wait(30) == 0, shown
    text = shown.decode(errors="replace")
    assert "100/100" in text
    assert "item/s" in text
    assert "workers=2" in text
    assert "failures=0" in text
    assert "failures=1" in text


def test_the_bar_names_what_is_missing(pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ImportError, match="pip install"):
        pmap(square, [1], progress=True)


def test_the_next_map_knows_what_small_items_take(pids: list[int]) -> None:
    assert pmap(abs, [-1, 2]) == [1, 2]
    assert Timings.here().learned(abs) is not None
    assert pmap(square, range(1000, 1020), seed=1 << 127) == [k * k for k in range(1000, 1020)]
    assert Timings.here().learned(square) is not None


@pytest.mark.parametrize("run", [imap, imap_unordered])
def test_the_results_are_a_generator(pids: list[int], run: Any) -> None:
    results = run(abs, itertools.repeat(-1))
    assert isinstance(results, Generator)
    assert (next(results), results.send(None)) == (1, 1)
    with pytest.raises(KeyError):
        results.throw(KeyError("enough"))
    assert list(results) == []
