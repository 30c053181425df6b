"""A user's program, as type checkers see it: strict, without casts and without annotations to help.

`make lint` checks it with mypy and pyright, `test_types.py` runs it. What both refuse is in
`typed_mistakes.py`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import Any, assert_type

import hpcdist
from hpcdist import (
    ANY,
    Executor,
    Future,
    JobExecutor,
    JobFuture,
    Pool,
    RemoteChannel,
    RemoteObject,
    RemoteValue,
    WorkerPool,
    bcast,
    everywhere,
    fetch,
    fetchany,
    fetchfrom,
    gather,
    imap,
    imap_unordered,
    pmap,
    put,
    remote,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    scatter,
    spawn,
    spawnat,
    take,
    wait,
)


def length(text: str, factor: int = 1) -> float:
    return len(text) * factor / 2


async def length_soon(text: str) -> float:
    await asyncio.sleep(0)
    return length(text)


def total(numbers: list[int]) -> int:
    return sum(numbers)


def work(jobs: RemoteChannel[int], results: RemoteChannel[str]) -> int:
    done = 0
    for job in jobs:
        assert_type(job, int)
        results.put(str(job * job))
        done += 1
    return done


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def up(self, by: int = 1) -> int:
        self.value += by
        return self.value


def calls() -> None:
    future = remotecall(length, ANY, "four", factor=2)
    assert_type(future, Future[float])
    assert_type(future.fetch(), float)
    assert_type(future.result(timeout=30), float)
    assert_type(fetch(future), float)
    assert_type(future.wait().fetch(), float)
    assert_type(wait(future), Future[float])
    assert_type(spawn(length, "four"), Future[float])
    assert_type(spawnat(2, length, "four"), Future[float])
    assert_type(remotecall_wait(length, 2, "four"), Future[float])
    assert_type(remotecall_fetch(length, 2, "four"), float)
    assert_type(fetchfrom(2, length, "four"), float)
    assert_type(fetchany(length, "four"), float)
    assert_type(fetch(3), int)
    assert_type(remotecall_fetch(Counter, 2, 3), Counter)
    assert_type(remotecall_fetch(lambda: 3, WorkerPool()), int)
    empty: Future[int] = Future(2)
    empty.put(3)
    assert_type(empty.fetch(), int)


def coroutines() -> None:
    assert_type(remotecall(length_soon, ANY, "four"), Future[float])
    assert_type(remotecall_fetch(length_soon, ANY, "four"), float)
    assert_type(pmap(length_soon, ["a", "b"]), list[float])

    async def both() -> float:
        return await remotecall(length, ANY, "a") + await spawn(length_soon, "b")

    assert_type(asyncio.run(both()), float)


def channels() -> None:
    jobs = RemoteChannel[int](10)
    results: RemoteChannel[str] = RemoteChannel(10)
    worker = spawn(work, jobs, results)
    for number in range(3):
        put(jobs, number)
    jobs.close()
    assert_type(worker.fetch(), int)
    assert_type(take(results), str)
    assert_type(results.take(timeout=30), str)
    assert_type(fetch(results), str)
    whatever = RemoteChannel(1)
    whatever.put("anything")
    assert_type(whatever.take(), Any)
    with whatever as inside:
        inside.close()


def maps() -> None:
    words = ["one", "three"]
    assert_type(pmap(length, words), list[float])
    assert_type(pmap(length, words, [1, 2], batch_size=1, on_exit="raise"), list[float])
    assert_type(pmap(lambda word: len(word) > 3, words), list[bool])
    results = imap(length, words)
    for value in results:
        assert_type(value, float)
    assert_type(results.seed, int)
    assert_type(list(imap_unordered(length, words, seed=3)), list[float])
    assert_type(remote(length)("four"), float)
    assert_type(remote(length_soon, WorkerPool())("four"), float)


def executors() -> None:
    with Executor() as executor:
        future = executor.submit(length, "four", factor=2)
        assert_type(future, concurrent.futures.Future[float])
        assert_type(executor.submit(length_soon, "four").result(), float)
        assert_type(executor.map(length, ["one", "two"]), Iterator[float])
    with Pool() as pool:
        assert_type(pool.map(length, ["one", "two"]), list[float])
        assert_type(pool.apply_async(length, ("four",)).get(timeout=30), float)
        assert_type(pool.starmap(length, [("four", 3)]), list[float])
        for value in pool.imap(length, ["one"]):
            assert_type(value, float)


def values() -> None:
    numbers = bcast([1, 2, 3])
    assert_type(numbers, RemoteValue[list[int]])
    assert_type(numbers.fetch(), list[int])
    assert_type(remotecall_fetch(total, ANY, numbers), int)
    assert_type(scatter([1, 2, 3]), list[RemoteValue[list[int]]])
    assert_type(gather([spawn(length, "a"), spawn(length, "b")]), list[float])
    assert_type(hpcdist.spmd(length, "four"), list[float])
    assert_type(hpcdist.spmd.submit(length, "four").fetch(), list[float])
    assert_type(hpcdist.spmd.submit(length, "four", ranks=2).fetch(), float)
    assert_type(hpcdist.pmap(length, ["four"], ranks=2), list[float])
    assert_type(gather(scatter([1, 2, 3])), list[list[int]])


def all_processes() -> None:
    everywhere("import math")

    @everywhere
    def shout(word: str) -> str:
        return word.upper()

    @everywhere(later=True)
    def whisper(word: str) -> str:
        return word.lower()

    assert_type(shout("a") + whisper("B"), str)
    assert_type(everywhere.call(length, "four"), dict[int, float])


def objects() -> None:
    counter = RemoteObject(Counter, None, 3)
    value: int = counter.up(by=2)
    later: Future[int] = counter.up.remotecall()
    print(value, later.fetch(), counter.get("value"))
    counter.free()


def jobs(executor: JobExecutor) -> None:  # without a scheduler there are none to run
    assert_type(executor.submit(length, "four"), JobFuture[float])
    assert_type(executor.submit(length, "four").result(), float)
    assert_type(executor.map(length, ["one", "two"]), list[JobFuture[float]])


if __name__ == "__main__":
    hpcdist.addprocs(2)
    calls()
    coroutines()
    channels()
    maps()
    executors()
    values()
    all_processes()
    objects()
