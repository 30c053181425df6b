"""Tags: names for workers in place of their pids."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    CachingPool,
    Executor,
    Pool,
    ProcessExitedException,
    RemoteObject,
    WorkerPool,
    imap,
    myid,
    pmap,
    remote,
    remotecall,
    remotecall_fetch,
    rmprocs,
    workers,
)
from tests.helpers import kill9

pytestmark = pytest.mark.any_mpi


def where(_: object) -> int:
    return myid()


def tagged(tag: str) -> list[int]:
    """Ask a worker, from the worker's side."""
    return [*workers(tag), remotecall_fetch(myid, tag)]


def mapped_on(tag: str) -> set[int]:
    return set(pmap(where, range(40), pool=tag, batch_size=1))


class Thing:
    pass


@pytest.fixture
def kinds(fresh: Callable[..., list[int]]) -> tuple[int, int, int]:
    """Workers without a tag, with one, and with two."""
    (plain,) = fresh(1)
    (gpu,) = fresh(1, tag="gpu")
    (both,) = fresh(1, tag=["gpu", "big"])
    return plain, gpu, both


def test_what_takes_a_tag(kinds: tuple[int, int, int]) -> None:
    plain, gpu, both = kinds
    assert workers("gpu") == [gpu, both]
    assert workers("big") == [both]
    assert set(workers()) >= {plain, gpu, both}
    assert workers("any") == workers()
    assert [remotecall(myid, "gpu").fetch() for _ in range(4)] in ([gpu, both] * 2, [both, gpu] * 2)
    assert remotecall_fetch(myid, "big") == both
    assert remote(myid, "big")() == both
    assert RemoteObject(Thing, "big").where == both
    for made in (WorkerPool("gpu"), CachingPool("gpu")):
        assert made.workers() == [gpu, both]
    for pool in ("gpu", WorkerPool("gpu"), CachingPool("gpu")):
        assert set(pmap(where, range(40), pool=pool, batch_size=1)) <= {gpu, both}
    assert set(imap(where, range(9), pool="big")) == {both}
    assert set(pmap(where, range(9), pool="any")) <= set(workers())
    with Executor("big") as executor, Pool(pool="big") as pool_class:
        assert set(executor.map(where, range(9))) == set(pool_class.map(where, range(9))) == {both}


def test_every_process_knows_the_tags(kinds: tuple[int, int, int]) -> None:
    plain, gpu, both = kinds
    for pid in kinds:
        *listed, called = remotecall_fetch(tagged, pid, "gpu")
        assert listed == [gpu, both]
        assert called in listed
    assert remotecall_fetch(mapped_on, plain, "gpu") <= {gpu, both}


def test_status_shows_them(kinds: tuple[int, int, int]) -> None:
    plain, gpu, both = kinds
    tags = {row.pid: row.tags for row in hpcdist.status()}
    assert (tags[1], tags[plain], tags[gpu], tags[both]) == ((), (), ("gpu",), ("gpu", "big"))
    head, *rows = [line.split() for line in str(hpcdist.status()).splitlines()]
    column = head.index("tags") - len(head)  # from the end: a size is two words
    assert [row[column] for row in (rows[0], rows[-1])] == ["-", "gpu,big"]


def test_a_tag_that_nobody_has(kinds: tuple[int, int, int]) -> None:
    for use in (
        lambda: remotecall(myid, "gpus"),
        lambda: remotecall_fetch(myid, "gpus"),
        lambda: pmap(where, [1], pool="gpus"),
        lambda: Executor("gpus"),
        lambda: Pool(pool="gpus"),
        lambda: WorkerPool("gpus"),
        lambda: RemoteObject(Thing, "gpus"),
        lambda: workers("gpus"),
    ):
        with pytest.raises(ValueError, match=r"no worker has the tag 'gpus'; .*: 'big', 'gpu'"):
            use()


def test_where_there_is_no_tag_at_all(pids: list[int]) -> None:
    with pytest.raises(ValueError, match="no worker has the tag 'never'; none has one"):
        workers("never")


@pytest.mark.parametrize(
    ("tag", "kind", "words"),
    [
        ("any", ValueError, '"any" is no tag'),
        (["gpu", "any"], ValueError, '"any" is no tag'),
        ("", ValueError, "without blanks and commas, not ''"),
        ("two words", ValueError, "without blanks"),
        ([3], TypeError, "a text or a list of texts"),
        (3, TypeError, "a text or a list of texts"),
    ],
)
def test_what_is_no_tag(tag: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        hpcdist.addprocs(1, tag=tag)


def test_those_that_join_later_count_at_once(fresh: Callable[..., list[int]]) -> None:
    (first,) = fresh(1, tag="late")
    pool = WorkerPool("late")
    assert pool.take() == first
    (second,) = fresh(1, tag="late")
    fresh(1, tag="other")
    assert pool.workers() == [first, second]
    assert pool.take(timeout=30) == second
    pool.put(first)
    rmprocs(second)
    assert pool.workers() == workers("late") == [first]


def test_a_map_takes_workers_that_come_later(fresh: Callable[..., list[int]]) -> None:
    (first,) = fresh(1, tag="late")
    seen: set[int] = set()
    go_on = threading.Event()

    def items() -> Any:
        while not go_on.is_set():
            yield None

    results = imap(where, items(), pool="late", batch_size=1)
    seen.add(next(results))
    assert seen == {first}
    (second,) = fresh(1, tag="late")
    fresh(1)
    while second not in seen:
        seen.add(next(results))
    go_on.set()
    seen.update(results)
    assert seen == {first, second}


def test_a_tag_whose_workers_have_died(fresh: Callable[..., list[int]]) -> None:
    fresh(1)
    (pid,) = fresh(1, tag="frail")
    with pytest.raises(ProcessExitedException):
        remotecall_fetch(os._exit, "frail", 3)
    for use in (
        lambda: remotecall(myid, "frail"),
        lambda: pmap(where, [1], pool="frail"),
        lambda: Executor("frail").submit(myid).result(),
    ):
        with pytest.raises(ProcessExitedException) as info:
            use()
        assert info.value.pid == pid
    assert workers("frail") == []


def test_a_tag_whose_workers_were_removed(fresh: Callable[..., list[int]]) -> None:
    fresh(1)
    (pid,) = fresh(1, tag="short")
    rmprocs(pid)
    with pytest.raises(ProcessExitedException, match="removed"):
        pmap(where, [1], pool="short")


def test_replacements_have_the_tags(fresh: Callable[..., list[int]]) -> None:
    fresh(1)
    fresh(1, tag="kept", renew=True, isolation="process")
    results = imap(where, range(10**6), pool="kept", batch_size=1)
    first = next(results)
    pool = WorkerPool("kept")
    assert pool.take() == first
    kill9(next(row.os_pid for row in hpcdist.status() if row.pid == first))
    second = next(pid for pid in results if pid != first)
    results.close()
    assert workers("kept") == [second]
    assert pool.take(timeout=30) == second
    hpcdist.shutdown()


IN_A_LAUNCH = """
import hpcdist

hpcdist.addprocs(hpcdist.MPIManager(), tag="rank")
new = hpcdist.addprocs(1, tag="more")
print(hpcdist.workers("rank"), hpcdist.workers("more"),
      hpcdist.remotecall_fetch(hpcdist.workers, 2, "more"),
      hpcdist.remotecall_fetch(hpcdist.workers, "more", "rank"))
"""
IN_A_BLOCK = """
import hpcdist

with hpcdist.cluster(hpcdist.MPIManager(), tag="rank") as pids:
    if pids is not None:
        print(hpcdist.workers("rank"), hpcdist.remotecall_fetch(hpcdist.workers, 2, "rank"))
"""


@pytest.mark.each_mpi
@pytest.mark.parametrize(
    ("text", "shown"),
    [(IN_A_LAUNCH, "[2, 3] [4] [4] [2, 3]"), (IN_A_BLOCK, "[2, 3] [2, 3]")],
    ids=["launch", "block"],
)
def test_in_an_mpi_launch(script: Callable[..., Any], text: str, shown: str) -> None:
    done = script(text, ranks=3)
    assert (done.rc, done.out.strip()) == (0, shown), done.err
