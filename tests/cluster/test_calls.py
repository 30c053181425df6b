"""Remote calls: who runs them, in which order, with what, and what comes back."""

import asyncio
import functools
import operator
import os
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    ANY,
    ChannelClosed,
    Future,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    everywhere,
    fetchany,
    fetchfrom,
    myid,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    rmprocs,
    spawn,
    spawnat,
    workers,
)

LONG = 30.0  # seconds after which a call that ought to return is taken for lost

# --- what the workers run; they import this module -----------------------------------------------

ORDER: list[Any] = []
BARRIERS: dict[int, threading.Barrier] = {}
GAUGE = {"now": 0, "peak": 0}
GAUGE_LOCK = threading.Lock()


def identity(value: Any) -> Any:
    return value


def arguments(*args: Any, **kw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kw


def append(value: Any) -> None:
    ORDER.append(value)


def appended() -> list[Any]:
    values = ORDER.copy()
    ORDER.clear()
    return values


def append_many(target: int, tag: str, n: int) -> None:
    for i in range(n):
        remote_do(append, target, (tag, i))
    remotecall_wait(myid, target)


def hop(path: list[int]) -> list[int]:
    return [myid(), *remotecall_fetch(hop, path[0], path[1:])] if path else [myid()]


def shares_with_itself() -> bool:
    value: list[int] = []
    return remotecall_fetch(identity, myid(), value) is value


def divide(left: float, right: float) -> float:
    return left / right


def divide_there(pid: int) -> float:
    return remotecall_fetch(divide, pid, 1, 0)


def raise_(exc: BaseException | type[BaseException], *args: Any) -> None:
    raise exc(*args) if isinstance(exc, type) else exc


def take_from_closed() -> None:
    channel = hpcdist.Channel(1)
    channel.close()
    channel.take()


def fetch_too_long() -> None:
    Future().fetch(timeout=0.01)


def raise_with_a_lock() -> None:
    raise ValueError("with a lock", threading.Lock())


class OnlyThere(Exception):
    """Rebuilt nowhere but in the process it was made in."""

    def __reduce__(self) -> tuple[Any, ...]:
        return explode_elsewhere, (os.getpid(),)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return explode_elsewhere, (os.getpid(),)


def explode_elsewhere(home: int) -> Bomb:
    if os.getpid() != home:
        raise RuntimeError("not here")
    return Bomb()


class Counter:
    def __init__(self, start: int) -> None:
        self.start = start

    def plus(self, n: int) -> int:
        return self.start + n

    def __call__(self, n: int) -> int:
        return self.start - n


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def describe(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), array.flags.f_contiguous, float(array.sum())


async def nap(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return myid()


async def await_it(future: Future) -> Any:
    return await future


def meet(n: int) -> None:
    """Return when `n` calls are in here at once."""
    BARRIERS.setdefault(n, threading.Barrier(n)).wait(LONG)


def measured() -> int:
    with GAUGE_LOCK:
        GAUGE["now"] += 1
        GAUGE["peak"] = max(GAUGE.values())
    time.sleep(0.01)
    with GAUGE_LOCK:
        GAUGE["now"] -= 1
    return GAUGE["peak"]


# --- the calls -----------------------------------------------------------------------------------


def test_remotecall(pids: list[int]) -> None:
    future = remotecall(divide, pids[1], 6, right=3)
    assert isinstance(future, Future)
    assert (future.where, future.whence) == (pids[1], 1)
    assert future.fetch(timeout=LONG) == 2


def test_remotecall_fetch(pids: list[int]) -> None:
    assert [remotecall_fetch(myid, pid) for pid in pids] == pids


def test_remotecall_wait(pids: list[int]) -> None:
    future = remotecall_wait(myid, pids[0])
    assert future.isready()
    assert future.fetch() == pids[0]
    with pytest.raises(ZeroDivisionError):
        remotecall_wait(divide, pids[0], 1, 0)


def test_remote_do(pids: list[int]) -> None:
    assert remote_do(append, pids[0], "done") is None
    assert remotecall_fetch(appended, pids[0]) == ["done"]


@pytest.mark.parametrize("call", [remotecall, remotecall_fetch, remotecall_wait])
def test_keywords_of_any_name_reach_the_function(call: Callable[..., Any], pids: list[int]) -> None:
    keywords = dict.fromkeys(["f", "where", "p", "pool", "self", "timeout", "pid", "args", "kw"], 1)
    assert hpcdist.fetch(call(arguments, pids[0], "a", **keywords)) == (("a",), keywords)


def test_any_goes_round(pids: list[int]) -> None:
    for where in (ANY, "any"):
        first = [remotecall_fetch(myid, where) for _ in workers()]
        second = [remotecall_fetch(myid, where) for _ in workers()]
        assert sorted(first) == sorted(workers()) == sorted(pids)
        assert first == second


def test_spawn_and_its_relatives(pids: list[int]) -> None:
    assert spawnat(pids[0], divide, 1, right=2).fetch() == 0.5
    assert fetchfrom(pids[0], divide, 1, right=2) == 0.5
    assert spawn(divide, 1, right=2).fetch() == 0.5
    assert fetchany(divide, 1, right=2) == 0.5
    assert spawn(myid).fetch() in pids


def test_a_pool_may_stand_for_a_pid(pids: list[int]) -> None:
    pool = hpcdist.WorkerPool(pids[1:2])
    assert remotecall_fetch(myid, pool) == pids[1]
    assert remotecall(myid, pool).fetch() == pids[1]
    assert hpcdist.remote(myid, pool)() == pids[1]


def test_calls_to_oneself_share_the_objects(pids: list[int]) -> None:
    value: list[int] = []
    remotecall_fetch(value.append, 1, 3)
    assert value == [3]
    assert remotecall_fetch(identity, 1, value) is value
    assert remotecall(identity, 1, value).fetch() is value
    assert remotecall_fetch(shares_with_itself, pids[0])
    lock = threading.Lock()  # No pickling, so no need to be picklable.
    assert remotecall_fetch(identity, 1, lock) is lock


def test_calls_to_pid_1_leave_its_main_thread_alone(pids: list[int]) -> None:
    assert not remotecall_fetch(on_main_thread, 1)
    assert remotecall_fetch(on_main_thread, pids[0])


def test_calls_that_come_together_run_on_the_main_thread(pids: list[int]) -> None:
    """The first of them wakes it; the second finds it awake, though it runs nothing yet."""
    for _ in range(20):
        calls = [remotecall(on_main_thread, pids[0]) for _ in range(20)]
        assert all(call.fetch(LONG) for call in calls)


def test_errors_of_a_call_to_oneself_are_remote_too() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        remotecall_fetch(divide, 1, 1, 0)
    assert isinstance(caught.value, RemoteException)
    assert caught.value.pid == 1


def test_calls_nest_in_any_direction(pids: list[int]) -> None:
    a, b, c = pids
    for path in ([a, b, c, a], [a, 1, b, 1, a], [1, a, a, 1, 1, c]):
        assert remotecall(hop, path[0], path[1:]).fetch(timeout=LONG) == path


def test_calls_of_one_sender_start_in_order(pids: list[int]) -> None:
    for i in range(500):
        (remote_do if i % 2 else remotecall)(append, pids[0], i)
    assert remotecall_fetch(appended, pids[0]) == list(range(500))


def test_order_is_kept_for_each_of_several_senders(pids: list[int]) -> None:
    target, *senders = pids
    sent = [remotecall(append_many, pid, target, str(pid), 200) for pid in senders]
    append_many(target, "1", 200)
    for future in sent:
        future.fetch(timeout=LONG)
    arrived = remotecall_fetch(appended, target)
    for tag in ("1", *map(str, senders)):
        assert [i for sender, i in arrived if sender == tag] == list(range(200))


@pytest.mark.parametrize("call", [remotecall, remotecall_fetch, remotecall_wait, remote_do])
def test_unknown_pid(call: Callable[..., Any], pids: list[int]) -> None:
    for pid in (99999, 0, -1):
        with pytest.raises(ValueError, match=f"no process with id {pid} exists"):
            call(myid, pid)
    with pytest.raises(ValueError, match="no process with id 99999 exists") as caught:
        remotecall_fetch(hop, pids[0], [99999])
    assert isinstance(caught.value, RemoteException)


@pytest.mark.parametrize("call", [remotecall, remotecall_fetch, remotecall_wait, remote_do])
def test_dead_pid(call: Callable[..., Any], fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    rmprocs(pid)
    with pytest.raises(ProcessExitedException) as caught:
        call(myid, pid)
    assert caught.value.pid == pid


# --- what cannot travel --------------------------------------------------------------------------


@pytest.mark.parametrize("call", [remotecall, remotecall_fetch, remotecall_wait, remote_do])
def test_argument_that_cannot_be_pickled(call: Callable[..., Any], pids: list[int]) -> None:
    for value in (threading.Lock(), [bytes(10**6), np.zeros(10**6), threading.Lock()]):
        with pytest.raises((TypeError, pickle.PicklingError)):
            call(identity, pids[0], value)
        assert remotecall(identity, pids[0], "still here").fetch(timeout=LONG) == "still here"


def test_result_that_cannot_be_pickled(pids: list[int]) -> None:
    os_pid = remotecall_fetch(os.getpid, pids[0])
    future = remotecall(threading.Lock, pids[0])
    for _ in range(2):
        with pytest.raises(RemoteException):
            future.fetch(timeout=LONG)
    assert remotecall_fetch(os.getpid, pids[0]) == os_pid


def test_argument_that_cannot_be_unpickled(pids: list[int]) -> None:
    os_pid = remotecall_fetch(os.getpid, pids[0])
    with pytest.raises(RemoteException, match="not here"):
        remotecall(identity, pids[0], [bytes(10**6), Bomb()]).fetch(timeout=LONG)
    assert remotecall_fetch(os.getpid, pids[0]) == os_pid


def test_result_that_cannot_be_unpickled(pids: list[int]) -> None:
    with pytest.raises(Exception, match="not here"):
        remotecall(Bomb, pids[0]).fetch(timeout=LONG)
    assert remotecall_fetch(myid, pids[0]) == pids[0]


def test_missing_module(pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("only_in_the_driver")
    exec("def f(): pass", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ModuleNotFoundError) as caught:
        remotecall(module.f, pids[0]).fetch(timeout=LONG)
    assert isinstance(caught.value, RemoteException)
    assert remotecall_fetch(myid, pids[0]) == pids[0]


# --- errors --------------------------------------------------------------------------------------


def test_error_of_the_function(pids: list[int]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        remotecall_fetch(divide, pids[0], 1, 0)
    error = caught.value
    assert isinstance(error, RemoteException)
    assert error.pid == pids[0]
    assert type(error.cause) is ZeroDivisionError
    assert str(error).startswith(f"On worker {pids[0]}:\nZeroDivisionError: division by zero\n")
    assert "in divide" in error.traceback
    assert error.traceback.strip() in str(error)


def test_nested_errors_nest(pids: list[int]) -> None:
    with pytest.raises(RemoteException) as caught:
        remotecall_fetch(divide_there, pids[0], pids[1])
    inner = caught.value.cause
    assert isinstance(inner, RemoteException)
    assert isinstance(inner, ZeroDivisionError)
    assert (caught.value.pid, inner.pid) == (pids[0], pids[1])


def test_returning_an_exception_is_not_raising_it(pids: list[int]) -> None:
    assert repr(remotecall_fetch(identity, pids[0], ValueError("x"))) == "ValueError('x')"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_exits_and_signals_of_the_function_stay_there(
    kind: type[BaseException], pids: list[int]
) -> None:
    for where in (pids[0], 1):
        with pytest.raises(RemoteException) as caught:
            remotecall_fetch(raise_, where, kind, 3)
        assert type(caught.value) is RemoteException
        assert type(caught.value.cause) is kind
    with pytest.raises(RemoteException):
        remotecall_fetch(sys.exit, pids[0], 3)
    assert remotecall_fetch(myid, pids[0]) == pids[0]


@pytest.mark.parametrize(
    ("function", "args", "cause"),
    [
        (raise_, (TimeoutError, "theirs"), TimeoutError),
        (raise_, (ChannelClosed,), ChannelClosed),
        (raise_, (ProcessExitedException, 3), ProcessExitedException),
        (take_from_closed, (), ChannelClosed),
        (fetch_too_long, (), TimeoutError),
    ],
)
def test_errors_like_ours_from_the_function_are_plain(
    function: Callable[..., Any], args: tuple[Any, ...], cause: type, pids: list[int]
) -> None:
    with pytest.raises(RemoteException) as caught:
        remotecall_fetch(function, pids[0], *args)
    assert type(caught.value) is RemoteException
    assert type(caught.value.cause) is cause


def test_exceptions_that_cannot_travel_are_named(pids: list[int]) -> None:
    os_pid = remotecall_fetch(os.getpid, pids[0])
    with pytest.raises(RemoteException, match="with a lock") as caught:
        remotecall_fetch(raise_with_a_lock, pids[0])
    assert "ValueError" in str(caught.value.cause)
    with pytest.raises(RemoteException, match="in pieces") as caught:
        remotecall_fetch(raise_, pids[0], OnlyThere, "in pieces")
    assert "OnlyThere" in str(caught.value.cause)
    assert remotecall_fetch(os.getpid, pids[0]) == os_pid


# --- functions -----------------------------------------------------------------------------------


def test_callables_of_all_kinds(pids: list[int]) -> None:
    offset = 10

    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    def default(n: int, more: int = 1) -> int:
        return n + more + offset

    calls: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (lambda: 3, (), 3),
        (lambda n: n + offset, (1,), 11),
        (factorial, (5,), 120),
        (default, (1,), 12),
        (functools.partial(default, more=2), (1,), 13),
        (Counter(5).plus, (1,), 6),
        (Counter(5), (1,), 4),
        (len, ("abc",), 3),
        (operator.add, (1, 2), 3),
        (str.upper, ("abc",), "ABC"),
        (Counter, (1,), None),
    ]
    for pid in (*pids, 1):
        for f, args, expected in calls:
            result = remotecall_fetch(f, pid, *args)
            assert isinstance(result, Counter) if f is Counter else result == expected


def test_functions_of_modules_go_by_reference(pids: list[int]) -> None:
    ORDER.append("here")
    try:
        assert remotecall_fetch(appended, pids[0]) == []
    finally:
        ORDER.clear()


def test_closures_carry_their_present_values(pids: list[int]) -> None:
    number, things = 1, [1]

    def captured() -> tuple[int, list[int]]:
        return number, things

    assert remotecall_fetch(captured, pids[0]) == (1, [1])
    number = 2
    things.append(2)
    assert remotecall_fetch(captured, pids[0]) == (2, [1, 2])
    number = 1
    assert remotecall_fetch(captured, pids[0]) == (1, [1, 2])
    assert remotecall_fetch(captured, pids[1]) == (1, [1, 2])


IN_MAIN = """
import hpcdist
from hpcdist import everywhere, myid, remotecall, remotecall_fetch
hpcdist.init(2)
"""


@pytest.mark.parametrize("ranks", [None, 3])
def test_globals_of_main(script: Callable[..., Any], ranks: int | None) -> None:
    text = """
        import math as m
        x = 10
        data = [1]

        def helper():
            return x * 2

        def use():
            return helper() + m.floor(0.5) + len(data)

        def even(n):
            return n == 0 or odd(n - 1)

        def odd(n):
            return n != 0 and even(n - 1)

        assert remotecall_fetch(use, 2) == 21
        x = 20
        assert remotecall_fetch(use, 2) == 41
        x = 10
        assert remotecall_fetch(use, 2) == 21, "back to an old value"
        data.append(2)
        assert remotecall_fetch(use, 2) == 22
        assert remotecall_fetch(use, 3) == 22, "a second worker"

        def helper():
            return 0

        assert remotecall_fetch(use, 2) == 2, "redefined"
        assert remotecall_fetch(even, 2, 10) and not remotecall_fetch(even, 2, 7)

        def relay():
            return remotecall_fetch(use, 3), remotecall_fetch(lambda: x, 1)

        assert remotecall_fetch(relay, 2) == (2, 10), "onwards from a worker"
    """
    done = script(IN_MAIN + dedent(text), ranks=ranks)
    assert done.rc == 0, done.err


@pytest.mark.parametrize("ranks", [None, 3])
def test_main_of_the_worker(script: Callable[..., Any], ranks: int | None) -> None:
    text = """
        def remember(value):
            global kept
            kept = value

        def recall():
            return kept

        remotecall_fetch(remember, 2, "a")
        remotecall_fetch(remember, 3, "b")
        assert remotecall_fetch(recall, 2) == "a"
        assert remotecall_fetch(recall, 3) == "b"
        assert "kept" not in globals()

        everywhere("x = 3", pids=[2])
        assert remotecall_fetch(lambda: x, 2) == 3
        try:
            remotecall_fetch(lambda: x, 3)
        except NameError as exc:
            assert exc.pid == 3
        else:
            raise SystemExit("x is defined on 3")
        assert everywhere("kept", pids=2) == "a"
    """
    done = script(IN_MAIN + dedent(text), ranks=ranks)
    assert done.rc == 0, done.err


@pytest.mark.parametrize("ranks", [None, 3])
def test_classes_of_main(script: Callable[..., Any], ranks: int | None) -> None:
    text = """
        class Point:
            def __init__(self, x):
                self.x = x

            def __eq__(self, other):
                return isinstance(other, Point) and other.x == self.x

        class Mine(Exception):
            pass

        def shifted(point):
            assert isinstance(point, Point)
            return Point(point.x + 1)

        def fail():
            raise Mine("mine")

        assert remotecall_fetch(shifted, 2, Point(1)) == Point(2)
        assert type(remotecall_fetch(shifted, 2, Point(1))) is Point
        assert remotecall_fetch(Point, 3, 5) == Point(5)
        try:
            remotecall_fetch(fail, 2)
        except Mine as exc:
            assert exc.pid == 2 and exc.args == ("mine",) and type(exc.cause) is Mine
        else:
            raise SystemExit("nothing raised")
    """
    done = script(IN_MAIN + dedent(text), ranks=ranks)
    assert done.rc == 0, done.err


# --- large values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(8_000_000, dtype=np.float64),
        np.arange(1000).reshape(20, 50)[::2, ::-3],
        np.asfortranarray(np.arange(1_000_000.0).reshape(1000, 1000)),
        np.zeros((0, 3)),
        np.array(7.5),
        np.frombuffer(bytes(range(256)) * 1000, dtype=np.uint8),
    ],
    ids=["64 MB", "strided", "fortran", "empty", "scalar", "read-only"],
)
def test_arrays(array: np.ndarray, pids: list[int]) -> None:
    before = array.copy()
    assert remotecall_fetch(describe, pids[0], array)[:2] == describe(array)[:2]
    assert remotecall_fetch(describe, pids[0], array)[3] == describe(array)[3]
    returned = remotecall_fetch(identity, pids[0], array)
    assert returned.dtype == array.dtype
    np.testing.assert_array_equal(returned, array)
    np.testing.assert_array_equal(array, before)
    if array.flags.f_contiguous and array.ndim == 2 and array.size:
        assert returned.flags.f_contiguous


def test_arrays_from_worker_to_worker(pids: list[int]) -> None:
    array = remotecall_fetch(remotecall_fetch, pids[0], np.ones, pids[1], (1000, 1000))
    assert array.sum() == 1e6
    array += 1  # What has arrived belongs to whom it has arrived at.
    assert array.sum() == 2e6


def test_an_argument_sent_may_be_changed_at_once(pids: list[int]) -> None:
    array = np.zeros(4_000_000)
    future = remotecall(describe, pids[0], array)
    array += 1
    assert future.fetch(timeout=LONG)[3] == 0


def test_bytes_of_50_mb(pids: list[int]) -> None:
    data = os.urandom(1000) * 50_000
    assert remotecall_fetch(len, pids[0], data) == len(data)
    assert remotecall_fetch(identity, pids[0], data) == data


def test_many_small_and_some_large_calls_in_flight(pids: list[int]) -> None:
    array = np.arange(200_000.0)
    futures = [
        remotecall(identity, pids[i % 3], (i, array if i % 50 == 0 else None)) for i in range(1000)
    ]
    for i, future in enumerate(futures):
        number, echo = future.fetch(timeout=LONG)
        assert number == i
        assert echo is None if i % 50 else (echo == array).all()


# --- turns ---------------------------------------------------------------------------------------


def test_async_functions_interleave(pids: list[int]) -> None:
    start = time.monotonic()
    futures = [remotecall(nap, pids[0], 0.2) for _ in range(100)]
    assert [future.fetch(timeout=LONG) for future in futures] == [pids[0]] * 100
    assert time.monotonic() - start < 10  # One after the other they take 20 s.


async def coroutine_of_a_module() -> int:
    await asyncio.sleep(0)
    return myid()


class Asynchronous:
    async def method(self) -> int:
        return await coroutine_of_a_module()

    @staticmethod
    async def of_none() -> int:
        return await coroutine_of_a_module()

    async def __call__(self) -> int:
        return await coroutine_of_a_module()


def coroutine_functions() -> dict[str, Callable[[], Any]]:
    """Coroutine functions without arguments, of all kinds."""

    async def by_value() -> int:
        return await coroutine_of_a_module()

    return {
        "module": coroutine_of_a_module,
        "by value": by_value,
        "lambda": lambda: coroutine_of_a_module(),
        "partial": functools.partial(coroutine_of_a_module),
        "method": Asynchronous().method,
        "static": Asynchronous.of_none,
        "callable": Asynchronous(),
    }


@pytest.mark.parametrize("kind", coroutine_functions())
def test_async_functions_without_arguments(kind: str, pids: list[int]) -> None:
    f, pid = coroutine_functions()[kind], pids[0]
    for _ in range(2):  # the second call finds the function known
        assert remotecall_fetch(f, pid) == pid
        assert remotecall(f, pid).fetch(timeout=LONG) == pid
        assert remotecall_fetch(f, 1) == 1
        assert hpcdist.remote(f)() in pids
        assert everywhere.call(f, pids=[1, pid]) == {1: 1, pid: pid}
        assert hpcdist.Executor().submit(f).result(LONG) in pids


def test_async_functions_of_main_without_arguments(script: Callable[..., Any]) -> None:
    done = script("""
import hpcdist

async def mine():
    return hpcdist.myid()

hpcdist.addprocs(1)
print([hpcdist.remotecall_fetch(mine, 2) for _ in range(3)])
""")
    assert (done.out, done.err, done.rc) == ("[2, 2, 2]\n", "", 0)


def test_async_functions_take_no_turn(pids: list[int]) -> None:
    gate = Future(pids[0])
    pending = remotecall(await_it, pids[0], gate)
    assert remotecall(myid, pids[0]).fetch(timeout=LONG) == pids[0]
    gate.put("open")
    assert pending.fetch(timeout=LONG) == "open"


def test_one_call_at_a_time_is_the_default(pids: list[int]) -> None:
    futures = [remotecall(measured, pids[0]) for _ in range(20)]
    assert {future.fetch(timeout=LONG) for future in futures} == {1}


@pytest.mark.parametrize(("concurrency", "at_once"), [(4, 4), (None, 20)])
def test_concurrency(
    concurrency: int | None, at_once: int, fresh: Callable[..., list[int]]
) -> None:
    (pid,) = fresh(1, concurrency=concurrency)
    for future in [remotecall(meet, pid, at_once) for _ in range(at_once)]:
        future.fetch(timeout=2 * LONG)
    peaks = [remotecall(measured, pid) for _ in range(3 * at_once)]
    peak = max(future.fetch(timeout=LONG) for future in peaks)
    assert 1 < peak <= (concurrency or 3 * at_once)


@pytest.mark.parametrize(
    ("make", "block"),
    [
        (RemoteChannel, hpcdist.take),
        (RemoteChannel, hpcdist.fetch),
        (RemoteChannel, hpcdist.wait),
        (Future, hpcdist.fetch),
        (Future, hpcdist.wait),
        (Future, Future.result),
    ],
)
@pytest.mark.parametrize("owner", ["itself", "pid 1", "another"])
def test_a_call_that_waits_gives_its_turn_away(
    make: Callable[..., Any], block: Callable[..., Any], owner: str, pids: list[int]
) -> None:
    pid = pids[0]
    reference = make(pid={"itself": pid, "pid 1": 1, "another": pids[1]}[owner])
    waiting = remotecall(block, pid, reference)
    remotecall(hpcdist.put, pid, reference, 7).fetch(timeout=LONG)
    waiting.wait(timeout=LONG)
    if block is not hpcdist.wait:
        assert waiting.fetch() == 7


def test_calls_to_pid_1_that_wait_give_their_turn_away() -> None:
    gate = Future()
    waiting = remotecall(hpcdist.fetch, 1, gate)
    remotecall(hpcdist.put, 1, gate, 7).fetch(timeout=LONG)
    assert waiting.fetch(timeout=LONG) == 7


def test_sleep_lets_others_run(pids: list[int]) -> None:
    start = time.monotonic()
    # More than the 256 that may be suspended at once: the rest is queued, and none is lost.
    futures = [remotecall(hpcdist.sleep, pids[0], 0.3) for _ in range(300)]
    for future in futures:
        future.fetch(timeout=LONG)
    assert time.monotonic() - start < 20  # One after the other they take 90 s.


# --- output --------------------------------------------------------------------------------------


def test_output_and_errors_of_remote_do_are_printed(script: Callable[..., Any]) -> None:
    text = """
        from hpcdist import addprocs, remote_do, remotecall_fetch, shutdown

        addprocs(1)
        remote_do(lambda: 1 / 0, 2)
        remotecall_fetch(lambda: print("one\\ntwo"), 2)
        shutdown()
    """
    done = script(dedent(text))
    assert done.rc == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith("From worker 2:\t")] == [
        "From worker 2:\tone",
        "From worker 2:\ttwo",
    ]
    assert any(
        line.startswith("From worker 2:") and "ZeroDivisionError: division by zero" in line
        for line in done.err.splitlines()
    ), done.err
