"""`Pool`, multiprocessing's class on our workers. CPython's own tests of it: see `tests/judges`."""

import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    HpcdistError,
    Pool,
    ProcessExitedException,
    WorkerPool,
    myid,
    remotecall,
    remotecall_fetch,
)
from tests.cluster.test_executor import blocked_until, divide, initialise, state
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi


def held(gate: str) -> str:
    """Say that it has begun, and end when there is a gate, or with an interrupt."""
    Path(f"{gate}.{myid()}").touch()
    try:
        blocked_until(gate)
    except KeyboardInterrupt:
        Path(f"{gate}.{myid()}").unlink()
        raise
    return gate


def begun(gate: Path) -> int:
    return len(list(gate.parent.glob(f"{gate.name}.*")))


def square(x: int) -> int:
    return x * x


async def square_soon(x: int) -> int:
    return x * x


def squares_by_a_pool(n: int) -> list[int]:
    with Pool() as pool:
        return list(pool.imap(square, range(n))) + pool.map(square, range(n))


def where(_: object) -> int:
    return myid()


# --- the tests -----------------------------------------------------------------------------------


def test_what_its_like_has(pids: list[int]) -> None:
    theirs = {name for name in dir(multiprocessing.pool.Pool) if not name.startswith("_")}
    assert theirs - {"Process"} <= set(dir(Pool))


def test_maps(pids: list[int]) -> None:
    with Pool() as pool:
        assert pool.apply(divide, (1,), {"right": 4}) == 0.25
        assert pool.map(square, range(100)) == [x * x for x in range(100)]
        assert pool.map(square, (x for x in range(10)), chunksize=3) == [x * x for x in range(10)]
        assert pool.starmap(divide, [(1, 2), (3, 4)]) == [0.5, 0.75]
        assert list(pool.imap(lambda x: -x, range(50), chunksize=7)) == [-x for x in range(50)]
        assert sorted(pool.imap_unordered(square, range(50))) == [x * x for x in range(50)]
        soon: list[Any] = pool.map(square_soon, range(5))
        assert soon == [0, 1, 4, 9, 16]
        assert set(pool.map(where, range(60), chunksize=1)) <= set(pids)


def test_it_uses_the_workers_it_was_given(pids: list[int]) -> None:
    with Pool(pool=pids[1:]) as pool:
        assert set(pool.map(where, range(20), chunksize=1)) <= set(pids[1:])
    with Pool(pool=WorkerPool([pids[2]])) as pool:
        assert set(pool.imap(where, range(20))) == {pids[2]}
    with Pool(1) as pool:
        assert set(pool.imap_unordered(where, range(20))) == {pids[0]}
        assert repr(pool) == "<hpcdist.Pool state=RUN pool_size=1>"


def test_mistakes(pids: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
    with pytest.raises(ValueError, match="maxtasksperchild"):
        Pool(maxtasksperchild=0)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        Pool(initializer=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no keyword 'process'; did you mean 'processes'"):
        Pool(process=3)  # type: ignore[call-arg]
    with Pool() as pool:
        with pytest.raises(ValueError, match="Chunksize must be 1"):
            pool.imap(square, [1], 0)
        with pytest.raises(AttributeError, match=r"apply_async"):
            pool.submit  # type: ignore[attr-defined]
        with pytest.raises(NotImplementedError):
            pickle.dumps(pool)
        with pytest.raises(ValueError, match="still running"):
            pool.join()
    for use in (lambda: pool.apply(square, (1,)), lambda: pool.imap(square, []), pool.__enter__):
        with pytest.raises(ValueError, match="Pool not running"):
            use()


def test_an_error_says_which_item(pids: list[int]) -> None:
    with Pool() as pool:
        for fails in (
            lambda: pool.starmap(divide, [(1, 1), (1, 0)], chunksize=2),
            lambda: pool.map(lambda x: 1 / x, [1, 0], chunksize=2),
            lambda: list(pool.imap(lambda x: 1 / x, [1, 0])),
        ):
            with pytest.raises(ZeroDivisionError) as info:
                fails()
            assert info.value.index == 1  # type: ignore[attr-defined]
            assert type(info.value.__cause__) is multiprocessing.pool.RemoteTraceback


def test_results_that_take_their_time(pids: list[int], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Pool() as pool:
        result = pool.apply_async(held, (str(gate),))
        iterator: Any = pool.imap(held, [str(gate)])
        assert not result.ready()
        with pytest.raises(ValueError, match="not ready"):
            result.successful()
        result.wait(0.01)
        for kind in (TimeoutError, multiprocessing.TimeoutError):
            with pytest.raises(kind):
                result.get(timeout=0.01)
            with pytest.raises(kind):
                iterator.next(timeout=0.01)
        gate.touch()
        assert result.get() == result.get(timeout=1) == iterator.next(timeout=30) == str(gate)
        assert result.successful()
        assert list(iterator) == []


def test_callbacks(pids: list[int]) -> None:
    got: list[Any] = []
    with Pool() as pool:
        result = pool.map_async(square, [1, 2, 3], callback=got.append)
        result.wait()
        assert got == [[1, 4, 9]]
        assert result.get() is got[0]
        failed = pool.apply_async(divide, (1, 0), callback=got.append, error_callback=got.append)
        failed.wait()
        assert isinstance(got[1], ZeroDivisionError)
        assert not failed.successful()


def test_imap_works_while_nobody_asks_and_reads_not_far_ahead(pids: list[int]) -> None:
    read, go_on = [], threading.Event()

    def items() -> Any:
        for k in range(100):
            read.append(k)
            yield k
        assert go_on.wait(30)
        yield from itertools.count(100)

    with Pool() as pool:
        results = pool.imap(square, items())
        eventually(lambda: len(read) == 100)
        assert list(itertools.islice(results, 100)) == [x * x for x in range(100)]
        go_on.set()
        assert next(results) == 10_000


def test_imap_reads_no_further_than_the_workers_need(pids: list[int], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    read = []

    def items() -> Any:
        for k in range(1000):
            read.append(k)
            yield str(gate)

    with Pool(1) as pool:
        results = pool.imap(held, items())
        eventually(lambda: begun(gate))
        eventually(lambda: len(read) == 17)  # 16, and one in the hand
        gate.touch()
        assert len(list(results)) == 1000
    assert len(read) == 1000


def test_close_lets_all_end(pids: list[int]) -> None:
    pool = Pool()
    results = pool.imap(square, (x for x in range(500)))
    last = pool.apply_async(square, (9,))
    pool.close()
    pool.join()
    assert last.ready()
    assert list(results) == [x * x for x in range(500)]


def test_terminate_ends_what_runs_and_nothing_else(pids: list[int], tmp_path: Path) -> None:
    gate, others = tmp_path / "gate", tmp_path / "others"
    other = remotecall(held, pids[0], str(others))
    eventually(lambda: begun(others))
    pool = Pool(pool=pids[1:])
    results = [pool.apply_async(held, (str(gate),)) for _ in range(20)]
    iterator = pool.imap(held, itertools.repeat(str(gate)))
    eventually(lambda: begun(gate) == 2)
    pool.terminate()
    pool.join()
    for result in results:
        with pytest.raises(HpcdistError, match="the pool was terminated"):
            result.get()
    with pytest.raises(HpcdistError, match="the pool was terminated"):
        next(iterator)
    eventually(lambda: begun(gate) == 0)  # interrupted
    assert not other.done()
    others.touch()
    assert other.fetch() == str(others)
    with Pool() as again:
        assert again.map(square, range(10)) == [x * x for x in range(10)]


def test_a_pool_made_by_a_task(pids: list[int]) -> None:
    expected = [x * x for x in range(20)]
    with Pool() as pool:
        assert pool.map(squares_by_a_pool, [20] * 6) == [expected * 2] * 6


def test_an_initializer(pids: list[int]) -> None:
    with Pool(initializer=initialise, initargs=("by a pool",)) as pool:
        assert {pool.apply(state) for _ in range(6)} == {"by a pool"}


def test_a_death_costs_one_task(fresh: Callable[..., list[int]]) -> None:
    new = fresh(3)
    with Pool(pool=new) as pool:
        dead = pool.apply_async(os._exit, (3,))
        with pytest.raises(ProcessExitedException):
            dead.get()
        assert pool.map(square, range(10)) == [x * x for x in range(10)]


ALONE = """
import hpcdist

def square(x):
    return x * x

if __name__ == "__main__":
    hpcdist.init(2)
    with hpcdist.Pool() as pool:
        print(pool.map(square, range(5)), hpcdist.nworkers())
"""


@pytest.mark.each_mpi
@pytest.mark.parametrize("ranks", [None, 3])
def test_a_script_runs_in_every_way(script: Callable[..., Any], ranks: int | None) -> None:
    done = script(ALONE, ranks=ranks)
    assert (done.rc, done.out.strip()) == (0, "[0, 1, 4, 9, 16] 2"), done.err


LEFT_OPEN = """
import time
import hpcdist

if __name__ == "__main__":
    hpcdist.addprocs(1)
    pool = hpcdist.Pool()
    result = pool.map_async(time.sleep, [300] * 10)
    print("end")
"""


def test_a_program_ends_whatever_its_pools_do(script: Callable[..., Any]) -> None:
    done = script(LEFT_OPEN)
    assert (done.rc, done.out.strip()) == (0, "end"), done.err


def test_a_call_that_is_interrupted_alone(pids: list[int], tmp_path: Path) -> None:
    """Only the one that is meant: of the same worker, another one that waits goes on."""
    gate = tmp_path / "gate"
    with Pool(1, pool=[pids[0]]) as pool:
        pool.apply_async(held, (str(gate),))
        eventually(lambda: begun(gate))
        later = remotecall(myid, pids[0])
    assert later.fetch() == pids[0]
    assert hpcdist.workers() == pids
    assert remotecall_fetch(myid, pids[0]) == pids[0]
