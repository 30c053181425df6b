"""Futures: set once, cached, known by everyone who was given one."""

import asyncio
import concurrent.futures
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    Future,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    myid,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    workers,
)
from tests.helpers import eventually, kill9

LONG = 30.0  # seconds after which a wait that ought to end is taken for lost

# --- what the workers run; they import this module -----------------------------------------------

RAN: list[str] = []


def identity(value: Any) -> Any:
    return value


def fail(message: str) -> None:
    raise ValueError(message)


def outcome(f: Callable[..., Any], /, *args: Any, **kw: Any) -> Any:
    """Return what `f` returns, or the name of what it raises: our own errors arrive as they are."""
    try:
        return f(*args, **kw)
    except BaseException as exc:
        return type(exc).__name__


def block(gate: str) -> str:
    """Hold the worker's turn, as no wait of hpcdist would, until there is a file named `gate`."""
    Path(gate + ".started").touch()
    deadline = time.monotonic() + LONG
    while not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.005)
    return "released"


def ran(name: str) -> str:
    RAN.append(name)
    return name


def names_ran() -> list[str]:
    return RAN


def new_object() -> object:
    return [1]


def call_onwards(pid: int) -> Future:
    return remotecall(myid, pid)


def fetch_in(box: dict[str, list[Future]]) -> Any:
    return box["futures"][0].fetch(timeout=LONG)


def many_fetch(future: Future, n: int) -> list[Any]:
    waiting = [in_thread(future.fetch, timeout=LONG) for _ in range(n)]
    return [thread.result(LONG) for thread in waiting]


def in_thread(f: Callable[..., Any], /, *args: Any, **kw: Any) -> concurrent.futures.Future:
    """Run `f` in a thread that keeps nobody from ending, and return a future of it."""
    result: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(f(*args, **kw))
        except BaseException as exc:
            result.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return result


class Busy:
    """A worker whose turn is taken until `release`."""

    def __init__(self, pid: int, gate: Path) -> None:
        self.pid = pid
        self._gate = gate
        self.call = remotecall(block, pid, str(gate))
        eventually(Path(f"{gate}.started").exists)

    def release(self) -> None:
        self._gate.touch()


@pytest.fixture
def busy(pids: list[int], tmp_path: Path) -> Iterator[Busy]:
    """A worker whose turn is taken until the end of the test at the latest."""
    taken = Busy(pids[0], tmp_path / "gate")
    yield taken
    taken.release()
    taken.call.wait(timeout=LONG)


# --- the result of a call ------------------------------------------------------------------------


def test_identity_of_a_future(pids: list[int]) -> None:
    first, second = remotecall(myid, pids[0]), remotecall(myid, pids[0])
    assert (first.where, first.whence) == (pids[0], 1)
    assert first.id != second.id
    assert first != second
    assert len({first, second, first}) == 2
    assert hpcdist.remoteref_id(first) == (first.whence, first.id)


def test_fetch_caches(pids: list[int]) -> None:
    future = remotecall(new_object, pids[0])
    value = future.fetch()
    assert value == [1]
    assert future.fetch() is value
    assert future.result() is value
    assert hpcdist.fetch(future) is value


def test_wait_returns_the_future_and_raises_its_error(pids: list[int]) -> None:
    future = remotecall(myid, pids[0])
    assert future.wait(timeout=LONG) is future
    assert hpcdist.wait(future) is future
    wrong = remotecall(fail, pids[0], "wrong")
    for wait in (wrong.wait, lambda: hpcdist.wait(wrong)):
        with pytest.raises(ValueError, match="wrong"):
            wait()


def test_an_error_is_raised_by_each_fetch(pids: list[int]) -> None:
    future = remotecall(fail, pids[0], "wrong")
    texts = []
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong") as caught:
            future.fetch(timeout=LONG)
        assert isinstance(caught.value, RemoteException)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert future.isready()
    error = future.exception(timeout=LONG)
    assert isinstance(error, RemoteException)
    assert str(error) == texts[0]
    assert remotecall(myid, pids[0]).exception(timeout=LONG) is None


def test_states(busy: Busy) -> None:
    future = remotecall(ran, busy.pid, "later")
    assert not future.isready()
    assert not hpcdist.isready(future)
    assert not future.done()
    busy.release()
    assert future.fetch(timeout=LONG) == "later"
    assert future.isready()
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert not future.cancel()


def test_isready_without_a_fetch(pids: list[int]) -> None:
    future = remotecall(myid, pids[0])
    eventually(future.isready)
    eventually(future.done)


@pytest.mark.parametrize("method", ["fetch", "wait", "result", "exception"])
def test_timeouts(method: str, busy: Busy) -> None:
    future = remotecall(ran, busy.pid, "later")
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError):
            getattr(future, method)(timeout=timeout)
    with pytest.raises(TimeoutError):
        hpcdist.fetch(future, timeout=0.01)
    with pytest.raises(TimeoutError):
        hpcdist.wait(future, timeout=0.01)
    busy.release()
    assert future.fetch(timeout=LONG) == "later"


def test_fetch_of_no_reference_is_the_thing_itself() -> None:
    thing = [1]
    assert hpcdist.fetch(thing) is thing
    assert hpcdist.fetch(3) == 3


def test_many_threads_fetch_the_same(pids: list[int]) -> None:
    future = remotecall(hpcdist.sleep, pids[0], 0.1)
    elsewhere = remotecall(many_fetch, pids[1], future, 20)
    assert many_fetch(future, 20) == [None] * 20
    assert elsewhere.fetch(timeout=LONG) == [None] * 20


def test_a_call_runs_even_if_nobody_keeps_its_future(pids: list[int]) -> None:
    remotecall(ran, pids[0], "unwatched")
    gc.collect()
    eventually(lambda: "unwatched" in remotecall_fetch(names_ran, pids[0]))


# --- the standard library's side -----------------------------------------------------------------


def test_concurrent_futures_accepts_them(pids: list[int]) -> None:
    futures = [remotecall(identity, pid, pid) for pid in pids]
    assert all(isinstance(future, concurrent.futures.Future) for future in futures)
    done, pending = concurrent.futures.wait(futures, timeout=LONG)
    assert (done, pending) == (set(futures), set())
    more = [remotecall(identity, pid, pid) for pid in pids]
    finished: Any = concurrent.futures.as_completed(more, timeout=LONG)
    assert sorted(future.result() for future in finished) == sorted(pids)


def test_as_completed_gives_one_that_is_just_being_settled_once(
    pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at all of them when one is ready, but its watchers have not been told yet."""
    channel: Any = hpcdist.RemoteChannel(1)
    looked, told = threading.Event(), threading.Event()
    base: Any = concurrent.futures._base
    arrived, yields = hpcdist.Future.arrived, base._yield_finished_futures

    def arrive_late(self: Any) -> None:
        looked.wait(LONG)
        arrived(self)
        told.set()

    def yield_later(*args: Any, **kw: Any) -> Any:
        looked.set()
        told.wait(LONG)
        return yields(*args, **kw)

    monkeypatch.setattr(hpcdist.Future, "arrived", arrive_late)
    monkeypatch.setattr(base, "_yield_finished_futures", yield_later)
    second = remotecall(hpcdist.take, pids[1], channel)
    first = remotecall(identity, pids[0], 1)
    eventually(lambda: first.ready)
    both: list[Any] = [first, second]
    finished: Any = concurrent.futures.as_completed(both, timeout=LONG)
    assert next(finished) is first
    channel.put(2)
    assert next(finished) is second
    assert list(finished) == []


def test_first_completed_and_first_exception(busy: Busy, pids: list[int]) -> None:
    slow = remotecall(ran, busy.pid, "slow")
    quick, wrong = remotecall(myid, pids[1]), remotecall(fail, pids[1], "wrong")
    done, _ = concurrent.futures.wait(
        [slow, quick], LONG, return_when=concurrent.futures.FIRST_COMPLETED
    )
    assert done == {quick}
    done, _ = concurrent.futures.wait(
        [slow, wrong], LONG, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    assert done == {wrong}


def test_callbacks(pids: list[int]) -> None:
    future = remotecall(identity, pids[0], 3)
    calls: list[Any] = []
    called = threading.Semaphore(0)

    def callback(done: concurrent.futures.Future) -> None:
        calls.append((done is future, done.result()))
        called.release()

    future.add_done_callback(callback)  # Nobody fetches: the end itself must call.
    assert called.acquire(timeout=LONG)
    future.add_done_callback(callback)
    assert called.acquire(timeout=LONG)
    assert calls == [(True, 3), (True, 3)]


def test_a_callback_may_call(pids: list[int]) -> None:
    result: concurrent.futures.Future = concurrent.futures.Future()
    remotecall(myid, pids[0]).add_done_callback(
        lambda done: result.set_result(remotecall(identity, pids[1], done.result()))
    )
    assert result.result(LONG).fetch(timeout=LONG) == pids[0]


def test_await(pids: list[int]) -> None:
    async def main() -> tuple[Any, ...]:
        first = await remotecall(identity, pids[0], 1)
        rest = await asyncio.gather(*[remotecall(identity, pid, pid) for pid in pids])
        wrapped = await asyncio.wrap_future(remotecall(identity, pids[0], 2))
        with pytest.raises(ValueError, match="wrong"):
            await remotecall(fail, pids[0], "wrong")
        return first, rest, wrapped

    assert asyncio.run(main()) == (1, pids, 2)


def test_a_finished_future_can_be_awaited(pids: list[int]) -> None:
    future = remotecall_wait(identity, pids[0], 3)

    async def main() -> tuple[Any, Any]:
        return await future, await future

    assert asyncio.run(main()) == (3, 3)


def test_cancelling_an_await_leaves_the_call_alone(busy: Busy) -> None:
    future = remotecall(ran, busy.pid, "awaited")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_wait_for(future), timeout=0.05)

    asyncio.run(main())
    busy.release()
    assert future.fetch(timeout=LONG) == "awaited"


async def _wait_for(future: Future) -> Any:
    return await future


def test_cancel(busy: Busy) -> None:
    future = remotecall(ran, busy.pid, "cancelled")
    kept = remotecall(ran, busy.pid, "kept")
    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    for wait in (future.fetch, future.result, future.exception):
        with pytest.raises(concurrent.futures.CancelledError):
            wait(timeout=LONG)
    assert future.cancel()
    busy.release()
    assert kept.fetch(timeout=LONG) == "kept"
    assert "cancelled" not in remotecall_fetch(names_ran, busy.pid)
    assert not kept.cancel()
    assert kept.fetch() == "kept"


def test_a_call_to_oneself_that_is_cancelled_has_ended(tmp_path: Path) -> None:
    running = remotecall(block, 1, str(tmp_path / "gate"))
    eventually(running.running)
    queued = remotecall(identity, 1, 1)
    told: list[bool] = []
    queued.add_done_callback(lambda future: told.append(future.cancelled()))
    assert queued.cancel()
    assert queued.done()
    assert queued.cancelled()
    eventually(lambda: told == [True])
    with pytest.raises(concurrent.futures.CancelledError):
        queued.result(10)
    (tmp_path / "gate").touch()
    running.fetch(30)


def test_a_running_call_cannot_be_cancelled(busy: Busy) -> None:
    assert not busy.call.cancel()
    assert not busy.call.cancelled()
    busy.release()
    assert busy.call.fetch(timeout=LONG) == "released"


# --- futures without a call ----------------------------------------------------------------------


@pytest.mark.parametrize("owner", [0, 1, 2], ids=["here", "there", "elsewhere"])
def test_put_once(owner: int, pids: list[int]) -> None:
    future = Future([1, pids[0], pids[1]][owner])
    assert not future.isready()
    assert future.put([1]) is None
    assert future.isready()
    assert future.fetch(timeout=LONG) == [1]
    assert remotecall_fetch(hpcdist.fetch, pids[0], future) == [1]
    for put in (future.put, lambda value: hpcdist.put(future, value)):
        with pytest.raises(RuntimeError, match="Future can be set only once"):
            put(2)
    with pytest.raises(RemoteException, match="Future can be set only once"):
        remotecall_fetch(hpcdist.put, pids[0], future, 3)
    assert future.fetch() == [1]


def test_second_put_after_somebody_elses_first(pids: list[int]) -> None:
    future = Future()
    assert future.where == 1
    remotecall_fetch(hpcdist.put, pids[0], future, "theirs")
    with pytest.raises(RuntimeError, match="Future can be set only once"):
        future.put("ours")
    assert future.fetch(timeout=LONG) == "theirs"


def test_put_wakes_all_who_wait(pids: list[int]) -> None:
    future = Future(pids[0])
    waiting = [remotecall(hpcdist.fetch, pid, future) for pid in pids]
    here = in_thread(future.fetch, timeout=LONG)
    remotecall_fetch(hpcdist.put, pids[1], future, "now")
    assert here.result(LONG) == "now"
    assert [fut.fetch(timeout=LONG) for fut in waiting] == ["now"] * len(pids)


def test_put_on_an_unfinished_call_is_refused(busy: Busy) -> None:
    future = remotecall(ran, busy.pid, "its own")
    with pytest.raises(RuntimeError):
        future.put("ours")
    busy.release()
    assert future.fetch(timeout=LONG) == "its own"


def test_put_on_a_finished_call_is_refused(pids: list[int]) -> None:
    future = remotecall_wait(myid, pids[0])
    with pytest.raises(RuntimeError, match="Future can be set only once"):
        future.put("ours")
    assert future.fetch() == pids[0]


def test_put_of_something_that_cannot_be_pickled_sets_nothing(pids: list[int]) -> None:
    future = Future(pids[0])
    with pytest.raises((TypeError, pickle.PicklingError)):
        future.put(threading.Lock())
    assert not future.isready()
    future.put(1)
    assert remotecall_fetch(hpcdist.fetch, pids[1], future) == 1


# --- futures on their way ------------------------------------------------------------------------


def test_they_come_back_equal(pids: list[int]) -> None:
    future = remotecall(identity, pids[0], "value")
    for pid in pids:
        echo = remotecall_fetch(identity, pid, future)
        assert echo == future
        assert hash(echo) == hash(future)
        assert echo.fetch(timeout=LONG) == "value"


def test_they_travel_in_arguments_results_and_channels(pids: list[int]) -> None:
    first, second, third = pids
    future = remotecall(identity, first, "value")
    assert remotecall_fetch(fetch_in, second, {"futures": [future]}) == "value"

    returned = remotecall_fetch(call_onwards, first, second)
    assert (returned.where, returned.whence) == (second, first)
    assert returned.fetch(timeout=LONG) == second

    channel = RemoteChannel(3, third)
    channel.put(remotecall(identity, first, "through a channel"))
    gc.collect()  # Nobody but the channel's item refers to it now.
    taken = remotecall_fetch(hpcdist.take, second, channel)
    assert taken.fetch(timeout=LONG) == "through a channel"


def test_an_unfinished_one_travels(busy: Busy, pids: list[int]) -> None:
    future = remotecall(ran, busy.pid, "later")
    elsewhere = remotecall(hpcdist.fetch, pids[1], future)
    busy.release()
    assert elsewhere.fetch(timeout=LONG) == "later"


def test_errors_arrive_wherever_the_future_goes(pids: list[int]) -> None:
    future = remotecall(fail, pids[0], "wrong")
    with pytest.raises(RemoteException) as caught:
        remotecall_fetch(hpcdist.fetch, pids[1], future)
    assert caught.value.pid == pids[1]
    assert isinstance(caught.value.cause, ValueError)
    assert caught.value.cause.pid == pids[0]  # type: ignore[attr-defined]


def test_a_remote_future_outlives_the_call_that_made_it(pids: list[int]) -> None:
    channel = RemoteChannel(1, pids[0])
    remote_do(put_a_future, pids[1], channel, pids[2])
    assert channel.take(timeout=LONG).fetch(timeout=LONG) == pids[2]


def put_a_future(channel: RemoteChannel, pid: int) -> None:
    channel.put(remotecall(myid, pid))


# --- after a death -------------------------------------------------------------------------------


def test_a_fetched_value_outlives_its_worker(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    fetched = remotecall(new_object, pid)
    value = fetched.fetch()
    kill9(remotecall_fetch(os.getpid, pid))
    eventually(lambda: pid not in workers())
    assert fetched.fetch() is value
    assert fetched.isready()


def test_an_unfetched_one_raises(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    (pid,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, pid)
    future, empty = Busy(pid, tmp_path / "gate").call, Future(pid)
    kill9(os_pid)
    eventually(lambda: pid not in workers())
    for unfetched in (future, empty):
        for ask in (unfetched.fetch, unfetched.isready, unfetched.wait, unfetched.result):
            with pytest.raises(ProcessExitedException) as caught:
                ask()
            assert caught.value.pid == pid
        eventually(unfetched.done)
        assert isinstance(unfetched.exception(), ProcessExitedException)


def test_callbacks_run_at_a_death(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    (pid,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, pid)
    called: concurrent.futures.Future = concurrent.futures.Future()
    future = Busy(pid, tmp_path / "gate").call
    future.add_done_callback(lambda done: called.set_result(done.exception()))
    kill9(os_pid)
    assert isinstance(called.result(LONG), ProcessExitedException)


def test_await_ends_at_a_death(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    (pid,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, pid)

    async def main() -> None:
        future = Busy(pid, tmp_path / "gate").call
        asyncio.get_running_loop().call_later(0.05, kill9, os_pid)
        with pytest.raises(ProcessExitedException):
            await asyncio.wait_for(_wait_for(future), LONG / 2)

    asyncio.run(main())


# --- several references at once ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fetch", "wait", "take", "isready"])
@pytest.mark.parametrize("several", [list, tuple, set, lambda fs: dict(enumerate(fs)), iter])
def test_several_references_are_no_reference(name: str, several: Callable[..., Any]) -> None:
    futures = [remotecall(abs, 1, -1) for _ in range(2)]
    what = several(futures) if several is not iter else (f for f in futures)
    with pytest.raises(TypeError, match=rf"{name} takes one .*{type(what).__name__}.*gather\("):
        getattr(hpcdist, name)(what)


def test_other_things_are_fetched_as_they_are() -> None:
    for thing in ([1, 2], (), {"a": 1}, "abc", None, range(3)):
        assert hpcdist.fetch(thing) is thing
        assert hpcdist.wait(thing) is thing
