"""Objects that live on a worker: calls in order, attributes, references, and what ends them."""

import asyncio
import gc
import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    HpcdistError,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    RemoteObject,
    everywhere,
    myid,
    pmap,
    remotecall,
    remotecall_fetch,
    workers,
)
from tests.cluster.test_futures import block
from tests.helpers import eventually, kill9

pytestmark = pytest.mark.any_mpi

LARGE = 16 << 20  # bytes

# --- what the workers run; they import this module -----------------------------------------------


class Log:
    """Keeps what it is given, and knows who else is in it at the same moment."""

    ended: list[Any] = []  # noqa: RUF012 - the first item of each that has ended

    def __init__(self, *first: Any, fail: bool = False) -> None:
        if fail:
            raise LookupError("no log")
        self.items = list(first)
        self.inside = self.most = 0
        self.small, self.large = np.ones(10_000), np.ones(LARGE // 8)
        self.other: Any = None

    def add(self, item: Any) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        threading.Event().wait(0)  # other threads may run
        self.items.append(item)
        self.inside -= 1
        return len(self.items)

    async def add_soon(self, item: Any) -> None:
        self.items.append(item)

    def add_later(self, item: Any, ticket: RemoteChannel) -> None:
        self.items.append(ticket.take())
        self.items.append(item)

    def meet(self, other: Any) -> None:
        self.other = other

    def ask(self, depth: int) -> int:
        return depth if depth == 0 else 1 + self.other.ask(depth - 1)

    def where(self) -> int:
        return myid()

    def get(self, name: str) -> str:
        return f"its own: {name}"

    def fail(self) -> None:
        raise ZeroDivisionError("in a method")

    def hold(self, gate: str) -> str:
        return block(gate)

    def change(self, value: float) -> None:
        self.large[0] = value

    def total(self, array: Any) -> float:
        return float(array.sum())

    def end(self) -> None:
        os._exit(7)

    def __del__(self) -> None:
        Log.ended.extend(getattr(self, "items", [])[:1])


class Gate:
    """Coroutines that wait for each other."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def pass_through(self) -> str:
        await self.opened.wait()
        return "through"

    async def open(self) -> None:
        self.opened.set()


def ended_logs(first: str) -> int:
    """How many have ended that began with this item: those of other tests end when they end."""
    gc.collect()
    return Log.ended.count(first)


def add_to(log: RemoteObject, item: Any) -> Any:
    return log.add(item)


def keep(thing: Any) -> None:
    KEPT.append(thing)


def keep_none() -> None:
    KEPT.clear()


KEPT: list[Any] = []


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(params=["elsewhere", "here"])
def where(request: pytest.FixtureRequest, pids: list[int]) -> int:
    return pids[0] if request.param == "elsewhere" else 1


def test_methods_run_where_the_object_lives(where: int) -> None:
    log = RemoteObject(Log, where, "a", "b")
    assert log["where"]() == where
    assert log.where == where
    assert log.add("c") == 3
    assert log.add.remotecall(item="d").fetch() == 4
    assert log.get("items") == ["a", "b", "c", "d"]
    assert log.get("items.__class__.__name__") == "list"
    assert log["get"]("x") == "its own: x"
    assert repr(log) == f"<RemoteObject of class Log on process {where}>"
    assert repr(log.add) == f"<method add of {log!r}>"


def test_without_a_pid_the_next_worker_has_it(pids: list[int]) -> None:
    assert {RemoteObject(Log).where for _ in workers()} == set(workers())


def test_what_is_no_class_or_no_process(pids: list[int]) -> None:
    with pytest.raises(TypeError, match="a class is needed to make a remote object, not 3"):
        RemoteObject(3, pids[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no process with id 999999 exists"):
        RemoteObject(Log, 999_999)  # which no worker has had


def test_an_error_of_the_constructor_is_raised_at_construction(where: int) -> None:
    with pytest.raises(LookupError, match="no log") as info:
        RemoteObject(Log, where, fail=True)
    assert isinstance(info.value, RemoteException)
    assert info.value.pid == where


def test_errors_of_methods_and_of_names(where: int) -> None:
    log = RemoteObject(Log, where)
    with pytest.raises(ZeroDivisionError, match="in a method") as info:
        log.fail()
    assert isinstance(info.value, RemoteException)
    with pytest.raises(ZeroDivisionError, match="in a method"):
        log.fail.remotecall().fetch()
    with pytest.raises(AttributeError, match="'Log' object has no attribute 'ad'"):
        log.ad(1)
    with pytest.raises(AttributeError, match="'nothing'"):
        log.get("nothing")
    with pytest.raises(AttributeError, match=r"is called as obj\['_add'\]"):
        log._add(1)
    with pytest.raises(AttributeError, match="set by a method"):
        log.items = []
    with pytest.raises(TypeError, match="not iterable"):
        iter(log)  # type: ignore[call-overload]


def test_an_argument_that_cannot_be_pickled_harms_nothing(pids: list[int]) -> None:
    log = RemoteObject(Log, pids[0])
    with pytest.raises(TypeError, match="cannot pickle"):
        log.add(threading.Lock())
    with pytest.raises(TypeError, match="cannot pickle"):
        log.add.remotecall(threading.Lock())
    assert log.add(1) == 1


@pytest.mark.parametrize("concurrency", [1, 4, None])
def test_calls_of_one_caller_come_in_order_one_at_a_time(
    fresh: Callable[..., list[int]], concurrency: int | None
) -> None:
    (pid,) = fresh(1, concurrency=concurrency)
    log = RemoteObject(Log, pid)
    last = [(log.add if k % 3 else log.add_soon).remotecall(k) for k in range(600)][-1]
    assert log.get("items") == list(range(600))
    last.fetch()
    assert log.get("most") == 1


def test_calls_of_many_callers_run_one_at_a_time(fresh: Callable[..., list[int]]) -> None:
    pid, *_ = fresh(3, concurrency=4)
    log = RemoteObject(Log, pid)
    pmap(lambda k: log.add(k), range(300))
    assert log.get("most") == 1
    assert sorted(log.get("items")) == list(range(300))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_method_that_waits_lets_the_next_one_run(
    fresh: Callable[..., list[int]], concurrency: int
) -> None:
    (pid,) = fresh(1, concurrency=concurrency)
    log, ticket = RemoteObject(Log, pid), RemoteChannel(1)
    waiting = log.add_later.remotecall("end", ticket)
    assert log.add("first") == 1
    ticket.put("ticket")
    waiting.fetch()
    assert log.get("items") == ["first", "ticket", "end"]


def test_two_objects_call_each_other(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    one, other = RemoteObject(Log, pid), RemoteObject(Log, 1)
    one.meet(other)
    other.meet(one)
    assert one.ask(7) == 7


def test_coroutines_interleave_and_take_no_turn(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    (pid,) = fresh(1)
    gate, held = RemoteObject(Gate, pid), tmp_path / "held"
    passing = [gate.pass_through.remotecall() for _ in range(3)]
    busy = remotecall(block, pid, str(held))
    eventually(lambda: Path(f"{held}.started").exists())
    gate.open()  # though the worker is busy
    assert [f.fetch() for f in passing] == ["through"] * 3
    held.touch()
    busy.fetch()


def test_a_coroutine_comes_after_the_methods_before_it(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    (pid,) = fresh(1)
    log, held = RemoteObject(Log, pid), tmp_path / "held"
    log.hold.remotecall(str(held))
    soon = log.add_soon.remotecall("soon")
    log.add.remotecall("behind")
    eventually(lambda: Path(f"{held}.started").exists())
    assert not soon.done()
    held.touch()
    soon.fetch()
    assert log.get("items") == ["soon", "behind"]


def test_a_call_that_has_not_started_can_be_cancelled(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    (pid,) = fresh(1, concurrency=2)
    log, held = RemoteObject(Log, pid), tmp_path / "held"
    log.hold.remotecall(str(held))
    never, then = log.add.remotecall("never"), log.add.remotecall("then")
    eventually(lambda: Path(f"{held}.started").exists())
    assert not never.running()
    assert never.cancel()
    held.touch()
    assert then.fetch() == 1
    assert log.get("items") == ["then"]


def test_an_array_comes_out_of_the_object_itself(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    log = RemoteObject(Log, pid)
    log.get("small")  # whatever is made once has been made
    before = remotecall_fetch(peak, pid)
    array = log.get("large")
    assert remotecall_fetch(peak, pid) - before < LARGE // 2
    log.change(5.0)
    assert array[0] == 1.0
    assert log.get("large")[0] == 5.0
    assert log.total(array) == array.sum()
    assert log.total.remotecall(array=array).fetch() == array.sum()


def test_on_its_own_process_nothing_is_copied() -> None:
    log = RemoteObject(Log, 1)
    assert log.get("large") is log.get("large")


def test_a_handle_travels_and_means_the_same_object(pids: list[int]) -> None:
    log = RemoteObject(Log, pids[0])
    assert remotecall_fetch(add_to, pids[1], log, "from there") == 1
    assert remotecall_fetch(add_to, pids[0], log, "from its own") == 2
    assert remotecall_fetch(lambda x: x, pids[1], log) is log
    channel = RemoteChannel(1, pids[1])
    channel.put(log.add)
    assert channel.take()("by its method") == 3
    assert log.add(log) == 4  # a handle inside the object itself
    assert log.get("items")[3] == log
    log.free()


def test_the_object_goes_with_the_last_handle(pids: list[int]) -> None:
    owner, other = pids[:2]
    log = RemoteObject(Log, owner, "two handles")
    remotecall_fetch(keep, other, log)
    log.add.remotecall(1)
    del log
    gc.collect()
    remotecall_fetch(keep_none, pids[2])  # messages have gone round
    assert remotecall_fetch(ended_logs, owner, "two handles") == 0
    remotecall_fetch(keep_none, other)
    eventually(lambda: remotecall_fetch(ended_logs, owner, "two handles") == 1)


def test_a_call_under_way_outlives_the_handle(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    futures = [RemoteObject(Log, pid, "no handle").add.remotecall(k) for k in range(10)]
    assert [f.fetch() for f in futures] == [2] * 10
    eventually(lambda: remotecall_fetch(ended_logs, pid, "no handle") == 10)


def test_use_after_free(where: int) -> None:
    with RemoteObject(Log, where) as log:
        method = log.add
        (copy,) = remotecall_fetch(keep_and_return, workers()[-1], log)
    for use in (
        lambda: log.add(1),
        lambda: log.add.remotecall(1),
        lambda: method(1),
        lambda: log.get("items"),
        lambda: pickle.dumps(log),
        lambda: remotecall_fetch(use_kept, workers()[-1]),
        lambda: remotecall_fetch(start_kept, workers()[-1]),
    ):
        with pytest.raises(HpcdistError, match="this remote object has been freed"):
            use()
    log.free()
    remotecall_fetch(keep_none, workers()[-1])
    assert copy


def keep_and_return(log: RemoteObject) -> list[bool]:
    KEPT.append(log)
    return [True]


def use_kept() -> None:
    KEPT[-1].add(1)


def start_kept() -> None:
    KEPT[-1].add.remotecall(1).fetch()


def test_it_dies_with_its_worker(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    log = RemoteObject(Log, pid)
    with pytest.raises(ProcessExitedException) as info:
        log.end()
    assert info.value.pid == pid
    for use in (lambda: log.add(1), lambda: log.add.remotecall(1), lambda: log.get("items")):
        with pytest.raises(ProcessExitedException):
            use()
    log.free()


def test_a_worker_that_is_killed_ends_the_calls_of_its_objects(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    (pid,) = fresh(1)
    log, held = RemoteObject(Log, pid), tmp_path / "held"
    futures = [log.hold.remotecall(str(held)), log.add.remotecall(1)]
    eventually(lambda: Path(f"{held}.started").exists())
    kill9(next(s.os_pid for s in hpcdist.status() if s.pid == pid))
    for future in futures:
        with pytest.raises(ProcessExitedException):
            future.fetch()


def test_interrupt_ends_a_method(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    (pid,) = fresh(1)
    log, held = RemoteObject(Log, pid), tmp_path / "held"
    future = log.hold.remotecall(str(held))
    eventually(lambda: Path(f"{held}.started").exists())
    hpcdist.interrupt(pid)
    with pytest.raises(RemoteException) as info:
        future.fetch()
    assert isinstance(info.value.cause, KeyboardInterrupt)
    assert log.add(1) == 1


CLASS_OF_MAIN = """
import hpcdist

class Counter:
    def __init__(self, start):
        self.n = start
    def up(self, by=1):
        self.n += by
        return self.n

if __name__ == "__main__":
    hpcdist.addprocs(1)
    counter = hpcdist.RemoteObject(Counter, 2, 10)
    print(counter.up(), counter.up(by=5), counter.get("n"))
"""


def test_a_class_of_main_goes_by_value(script: Callable[..., Any]) -> None:
    done = script(CLASS_OF_MAIN)
    assert (done.rc, done.out.split()) == (0, ["11", "16", "16"]), done.err


def test_an_async_function_makes_one(where: int) -> None:
    assert RemoteObject(made_slowly, where, "x").get("items") == ["x"]


async def made_slowly(item: str) -> Log:
    await asyncio.sleep(0)
    return Log(item)


def test_everywhere_and_objects_share_the_turns(pids: list[int]) -> None:
    log = RemoteObject(Log, pids[0])
    everywhere.call(add_to, log, "all", pids=pids)
    assert log.get("items") == ["all"] * 3
