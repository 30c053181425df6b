"""Which item an error of a map or a loop belongs to; and what a map does when all workers died."""

import operator
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    CachingPool,
    CompositeException,
    ProcessExitedException,
    RemoteException,
    WorkerPool,
    distributed,
    imap,
    imap_unordered,
    pmap,
    remotecall_fetch,
)
from tests.helpers import eventually, kill9

pytestmark = pytest.mark.any_mpi

MAPS: list[Any] = [
    pmap,
    lambda *a, **k: list(imap(*a, **k)),
    lambda *a, **k: list(imap_unordered(*a, **k)),
]
each_map = pytest.mark.parametrize("run", MAPS, ids=["pmap", "imap", "imap_unordered"])


def plain(x: int) -> int:
    if x == 17:
        raise Exception("plain")
    return x


def divide(x: int, y: int) -> float:
    return x / y


def die_at(x: int, fatal: int) -> int:
    if x == fatal:
        os.kill(os.getpid(), 9)
    return x


def slow_die_at(x: int) -> int:
    time.sleep(0.002)  # long enough to be entered on the board alone
    return die_at(x, 17)


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


# --- errors of a map -----------------------------------------------------------------------------


@each_map
@pytest.mark.parametrize("more", [{}, {"batch_size": 8}, {"distributed": False}])
def test_an_error_says_which_item(pids: list[int], run: Any, more: dict[str, Any]) -> None:
    with pytest.raises(RemoteException) as caught:
        run(plain, range(40), **more)
    assert (caught.value.index, caught.value.item) == (17, 17)  # type: ignore[attr-defined]
    assert "In item 17 of the map: 17" in notes(caught.value)
    with pytest.raises(ZeroDivisionError) as divided:
        run(divide, range(40), [1] * 5 + [0] + [1] * 34, **more)
    assert (divided.value.index, divided.value.item) == (5, (5, 0))  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(divided.value))
    assert copy.index == 5
    assert "item 5" in notes(copy)


@pytest.mark.parametrize("pool", [WorkerPool, CachingPool])
def test_with_a_pool(pids: list[int], pool: Any) -> None:
    for _ in range(2):
        with pytest.raises(RemoteException) as caught:
            pmap(plain, range(40), pool=pool(pids))
        assert caught.value.index == 17  # type: ignore[attr-defined]


def test_a_long_item_is_shown_in_short(pids: list[int]) -> None:
    with pytest.raises(TypeError) as caught:
        pmap(operator.index, [np.zeros(100_000), ["x"] * 100_000])
    assert len(notes(caught.value)) < 200
    assert len(caught.value.item) == 100_000  # type: ignore[attr-defined]


class Own(Exception):
    """An exception whose attributes have our names."""

    def __init__(self, index: str) -> None:
        super().__init__(index)
        self.index = index


def own(x: int) -> None:
    raise Own("mine")


@pytest.mark.parametrize("more", [{}, {"distributed": False}])
def test_attributes_of_the_users_stay(pids: list[int], more: dict[str, Any]) -> None:
    with pytest.raises(Own) as caught:
        pmap(own, [5], **more)
    assert caught.value.index == "mine"
    assert "item 0 of the map: 5" in notes(caught.value)


def test_what_cannot_be_pickled_is_named(pids: list[int]) -> None:
    with pytest.raises(TypeError, match="pickle") as caught:
        pmap(abs, [1] * 30 + [threading.Lock()] + [1] * 30)
    assert caught.value.index == 30  # type: ignore[attr-defined]


def test_retry_check_sees_the_item(pids: list[int]) -> None:
    seen: list[Any] = []
    with pytest.raises(RemoteException) as caught:
        pmap(plain, range(20), retry_delays=[0, 0], retry_check=lambda e: seen.append(e) or True)
    assert [error.index for error in seen] == [17, 17]
    assert notes(caught.value).count("item 17") == 1


@each_map
@pytest.mark.parametrize("more", [{}, {"batch_size": 8}, {"distributed": False}])
def test_on_error_is_told_the_item(pids: list[int], run: Any, more: dict[str, Any]) -> None:
    found = run(plain, range(40), on_error=lambda e: (e.index, e.item, *e.__notes__), **more)
    assert (17, 17, "In item 17 of the map: 17") in found
    assert len(found) == 40


def test_one_error_that_is_raised_again_and_again(pids: list[int]) -> None:
    kept = {"error": ValueError("always the same")}

    def fail(_: int) -> None:
        raise kept["error"]

    told = lambda e: (e.index, e.item, *e.__notes__)
    for more in ({"batch_size": 5}, {"distributed": False}):
        found = pmap(fail, range(10, 15), on_error=told, pool=WorkerPool(pids[:1]), **more)
        assert found == [(k, 10 + k, f"In item {k} of the map: {10 + k}") for k in range(5)]


@pytest.mark.parametrize("chunksize", [1, 3])
def test_a_map_in_an_item_of_a_map(pids: list[int], chunksize: int) -> None:
    inner, outer = pids[0], pids[1]

    def divide_all(x: int) -> list[float]:
        with hpcdist.Executor([inner]) as executor:
            return list(executor.map(divide, [x, x, x, x], [1, 2, 3, x], chunksize=chunksize))

    with hpcdist.Executor([outer]) as executor:
        for run in (
            lambda: list(executor.map(divide_all, [5, 0, 6], chunksize=chunksize)),
            lambda: pmap(divide_all, [5, 0, 6], pool=WorkerPool([outer])),
        ):
            with pytest.raises(ZeroDivisionError) as caught:
                run()
            assert (caught.value.index, caught.value.item) == (1, 0)  # type: ignore[attr-defined]
            assert notes(caught.value) == "In item 1 of the map: 0"


def test_an_error_of_on_error(pids: list[int]) -> None:
    with pytest.raises(KeyError) as caught:
        pmap(plain, range(40), on_error=lambda e: dict[str, int]()[str(e)])
    assert caught.value.index == 17  # type: ignore[attr-defined]


# --- errors of a loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("items", [range(40), list(range(40)), np.arange(40)])
def test_an_error_of_a_loop(pids: list[int], items: Any) -> None:
    with pytest.raises(RemoteException) as caught:
        distributed(items, operator.add)(plain)
    assert (caught.value.index, caught.value.item) == (17, 17)  # type: ignore[attr-defined]
    assert "In item 17 of the loop: " in str(caught.value)
    with pytest.raises(RemoteException) as waited:
        distributed(items)(plain).wait()
    assert waited.value.index == 17  # type: ignore[attr-defined]


def test_errors_of_several_parts(pids: list[int]) -> None:
    with pytest.raises(CompositeException) as caught:
        distributed(range(30), operator.add)(lambda i: 1 // (i % 15))
    assert [error.index for error in caught.value.exceptions] == [0, 15]  # type: ignore[attr-defined]


def test_a_death_in_a_loop_says_which_part(fresh: Callable[..., list[int]]) -> None:
    with pytest.raises(ProcessExitedException) as caught:
        distributed(range(30), operator.add, pids=fresh(3))(lambda i: die_at(i, 17))
    assert "the items 10 to 19 of the loop" in notes(caught.value)


# --- deaths --------------------------------------------------------------------------------------


def test_a_death_says_which_item_ended_which_workers(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(4)
    with pytest.raises(ProcessExitedException) as caught:
        pmap(lambda x: die_at(x, 17), range(40), pool=WorkerPool(pids))
    error: Any = caught.value
    assert (error.index, error.item) == (17, 17)
    ended = set(pids) - set(hpcdist.workers())
    assert len(ended) == 3
    assert "Item 17 of the map ended workers" in notes(error)
    assert all(str(pid) in notes(error) for pid in ended)


def test_on_exit_raise_says_it_too(fresh: Callable[..., list[int]]) -> None:
    pool = WorkerPool(fresh(2))
    with pytest.raises(ProcessExitedException) as caught:
        pmap(slow_die_at, range(40), on_exit="raise", pool=pool)
    assert caught.value.index == 17  # type: ignore[attr-defined]
    assert f"Item 17 of the map ended worker {caught.value.pid}: 17" in notes(caught.value)


ALL_DIED = """
import hpcdist, operator, os
from hpcdist import *
hpcdist.addprocs(2)
def die(x):
    if myid() == 1: raise SystemExit("process 1 has run the item")
    if x == 3: os.kill(os.getpid(), 9)
    return x
for run in (
    lambda: pmap(die, range(9)),
    lambda: pmap(die, [3]),
    lambda: list(imap(die, [3])),
    lambda: pmap(die, [3], pool=default_worker_pool()),
    lambda: list(Executor().map(die, [3])),
    lambda: distributed([3], operator.add)(die),
):
    try:
        run()
        print("no error")
    except ProcessExitedException as error:
        print(error.why, getattr(error, "index", None), *error.__notes__, sep=" | ")
print(pmap(abs, [-1], distributed=False))
hpcdist.shutdown()
print(pmap(lambda x: (x, myid()), [7]), workers())
hpcdist.rmprocs(hpcdist.addprocs(1))
print(pmap(lambda x: (x, myid()), [8]), distributed([4], operator.add)(abs))
"""


def test_when_all_have_died_nothing_runs_here(script: Callable[..., Any]) -> None:
    done = script(ALL_DIED)
    assert done.rc == 0, done.err
    first, *others, spared, alone, removed = done.out.splitlines()
    assert first.startswith("killed by SIGKILL | 3 | Item 3 of the map ended workers ")
    assert len(others) == 5
    for line in others:
        assert line.startswith("killed by SIGKILL |"), line
    assert sum("No worker is left" in line for line in others) == 5
    assert (spared, alone, removed) == ("[1]", "[(7, 1)] [1]", "[(8, 1)] 4")


def test_a_pool_whose_members_died(fresh: Callable[..., list[int]], pids: list[int]) -> None:
    new = fresh(1)
    pool = WorkerPool(new)
    os_pid = remotecall_fetch(os.getpid, new[0])
    kill9(os_pid)
    eventually(lambda: new[0] not in hpcdist.workers())
    for run in MAPS:
        with pytest.raises(ProcessExitedException, match=f"Worker {new[0]}"):
            run(abs, [1], pool=pool)
    removed = WorkerPool(fresh(1))
    hpcdist.rmprocs(removed.workers())
    assert pmap(lambda _: hpcdist.myid(), [0], pool=removed) == [1]


KILLER = """
import hpcdist, os, sys, time
from hpcdist import *
(pid,) = hpcdist.addprocs(1)
def die(x):
    if myid() != 1:
        print("killed by", x, file=open(sys.argv[1], "w"), flush=True)
        os.kill(os.getpid(), 9)
    while pid in workers():
        time.sleep(0.01)
    print("here", x, flush=True)
def run():
    pmap(die, range(20), pool=WorkerPool([1, pid]))
try: run()
except ProcessExitedException as error: print("raised", error.index, flush=True)
"""


def test_process_1_is_not_given_what_has_killed(script: Callable[..., Any], tmp_path: Path) -> None:
    done = script(KILLER.replace("sys.argv[1]", repr(str(tmp_path / "log"))))
    assert done.rc == 0, done.err
    killer = (tmp_path / "log").read_text().split()[-1]
    lines = done.out.splitlines()
    assert lines[-1] == f"raised {killer}"
    assert f"here {killer}" not in lines
