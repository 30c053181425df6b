"""`Executor`, a `concurrent.futures.Executor`, and joblib's backend."""

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    as_completed,
)
from importlib import metadata
from operator import add
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    Executor,
    ProcessExitedException,
    myid,
    remotecall_fetch,
    workers,
)
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

JOBLIB = tuple(int(part) for part in metadata.version("joblib").split(".")[:2])

# --- what the workers run ------------------------------------------------------------------------

_state = "uninitialised"


def initialise(value: str) -> None:
    global _state
    time.sleep(0.05)
    _state = value


def state() -> str:
    return _state


def fail(what: BaseException) -> None:
    raise what


def who_after(seconds: float) -> int:
    time.sleep(seconds)
    return myid()


def show_and_wait(folder: str) -> int:
    """Leave a file with one's pid, and wait for the file "go"."""
    open(os.path.join(folder, str(myid())), "w").close()
    blocked_until(os.path.join(folder, "go"))
    return myid()


def blocked_until(path: str) -> bool:
    while not os.path.exists(path):
        time.sleep(0.005)
    return True


def divide(left: int, right: int) -> float:
    return left / right


def arguments(*args: Any, **kw: Any) -> tuple[Any, ...]:
    return args, kw


def exit_at(k: int, fatal: int) -> int:
    if k == fatal:
        os._exit(3)
    time.sleep(0.05)
    return k


def nested(depth: int) -> int:
    """Wait in each of the ways the standard library has."""
    if not depth:
        return 1
    with Executor() as inner:
        futures = [inner.submit(nested, depth - 1) for _ in range(3)]
        done, _ = concurrent.futures.wait(futures, timeout=30)
        total = sum(future.result() for future in as_completed(done))
        return total + sum(inner.map(nested, [depth - 1]))


class Thing:
    def method(self) -> int:
        return 1


def make_thing(_: int) -> Thing:
    return Thing()


class Refuses:
    def __reduce__(self) -> Any:
        raise ValueError("not to be pickled")


def returns_a_lock() -> Any:
    return threading.Lock()


# --- submit --------------------------------------------------------------------------------------


def test_it_is_one_of_the_standard_library(pids: list[int]) -> None:
    with Executor() as executor:
        assert isinstance(executor, concurrent.futures.Executor)
        future = executor.submit(pow, 2, 8)
        assert isinstance(future, concurrent.futures.Future)
        assert (future.result(), future.done(), future.exception()) == (256, True, None)
        assert executor.submit(arguments, 1, self=2, fn=3).result() == ((1,), {"self": 2, "fn": 3})
        with pytest.raises(TypeError):
            executor.submit(fn=pow)  # type: ignore[call-arg]


def test_tasks_run_on_the_workers(pids: list[int]) -> None:
    with Executor() as executor:
        assert set(executor.map(who_after, [0.02] * 30)) == set(pids)
    with Executor(pids[:2]) as executor:
        assert set(executor.map(who_after, [0.02] * 30)) == set(pids[:2])
    with Executor(max_workers=1) as executor:
        assert len(set(executor.map(who_after, [0.01] * 10))) == 1
    with Executor(pids[2], max_workers=5) as executor:
        assert executor.submit(myid).result() == pids[2]


def test_a_slow_task_holds_up_few_others(pids: list[int]) -> None:
    with Executor() as executor:
        slow = executor.submit(time.sleep, 8)
        quick = [executor.submit(time.sleep, 0.01) for _ in range(60)]
        done, _ = concurrent.futures.wait(quick, timeout=7)
        assert len(done) >= 59
        assert not slow.done()


def test_a_short_task_never_waits_behind_a_long_one(pids: list[int], tmp_path: Path) -> None:
    done = tmp_path / "done"
    with Executor(pids[:2]) as executor:
        long = executor.submit(blocked_until, str(done))
        short = [executor.submit(abs, -k) for k in range(6)]
        assert [future.result(30) for future in short] == list(range(6))
        assert not long.done()
        done.touch()
        assert long.result(30)


def test_tasks_that_were_quick_wait_behind_no_long_one(pids: list[int], tmp_path: Path) -> None:
    """Of quick tasks many are on their way: all but the long one go elsewhere."""
    done, f = str(tmp_path / "done"), lambda k: blocked_until(done) if k == 300 else k
    with Executor(pids[:2]) as executor:
        assert [executor.submit(f, k).result() for k in range(300)] == list(range(300))
        futures = [executor.submit(f, k) for k in range(600)]
        others = [future for k, future in enumerate(futures) if k != 300]
        concurrent.futures.wait(others, timeout=30)
        assert all(future.done() for future in others)
        assert not futures[300].done()
        Path(done).touch()
    assert [future.result() for future in others] == [k for k in range(600) if k != 300]


def test_a_worker_that_is_busy_with_something_else_holds_nothing_up(
    pids: list[int], tmp_path: Path
) -> None:
    done = tmp_path / "done"
    busy = hpcdist.remotecall(blocked_until, pids[0], str(done))
    eventually(busy.running)
    with Executor(pids[:2]) as executor:
        assert [executor.submit(abs, -k).result(30) for k in range(6)] == list(range(6))
        assert list(executor.map(abs, range(100))) == list(range(100))
    done.touch()
    assert busy.fetch(timeout=30)


def test_mistakes(pids: list[int]) -> None:
    for number in (0, -1):
        with pytest.raises(ValueError, match="max_workers must be greater than 0"):
            Executor(max_workers=number)
    with pytest.raises(TypeError, match="callable"):
        Executor(initializer="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="9999"):
        Executor([9999])
    with pytest.raises(ValueError):
        Executor([])


def test_lambdas_and_closures(pids: list[int]) -> None:
    offset = 10
    with Executor() as executor:
        assert list(executor.map(lambda x: x + offset, range(5))) == [10, 11, 12, 13, 14]


# --- errors --------------------------------------------------------------------------------------


def test_the_original_exception_comes_back(pids: list[int]) -> None:
    with Executor() as executor:
        future = executor.submit(divide, 1, 0)
        with pytest.raises(ZeroDivisionError) as caught:
            future.result()
    assert type(caught.value) is ZeroDivisionError
    assert type(future.exception()) is ZeroDivisionError
    assert "in divide" in str(caught.value.__cause__)
    assert "On worker" in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [StopIteration(3), SystemExit(4), TimeoutError("late")])
def test_errors_that_mean_something_here(error: BaseException, pids: list[int]) -> None:
    with Executor() as executor:
        found = executor.submit(fail, error).exception()
    assert (type(found), found.args if found else None) == (type(error), error.args)


def test_what_cannot_be_pickled_fails_alone(pids: list[int]) -> None:
    with Executor() as executor:
        with pytest.raises(ValueError, match="not to be pickled"):
            executor.submit(str, Refuses()).result()
        with pytest.raises(TypeError, match="pickle"):
            executor.submit(returns_a_lock).result()
        assert executor.submit(abs, -3).result() == 3


# --- map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"chunksize": 3}, {"buffersize": 2}])
def test_map(more: dict[str, int], pids: list[int]) -> None:
    with Executor() as executor:
        assert list(executor.map(pow, range(10), range(10), **more)) == [k**k for k in range(10)]
        assert list(executor.map(pow, [], [], **more)) == []
        found = executor.map(divide, [1, 2, 3], [1, 0, 1], **{**more, "chunksize": 1})
        assert next(found) == 1.0
        with pytest.raises(ZeroDivisionError):
            next(found)


def test_a_pool_is_asked_without_a_lock_held(pids: list[int]) -> None:
    """It may live in another process: while it is asked, answers come in, and want the lock."""
    asked = []

    class Pool:
        """A pool that takes its executor's lock."""

        def workers(self) -> list[int]:
            asked.append(executor._lock.acquire(timeout=5))
            if asked[-1]:
                executor._lock.release()
            return pids

    executor = Executor(Pool())
    with executor:
        assert executor.submit(add, 1, 2).result() == 3
        assert list(executor.map(add, range(3), range(3))) == [0, 2, 4]
    assert asked
    assert all(asked)


def on_a_pool_of_another(pool: Any) -> list[int]:
    with Executor(pool) as executor:
        return list(executor.map(add, range(200), range(200)))


def test_an_executor_with_a_pool_of_another_process(pids: list[int]) -> None:
    pool = hpcdist.WorkerPool(pids[1:])
    found = remotecall_fetch(on_a_pool_of_another, pids[0], pool)
    assert found == [2 * k for k in range(200)]


def test_map_of_a_coroutine_function_in_chunks(pids: list[int]) -> None:
    async def divide(x: int) -> float:
        await asyncio.sleep(0)
        return 6 / x

    with Executor() as executor:
        divided: list[Any] = list(executor.map(divide, [1, 2, 3, 6], chunksize=3))
        assert divided == [6, 3, 2, 1]
        with pytest.raises(ZeroDivisionError) as caught:
            list(executor.map(divide, [1, 2, 3, 6, 0, 1], chunksize=3))
        assert caught.value.index == 4  # type: ignore[attr-defined]


def test_map_timeout(pids: list[int]) -> None:
    results = []
    with Executor() as executor:
        with pytest.raises(concurrent.futures.TimeoutError):
            for result in executor.map(time.sleep, [0, 0, 3], timeout=1):
                results.append(result)
    assert results == [None, None]


@pytest.mark.parametrize("more", [{}, {"chunksize": 4}, {"buffersize": 3}])
def test_an_error_of_a_map_says_which_item(pids: list[int], more: dict[str, int]) -> None:
    with Executor() as executor:
        with pytest.raises(ZeroDivisionError) as caught:
            list(executor.map(divide, range(20), [1] * 9 + [0] * 11, **more))
        assert type(caught.value) is ZeroDivisionError
        assert (caught.value.index, caught.value.item) == (9, (9, 0))  # type: ignore[attr-defined]
        assert "In item 9 of the map: (9, 0)" in caught.value.__notes__
        assert not hasattr(executor.submit(divide, 1, 0).exception(), "__notes__")


def test_a_death_in_a_map_says_which_item(fresh: Callable[..., list[int]]) -> None:
    # Of a world, Open MPI may end the other worker too, and item 6 with it.
    with Executor(fresh(2, isolation="process")) as executor:
        with pytest.raises(ProcessExitedException) as caught:
            list(executor.map(exit_at, range(10), [7] * 10))
    assert caught.value.index == 7  # type: ignore[attr-defined]
    assert f"Item 7 of the map ended worker {caught.value.pid}" in caught.value.__notes__[0]


def test_map_arguments(pids: list[int]) -> None:
    with Executor() as executor:
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(str, [1], chunksize=0)
        with pytest.raises(ValueError, match="buffersize"):
            executor.map(str, [1], buffersize=0)
        with pytest.raises(TypeError, match="buffersize"):
            executor.map(str, [1], buffersize="1")  # type: ignore[arg-type]


def test_map_of_an_endless_iterable(pids: list[int]) -> None:
    numbers = itertools.count()
    with Executor() as executor:
        found = executor.map(add, numbers, itertools.repeat(1), buffersize=4)
        assert next(numbers) == 4
        assert list(itertools.islice(found, 10)) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
        found.close()  # type: ignore[attr-defined]


def test_an_abandoned_map_cancels_what_has_not_started(pids: list[int]) -> None:
    with Executor() as executor:
        found = executor.map(time.sleep, [0.1] * 600)
        next(found)
        del found
        gc.collect()
        start = time.monotonic()
    assert time.monotonic() - start < 10  # All of them take 20 s.


# --- cancelling, shutting down -------------------------------------------------------------------


def test_cancel(pids: list[int]) -> None:
    with Executor() as executor:
        futures = [executor.submit(time.sleep, 0.2) for _ in range(30)]
        cancelled = [future for future in futures if future.cancel()]
        assert 20 <= len(cancelled) < 30
        assert futures[0].running() or futures[0].done()
        with pytest.raises(CancelledError):
            cancelled[0].result()
        concurrent.futures.wait(futures, timeout=10)
    assert all(future.done() for future in futures)


@pytest.mark.parametrize("wait", [True, False])
def test_shutdown(wait: bool, pids: list[int]) -> None:
    executor = Executor()
    futures = [executor.submit(time.sleep, 0.05) for _ in range(20)]
    executor.shutdown(wait=wait)
    assert all(future.done() for future in futures) is wait
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(pow, 2, 5)
    executor.shutdown()
    assert [future.result() for future in futures] == [None] * 20
    assert set(pids) <= set(workers())


def test_shutdown_that_cancels(pids: list[int]) -> None:
    executor = Executor()
    futures = [executor.submit(time.sleep, 0.1) for _ in range(50)]
    executor.shutdown(cancel_futures=True)
    cancelled = [future for future in futures if future.cancelled()]
    others = [future for future in futures if not future.cancelled()]
    assert len(cancelled) > 20
    assert others
    assert all(future.done() and future.exception() is None for future in others)


def test_a_program_that_ends_finishes_its_tasks(script: Callable[..., Any]) -> None:
    done = script(
        "import atexit, time, hpcdist\n"
        "@atexit.register\n"
        "def last():\n"
        "    try: executor.submit(abs, 1)\n"
        "    except RuntimeError as exc: print(exc)\n"
        "hpcdist.addprocs(2)\n"
        "executor = hpcdist.Executor()\n"
        "def slow(k):\n"
        "    time.sleep(0.3); return k\n"
        "for k in range(6): executor.submit(slow, k).add_done_callback(\n"
        "    lambda f: print('done', f.result(), flush=True))\n"
        "executor.shutdown(wait=False) if False else None\n"
    )
    assert done.rc == 0, done.err
    assert sorted(done.out.splitlines()) == [
        "cannot schedule new futures after interpreter shutdown",
        *(f"done {k}" for k in range(6)),
    ]


# --- wait, as_completed, asyncio -----------------------------------------------------------------


def test_wait(pids: list[int]) -> None:
    with Executor() as executor:
        quick, slow = executor.submit(abs, 1), executor.submit(time.sleep, 1)
        done, left = concurrent.futures.wait([quick, slow], return_when=FIRST_COMPLETED)
        assert (done, left) == ({quick}, {slow})
        bad = executor.submit(divide, 1, 0)
        done, left = concurrent.futures.wait([slow, bad], return_when=FIRST_EXCEPTION)
        assert bad in done
        done, left = concurrent.futures.wait([quick, slow, bad])
        assert not left
        done, left = concurrent.futures.wait([executor.submit(time.sleep, 1)], timeout=0.1)
        assert (len(done), len(left)) == (0, 1)


def test_as_completed(pids: list[int]) -> None:
    with Executor() as executor:
        futures = {executor.submit(time.sleep, k / 5): k for k in (2, 1, 0)}
        assert [futures[future] for future in as_completed(futures)] == [0, 1, 2]
        slow = executor.submit(time.sleep, 1)
        with pytest.raises(concurrent.futures.TimeoutError):
            list(as_completed([slow], timeout=0.1))


def test_asyncio(pids: list[int]) -> None:
    async def main(executor: Executor) -> list[Any]:
        loop = asyncio.get_running_loop()
        in_executor = loop.run_in_executor(executor, pow, 2, 5)
        wrapped = asyncio.wrap_future(executor.submit(pow, 3, 2))
        return list(await asyncio.gather(in_executor, wrapped))

    with Executor() as executor:
        assert asyncio.run(main(executor)) == [32, 9]


@pytest.mark.parametrize("begin", [lambda e, *a: e.submit(*a), lambda e, *a: hpcdist.spawn(*a)])
def test_what_asyncio_asks_since_python_3_14(pids: list[int], begin: Any) -> None:
    with Executor() as executor:
        good, bad = begin(executor, pow, 2, 5), begin(executor, pow, 0, -1)
        eventually(lambda: good.done() and bad.done())
        assert good._get_snapshot() == (True, False, 32, None)
        assert isinstance(bad._get_snapshot()[3], ZeroDivisionError)
        channel = hpcdist.RemoteChannel(1)
        waiting = begin(executor, hpcdist.take, channel)
        assert waiting._get_snapshot() == (False, False, None, None)
        channel.put(3)
        assert waiting.result() == 3


def test_callbacks(pids: list[int]) -> None:
    seen: list[Any] = []
    with Executor() as executor:
        future = executor.submit(time.sleep, 0.05)
        future.add_done_callback(lambda f: seen.append(f.result()))
        future.add_done_callback(lambda f: 1 / 0)
        future.add_done_callback(lambda f: seen.append(f.done()))
        eventually(lambda: len(seen) == 2)
    assert seen == [None, True]


def test_from_many_threads(pids: list[int]) -> None:
    def work(k: int) -> int:
        return sum(executor.submit(add, k, j).result() for j in range(50))

    with Executor() as executor, concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(work, range(8)))
    assert found == [50 * k + 1225 for k in range(8)]


def test_tasks_that_submit_tasks(pids: list[int]) -> None:
    with Executor() as executor:
        assert list(executor.map(nested, [2] * 6)) == [16] * 6


def test_tasks_come_back_from_the_process_itself(pids: list[int], tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    with Executor([1, pids[0]]) as executor:
        executor.submit(add, 1, 1).result()
        busy = hpcdist.remotecall(blocked_until, 1, gate)
        found = [executor.submit(add, 1, k) for k in range(4)]
        assert [future.result(30) for future in found] == [1, 2, 3, 4]
        open(gate, "w").close()
        assert busy.fetch(30)


def test_nothing_is_held_on_to(pids: list[int]) -> None:
    with Executor() as executor:
        for result in executor.map(make_thing, range(10)):
            gone = weakref.ref(result)
            del result
            assert gone() is None
        thing, collected = Thing(), threading.Event()
        watch = weakref.ref(thing, lambda _: collected.set())
        executor.submit(thing.method)
        del thing
        assert collected.wait(10)
        del watch


# --- initializers --------------------------------------------------------------------------------


def test_the_initializer_runs_before_the_first_task(pids: list[int]) -> None:
    with Executor(initializer=initialise, initargs=("ready",)) as executor:
        assert set(executor.map(lambda _: (time.sleep(0.01), state())[1], range(30))) == {"ready"}
    assert {remotecall_fetch(state, pid) for pid in pids} == {"ready"}


def test_a_failing_initializer_breaks_the_executor(
    pids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL, "concurrent.futures"):
        with Executor(initializer=divide, initargs=(1, 0)) as executor:
            future = executor.submit(state)
            with pytest.raises(BrokenExecutor) as caught:
                future.result(10)
            with pytest.raises(BrokenExecutor):
                executor.submit(state)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "ZeroDivisionError" in caplog.text


# --- deaths --------------------------------------------------------------------------------------


def test_a_death_costs_one_task(fresh: Callable[..., list[int]]) -> None:
    with Executor(fresh(3)) as executor:
        futures = [executor.submit(exit_at, k, 7) for k in range(40)]
        errors = {k: future.exception() for k, future in enumerate(futures)}
    assert [k for k, error in errors.items() if error is not None] == [7]
    assert isinstance(errors[7], ProcessExitedException)
    found = [future.result() for k, future in enumerate(futures) if k != 7]
    assert found == [k for k in range(40) if k != 7]


def test_when_no_worker_is_left(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(2)
    with Executor(pids) as executor:
        futures = [executor.submit(os._exit, 1) for _ in range(10)]
        for future in futures:
            assert isinstance(future.exception(20), ProcessExitedException)
        assert isinstance(executor.submit(abs, 1).exception(5), ProcessExitedException)


def test_workers_that_join_get_tasks(
    pids: list[int], fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    with Executor() as executor:
        futures = [executor.submit(show_and_wait, str(tmp_path)) for _ in range(150)]
        try:
            (new,) = fresh(1)
            eventually((tmp_path / str(new)).exists)
        finally:
            (tmp_path / "go").touch()
        assert {future.result() for future in futures} == {*pids, new}


def test_alone(script: Callable[..., Any]) -> None:
    done = script(
        "import hpcdist\n"
        "with hpcdist.Executor() as executor: print(list(executor.map(abs, [-1, 2])))\n"
    )
    assert (done.rc, done.out) == (0, "[1, 2]\n"), done.err


# --- joblib --------------------------------------------------------------------------------------


def inner_parallel(k: int) -> tuple[str, int]:
    import joblib

    out = joblib.Parallel(n_jobs=2)(joblib.delayed(pow)(j, 2) for j in range(3))
    backend = joblib.parallel.get_active_backend()[0]
    return type(backend).__name__, k + sum(out)


def test_joblib(pids: list[int]) -> None:
    from joblib import Parallel, delayed, effective_n_jobs, parallel_config

    hpcdist.register_joblib()
    with parallel_config("hpcdist"):
        assert effective_n_jobs() == len(pids)
        assert set(Parallel()(delayed(who_after)(0.02) for _ in range(30))) == set(pids)
        assert Parallel()(delayed(pow)(k, 2) for k in range(500)) == [k**2 for k in range(500)]
        assert list(Parallel(return_as="generator")(delayed(pow)(k, 2) for k in range(5))) == [
            0,
            1,
            4,
            9,
            16,
        ]
        with pytest.raises(ZeroDivisionError):
            Parallel()(delayed(divide)(1, k - 3) for k in range(10))
        found = Parallel()(delayed(inner_parallel)(k) for k in range(4))
        assert [total for _, total in found] == [5, 6, 7, 8]
        assert {name for name, _ in found} <= {"ThreadingBackend", "SequentialBackend"}
    with parallel_config("hpcdist", pool=pids[:2], n_jobs=2):
        assert set(Parallel()(delayed(who_after)(0.02) for _ in range(20))) == set(pids[:2])


def test_joblib_takes_an_initializer(pids: list[int]) -> None:
    from joblib import Parallel, delayed, parallel_config

    hpcdist.register_joblib()
    with parallel_config("hpcdist", initializer=initialise, initargs=("by joblib",)):
        assert set(Parallel()(delayed(state)() for _ in range(20))) == {"by joblib"}


@pytest.mark.skipif(
    JOBLIB < (1, 5), reason="joblib before 1.5 refuses such arguments, whatever the backend"
)
def test_one_call_of_joblib_takes_an_initializer(pids: list[int]) -> None:
    from joblib import Parallel, delayed

    hpcdist.register_joblib()
    once = Parallel(backend="hpcdist", n_jobs=2, initializer=initialise, initargs=("by a call",))
    assert set(once(delayed(state)() for _ in range(20))) == {"by a call"}


def test_a_grid_search(pids: list[int]) -> None:
    from joblib import parallel_config
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    hpcdist.register_joblib()
    features, classes = load_iris(return_X_y=True)
    grid = {"C": [0.1, 1, 10], "kernel": ["linear", "rbf"]}
    with parallel_config("hpcdist"):
        found = GridSearchCV(SVC(), grid, n_jobs=-1).fit(features, classes)
    serial = GridSearchCV(SVC(), grid).fit(features, classes)
    assert found.best_params_ == serial.best_params_
    assert found.best_score_ == pytest.approx(serial.best_score_)
