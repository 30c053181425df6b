"""Worker pools: lending, calls on a pool, CachingPool, the default pool, pools on workers."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    AbstractWorkerPool,
    CachingPool,
    ProcessExitedException,
    RemoteException,
    WorkerPool,
    clear,
    default_worker_pool,
    myid,
    remote,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    workers,
)
from tests.helpers import eventually, kill9


def nap(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def fail() -> None:
    raise ValueError("no")


# --- lending --------------------------------------------------------------------------------------


def test_workers_are_lent_in_the_order_given(pids: list[int]) -> None:
    order = [pids[2], pids[1], pids[0]]
    pool = WorkerPool(order)
    assert [pool.take() for _ in order] == order
    pool.put(pids[1])
    pool.put(pids[2])
    assert [pool.take(), pool.take()] == [pids[1], pids[2]]


def test_a_pool_without_pids_has_all_workers(pids: list[int]) -> None:
    assert WorkerPool().workers() == pids
    assert len(WorkerPool()) == len(pids)
    assert len(WorkerPool([])) == 0


def test_length_and_members_count_the_busy(pids: list[int]) -> None:
    pool = WorkerPool(pids)
    pool.take()
    assert len(pool) == 3
    assert pool.workers() == pids
    assert pool.isready()
    pool.take(), pool.take()
    assert not pool.isready()


def test_take_waits_until_its_deadline(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.take()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        pool.take(timeout=0.1)
    assert 0.09 < time.monotonic() - start < 2
    pool.put(pids[0])
    assert pool.take(timeout=0.1) == pids[0]


def test_waiting_is_first_come_first_served(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.take()
    came: list[int] = []

    def taker(k: int) -> None:
        pool.take()
        came.append(k)
        pool.put(pids[0])

    threads = []
    for k in range(4):
        threads.append(threading.Thread(target=taker, args=(k,)))
        threads[-1].start()
        time.sleep(0.05)
    pool.put(pids[0])
    for thread in threads:
        thread.join()
    assert came == [0, 1, 2, 3]


def test_wait_takes_nothing(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.wait()
    pool.take()
    with pytest.raises(TimeoutError):
        pool.wait(timeout=0.05)
    threading.Timer(0.1, pool.put, [pids[0]]).start()
    pool.wait(timeout=5)
    assert pool.isready()


def test_push_adds_a_free_worker(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.push(pids[1])
    pool.push(pids[1])
    assert pool.workers() == pids[:2]
    assert [pool.take(), pool.take()] == pids[:2]
    assert not pool.isready()


def test_put_of_a_stranger_is_ignored(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.put(pids[1])
    assert pool.workers() == pids[:1]
    pool.put(pids[0])
    pool.take()
    assert not pool.isready()


def test_pids_that_do_not_exist_are_dropped_at_take(pids: list[int]) -> None:
    pool = WorkerPool([99_999, pids[0]])
    assert len(pool) == 2
    assert pool.take() == pids[0]
    assert len(pool) == 1


def test_no_member_left(pids: list[int]) -> None:
    for pool in (WorkerPool([]), WorkerPool([99_999])):
        with pytest.raises(RuntimeError, match="No active worker available in pool"):
            pool.take()
        with pytest.raises(RuntimeError, match="No active worker available in pool"):
            remotecall_fetch(myid, pool)


def test_the_functions_work_on_pools(pids: list[int]) -> None:
    pool = WorkerPool(pids)
    assert hpcdist.isready(pool)
    pid = hpcdist.take(pool)
    hpcdist.put(pool, pid)
    assert hpcdist.wait(pool) is pool


# --- calls on a pool ------------------------------------------------------------------------------


def test_calls_go_round_the_pool(pids: list[int]) -> None:
    pool = WorkerPool(pids)
    assert [remotecall_fetch(myid, pool) for _ in range(6)] == pids * 2
    assert remotecall_wait(pow, pool, 2, 5).fetch() == 32
    assert remotecall_fetch(int, pool, "ff", base=16) == 255
    assert hpcdist.spawnat(pool, myid).fetch() in pids
    assert hpcdist.fetchfrom(pool, myid) in pids


def test_a_call_holds_its_worker_until_it_is_done(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    future = remotecall(nap, pool, 0.3, 7)
    assert not pool.isready()
    assert pool.take(timeout=5) == pids[0]
    assert future.ready
    assert future.fetch() == 7


def test_a_call_whose_future_is_dropped_holds_its_worker_too(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    gate = hpcdist.RemoteChannel(1)
    remotecall(hpcdist.take, pool, gate)  # it ends when we say so
    gc.collect()
    assert not pool.isready()
    gate.put("open")
    eventually(pool.isready)


def test_a_failed_call_gives_its_worker_back(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    with pytest.raises(ValueError, match="no"):
        remotecall_fetch(fail, pool)
    assert pool.isready()
    future = remotecall(fail, pool)
    eventually(pool.isready)
    with pytest.raises(RemoteException):
        future.fetch()


def test_arguments_that_cannot_be_pickled_give_the_worker_back(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    for how in (remotecall, remotecall_fetch, remote_do):
        with pytest.raises(TypeError):
            how(print, pool, threading.Lock())
        assert pool.isready()


def test_remote_do_gives_its_worker_back_at_once(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    remote_do(nap, pool, 0.2)
    assert pool.isready()


def test_many_calls_are_spread_over_few_workers(pids: list[int]) -> None:
    pool = WorkerPool(pids[:2])
    start = time.monotonic()
    futures = [remotecall(nap, pool, 0.05, k) for k in range(10)]
    assert [f.fetch() for f in futures] == list(range(10))
    assert time.monotonic() - start > 0.2


def test_remote_makes_a_function(pids: list[int]) -> None:
    assert remote(max)(3, 9) == 9
    where = remote(myid, WorkerPool(pids[1:2]))
    assert [where(), where()] == [pids[1]] * 2
    assert remote(int)("11", base=2) == 3
    with pytest.raises(TypeError):
        remote(3)


def test_a_pool_of_ones_own(pids: list[int]) -> None:
    class First(AbstractWorkerPool):
        def __init__(self) -> None:
            self.log: list[Any] = []

        def take(self, timeout: float | None = None) -> int:
            self.log.append("take")
            return pids[0]

        def put(self, pid: int) -> None:
            self.log.append(pid)

        def workers(self) -> list[int]:
            return pids[:1]

    pool = First()
    assert remotecall_fetch(myid, pool) == pids[0]
    assert pool.log == ["take", pids[0]]
    assert remotecall(myid, pool).fetch() == pids[0]
    eventually(lambda: pool.log == ["take", pids[0]] * 2)
    assert hpcdist.pmap(lambda i: myid(), range(4), pool=pool) == [pids[0]] * 4


# --- pools on other processes ---------------------------------------------------------------------


def test_a_pool_is_one_and_the_same_everywhere(pids: list[int]) -> None:
    pool = WorkerPool(pids)
    there = remotecall_fetch(lambda p: (p.workers(), len(p), p.isready(), p), pids[1], pool)
    assert there == (pids, 3, True, pool)
    assert there[3] is pool
    assert remotecall_fetch(lambda p: p.take(), pids[2], pool) == pids[0]
    assert pool.take() == pids[1]
    remotecall_fetch(lambda p, pid: [p.put(pid), p.push(1)], pids[0], pool, pids[0])
    assert pool.workers() == [1, *pids]
    assert [pool.take(), pool.take(), pool.take()] == [pids[2], pids[0], 1]


def test_calls_on_a_pool_from_a_worker(pids: list[int]) -> None:
    pool = WorkerPool(pids)

    def several(p: WorkerPool) -> tuple[list[int], int]:
        futures = [remotecall(myid, p) for _ in range(6)]
        return [f.fetch() for f in futures], remotecall_fetch(lambda: 5, p)

    seen, five = remotecall_fetch(several, pids[0], pool)
    assert set(seen) <= set(pids)
    assert len(seen) == 6
    assert five == 5
    eventually(lambda: len([pool.take(timeout=1) for _ in pids]) == 3)


def test_a_take_from_a_worker_waits_its_turn(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.take()
    future = remotecall(lambda p: p.take(), pids[1], pool)
    with pytest.raises(TimeoutError):
        future.fetch(timeout=0.1)
    pool.put(pids[0])
    assert future.fetch(timeout=5) == pids[0]
    assert not pool.isready()


def test_a_blocked_take_holds_up_neither_worker_nor_owner(pids: list[int]) -> None:
    pool = remotecall_fetch(lambda: WorkerPool([myid()]), pids[0])
    assert pool.take() == pids[0]
    waiting = [remotecall(lambda p: p.take(), pid, pool) for pid in pids]
    for pid in pids:
        assert remotecall_fetch(myid, pid) == pid
    for k in range(len(waiting)):
        pool.put(pids[0])
        eventually(lambda k=k: sum(f.ready for f in waiting) == k + 1)
    assert [f.fetch() for f in waiting] == pids[:1] * 3


def test_a_busy_owner_serves_its_pool(pids: list[int]) -> None:
    pool = remotecall_fetch(lambda: WorkerPool([1, myid()]), pids[0])
    busy = remotecall(nap, pids[0], 5.0)
    assert pool.take() == 1
    assert not busy.done()
    busy.wait()


def test_timeouts_and_errors_reach_a_worker_as_themselves(pids: list[int]) -> None:
    def tried(p: WorkerPool, timeout: float | None) -> str:
        try:
            p.take(timeout=timeout)
        except Exception as exc:
            return type(exc).__name__
        return "taken"

    pool = WorkerPool(pids[:1])
    pool.take()
    assert remotecall_fetch(tried, pids[1], pool, 0.1) == "TimeoutError"
    pool.put(pids[0])
    assert pool.isready()
    assert remotecall_fetch(tried, pids[1], WorkerPool([]), None) == "RuntimeError"


def test_an_interrupted_take_loses_no_worker(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    pool.take()
    future = remotecall(lambda p: p.take(), pids[1], pool)
    time.sleep(0.1)
    hpcdist.interrupt(pids[1])
    with pytest.raises(RemoteException):
        future.fetch(timeout=5)
    pool.put(pids[0])
    assert pool.take(timeout=5) == pids[0]


# --- deaths and arrivals --------------------------------------------------------------------------


def test_dead_workers_leave(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(2)
    pool = WorkerPool(pids)
    kill9(remotecall_fetch(os.getpid, pids[0]))
    eventually(lambda: pool.workers() == pids[1:])
    assert [remotecall_fetch(myid, pool) for _ in range(2)] == pids[1:] * 2


def test_a_death_during_a_call(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(1)
    pool = WorkerPool(pids)
    os_pid = remotecall_fetch(os.getpid, pids[0])
    future = remotecall(nap, pool, 30)
    caught: list[BaseException] = []

    def waits() -> None:
        try:
            pool.take()
        except RuntimeError as exc:
            caught.append(exc)

    thread = threading.Thread(target=waits)
    thread.start()
    kill9(os_pid)
    with pytest.raises(ProcessExitedException):
        future.fetch()
    thread.join(5)
    assert "No active worker" in str(caught[0])
    assert len(pool) == 0


def test_what_a_dead_process_had_taken_comes_back(
    pids: list[int], fresh: Callable[..., list[int]]
) -> None:
    (borrower,) = fresh(1)
    pool = WorkerPool(pids[:1])
    os_pid = remotecall_fetch(os.getpid, borrower)
    assert remotecall_fetch(lambda p: p.take(), borrower, pool) == pids[0]
    waiting = remotecall(lambda p: p.take(), borrower, pool)
    time.sleep(0.1)
    kill9(os_pid)
    assert pool.take(timeout=10) == pids[0]
    with pytest.raises(ProcessExitedException):
        waiting.fetch()


def test_the_owner_dies(fresh: Callable[..., list[int]]) -> None:
    owner, other = fresh(2)
    pool = remotecall_fetch(lambda: WorkerPool([]), owner)
    pool.push(other)
    kill9(remotecall_fetch(os.getpid, owner))
    with pytest.raises(ProcessExitedException):
        pool.take(), pool.take()


# --- the default pool -----------------------------------------------------------------------------


@pytest.fixture
def default() -> Iterator[AbstractWorkerPool]:
    pool = default_worker_pool()
    yield pool
    default_worker_pool(pool)


def test_the_default_pool_follows_the_cluster(
    pids: list[int], default: AbstractWorkerPool, fresh: Callable[..., list[int]]
) -> None:
    assert default.workers() == workers()
    new = fresh(1)
    assert default.workers() == [*pids, *new]
    taken = [default.take() for _ in range(4)]
    assert sorted(taken) == [*pids, *new]
    for pid in taken:
        default.put(pid)
    hpcdist.rmprocs(new)
    assert default.workers() == pids


def test_the_default_pool_on_workers(pids: list[int], default: AbstractWorkerPool) -> None:
    assert remotecall_fetch(lambda: default_worker_pool().workers(), pids[0]) == pids
    assert remotecall_fetch(lambda: remote(myid)(), pids[0]) in pids
    assert remotecall_fetch(default_worker_pool, pids[1]) is default


def test_the_default_pool_can_be_replaced(pids: list[int], default: AbstractWorkerPool) -> None:
    mine = WorkerPool(pids[1:2])
    assert default_worker_pool(mine) is mine
    assert default_worker_pool() is mine
    assert remote(myid)() == pids[1]
    assert hpcdist.pmap(lambda i: myid(), range(4)) == [pids[1]] * 4
    assert remotecall_fetch(default_worker_pool, pids[0]) is mine
    default_worker_pool(default)
    assert remotecall_fetch(lambda: default_worker_pool().workers(), pids[0]) == pids


def test_alone_the_default_pool_lends_pid_1(
    script: Callable[..., Any],
) -> None:
    done = script(
        "from hpcdist import *\n"
        "p = default_worker_pool()\n"
        "print(p.take(), p.take(), p.workers(), len(p), p.isready(), remote(myid)())\n"
        "q = addprocs(1)\n"
        "print(p.workers() == q, p.take() == q[0], p.isready())\n"
    )
    assert done.rc == 0, done.err
    assert done.out.splitlines() == ["1 1 [1] 1 True 1", "True True False"]


# --- CachingPool ----------------------------------------------------------------------------------


class Counted:
    """Counts how often it has been pickled."""

    pickled = 0

    def __reduce__(self) -> Any:
        Counted.pickled += 1
        return int, (5,)


def test_a_function_is_sent_once_to_each_worker(pids: list[int]) -> None:
    Counted.pickled = 0
    pool = CachingPool(pids)
    data: Any = Counted()  # arrives as an int

    def plus(n: int, *, more: int = 0) -> Any:
        return data + n + more

    assert [remotecall_fetch(plus, pool, n, more=1) for n in range(9)] == list(range(6, 15))
    assert remotecall(plus, pool, 1).fetch() == 6
    assert Counted.pickled == 3
    clear(pool)
    assert remotecall_fetch(plus, pool, 1) == 6
    assert Counted.pickled == 4


def test_pmap_on_a_caching_pool_sends_once_and_for_all(pids: list[int]) -> None:
    Counted.pickled = 0
    pool, data = CachingPool(pids), Counted()
    f = lambda n: (n + data, time.sleep(0.01))[0]
    for _ in range(3):
        assert hpcdist.pmap(f, range(12), pool=pool) == list(range(5, 17))
    assert Counted.pickled <= 3


def test_another_closure_is_another_function(pids: list[int]) -> None:
    pool = CachingPool(pids[:1])
    assert [remotecall_fetch(lambda k=k: k, pool) for k in range(5)] == list(range(5))


def test_a_caching_pool_on_a_worker(pids: list[int]) -> None:
    pool = CachingPool(pids[:2])
    base = [1, 2, 3]
    assert remotecall_fetch(
        lambda p: [remotecall_fetch(lambda n: n + sum(base), p, n) for n in range(4)], pids[2], pool
    ) == [6, 7, 8, 9]
    assert pool.workers() == pids[:2]


def test_errors_and_remote_do_on_a_caching_pool(pids: list[int]) -> None:
    pool = CachingPool(pids[:1])
    box = [0]
    f = lambda n: 1 // (n - box[0])
    with pytest.raises(ZeroDivisionError):
        remotecall_fetch(f, pool, 0)
    assert remotecall_fetch(f, pool, 1) == 1
    remote_do(f, pool, 1)
    assert remotecall_fetch(f, pool, -1) == -1


def test_workers_drop_what_a_pool_that_is_gone_has_sent(pids: list[int]) -> None:
    def kept() -> int:
        from hpcdist._maps.kept_functions import KeptFunctions

        return len(KeptFunctions.here()._kept)

    gc.collect()
    eventually(lambda: remotecall_fetch(kept, pids[0]) == 0)
    pool = CachingPool(pids[:1])
    remotecall_fetch(lambda box=[1]: box, pool)
    assert remotecall_fetch(kept, pids[0]) == 1
    del pool
    gc.collect()
    eventually(lambda: remotecall_fetch(kept, pids[0]) == 0)


def test_only_a_caching_pool_can_be_cleared(pids: list[int]) -> None:
    with pytest.raises(TypeError):
        clear(WorkerPool(pids))


def test_clear_is_not_in_a_star_import() -> None:
    assert "clear" not in hpcdist.__all__
    assert "WorkerPool" in hpcdist.__all__
