"""What has failed lets go of its arguments at once, on the worker and with the caller.

The garbage collector is off everywhere here: only counting frees.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    Future,
    RemoteChannel,
    everywhere,
    imap,
    imap_unordered,
    pmap,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    take,
)
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

# --- what the workers run; they import this module -----------------------------------------------

ALIVE: weakref.WeakSet[Heavy] = weakref.WeakSet()
SHARED = ValueError("raised by many calls")


class Heavy:
    """An argument that can be counted where it is."""

    def __init__(self) -> None:
        ALIVE.add(self)

    def __reduce__(self) -> Any:
        return Heavy, ()


def alive() -> int:
    return len(ALIVE)


def fail(heavy: Heavy) -> None:
    raise ValueError("no")


def fail_of_two(heavy: Heavy, other: Heavy) -> None:
    raise ValueError("no")


async def fail_later(heavy: Heavy) -> None:
    await asyncio.sleep(0)
    raise ValueError("no")


def fail_hidden(heavy: Heavy) -> Any:
    return fail_later(heavy)


def fail_and_keep(heavy: Heavy) -> None:
    kept = None
    try:
        fail(heavy)
    except ValueError as error:
        kept = error
    assert kept is not None
    raise kept


def fail_with_cause(heavy: Heavy) -> None:
    try:
        fail_and_keep(heavy)
    except ValueError as error:
        kept = error
        raise KeyError("no") from kept


def fail_as_group(heavy: Heavy) -> None:
    errors = []
    try:
        fail(heavy)
    except ValueError as error:
        errors.append(error)
    raise ExceptionGroup("no", errors)


def raise_shared(heavy: Heavy) -> None:
    raise SHARED


def give_a_lock(heavy: Heavy) -> Any:
    return threading.Lock()


def call_on(pid: int, heavy: Heavy) -> None:
    remotecall_fetch(fail, pid, heavy)


def return_it(heavy: Heavy) -> Heavy:
    return heavy


class Backing:
    """A channel whose every operation fails."""

    def __init__(self) -> None:
        self.heavy = Heavy()

    def put(self, value: Any) -> None:
        fail(self.heavy)

    def take(self) -> None:
        fail(self.heavy)


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _only_counting(pids: list[int]) -> Iterator[None]:
    gc.collect()
    everywhere.call(gc.disable)
    yield
    everywhere.call(gc.enable)


def several() -> list[Heavy]:
    return [Heavy() for _ in range(4)]


WAYS: dict[str, Callable[[int], Any]] = {
    "fetch": lambda pid: remotecall_fetch(fail, pid, Heavy()),
    "fetch by value": lambda pid: remotecall_fetch(lambda heavy: 1 / 0, pid, Heavy()),
    "keyword": lambda pid: remotecall_fetch(fail, pid, heavy=Heavy()),
    "future": lambda pid: remotecall(fail, pid, Heavy()).fetch(),
    "loop": lambda pid: hpcdist.distributed(several())(fail).wait(),
    "wait": lambda pid: remotecall_wait(fail, pid, Heavy()),
    "do": lambda pid: remote_do(fail, pid, Heavy()) or remotecall_fetch(fail, pid, Heavy()),
    "coroutine": lambda pid: remotecall_fetch(fail_later, pid, Heavy()),
    "hidden coroutine": lambda pid: remotecall_fetch(fail_hidden, pid, Heavy()),
    "kept by the user's frame": lambda pid: remotecall_fetch(fail_and_keep, pid, Heavy()),
    "cause": lambda pid: remotecall_fetch(fail_with_cause, pid, Heavy()),
    "group": lambda pid: remotecall_fetch(fail_as_group, pid, Heavy()),
    "shared error": lambda pid: remotecall_fetch(raise_shared, pid, Heavy()),
    "result": lambda pid: remotecall_fetch(give_a_lock, pid, Heavy()),
    "self": lambda pid: remotecall_fetch(fail, 1, Heavy()),
    "call in a call": lambda pid: remotecall_fetch(call_on, pid, pid + 1, Heavy()),
    "pmap": lambda pid: pmap(fail, several()),
    "pmap in batches": lambda pid: pmap(fail, several(), batch_size=2),
    "pmap of coroutines": lambda pid: pmap(fail_later, several()),
    "pmap of hidden coroutines": lambda pid: pmap(fail_hidden, several()),
    "pmap here": lambda pid: pmap(fail, several(), distributed=False),
    "pmap again": lambda pid: pmap(fail, several(), retry_delays=[0, 0]),
    "imap": lambda pid: list(imap(fail, several())),
    "imap_unordered": lambda pid: list(imap_unordered(fail, several())),
    "everywhere.call": lambda pid: everywhere.call(fail, Heavy()),
    "everywhere.call of one": lambda pid: everywhere.call(fail, Heavy(), pids=[pid]),
    "everywhere": lambda pid: everywhere(f"import {__name__} as m; m.fail(m.Heavy())"),
    "spmd": lambda pid: hpcdist.spmd(fail, Heavy(), pids=[pid]),
    "spmd of two": lambda pid: hpcdist.spmd(fail, Heavy(), pids=[pid, pid + 1]),
    "executor": lambda pid: hpcdist.Executor().submit(fail, Heavy()).result(),
    "executor's map": lambda pid: list(hpcdist.Executor().map(fail, several())),
    "distributed": lambda pid: hpcdist.distributed(several(), fail_of_two)(fail),
    "distributed's operator": lambda pid: hpcdist.distributed(several(), fail_of_two)(return_it),
    "reduce": lambda pid: hpcdist.reduce(fail_of_two, Heavy),
    "channel": lambda pid: take(RemoteChannel(Backing, pid)),
}


def count() -> dict[int, Any]:
    return everywhere.call(alive)


@pytest.mark.parametrize("way", WAYS)
def test_a_failed_call_lets_go_of_its_arguments(way: str, pids: list[int]) -> None:
    before = count()
    for _ in range(3):
        with pytest.raises((Exception, ExceptionGroup)):
            WAYS[way](pids[0])
    eventually(lambda: count() == before, 10)


def test_a_map_lets_go_of_its_items(pids: list[int]) -> None:
    before = count()
    pmap(alive_of, several())
    list(imap(alive_of, several()))
    eventually(lambda: count() == before, 10)


def alive_of(heavy: Heavy) -> int:
    return 1


def problems(future: Future) -> Iterator[BaseException | None]:
    for ask in (future.wait, future.fetch, future.exception):
        try:
            yield ask()
        except Exception as error:
            yield error


@pytest.mark.parametrize("kind", ["call", "spmd", "self"])
def test_a_failed_future_holds_no_frames(kind: str, pids: list[int]) -> None:
    def start(heavy: Heavy) -> Future:
        if kind == "spmd":
            return hpcdist.spmd.submit(fail, heavy, pids=pids[:2])
        return remotecall(fail, pids[0] if kind == "call" else 1, heavy)

    def ask(heavy: Heavy) -> Future:  # its frame is in the tracebacks, and holds `heavy`
        future = start(heavy)
        assert len([str(error) for _ in range(3) for error in problems(future)]) == 9
        return future

    before = count()
    future = ask(Heavy())
    eventually(lambda: count() == before, 10)
    assert isinstance(future.exception(), ValueError | hpcdist.CompositeException)


def test_a_caller_that_handles_an_error_keeps_its_frames(pids: list[int]) -> None:
    """A call to this process runs inside the caller's `except`: its error's context is theirs."""
    try:
        fail(Heavy())
    except ValueError as error:
        with pytest.raises(hpcdist.CompositeException):
            everywhere("1 / 0", pids=[1])
        with pytest.raises(ValueError, match="no"):
            pmap(fail, several(), distributed=False)
        frames = error.__traceback__
        assert frames is not None
        assert frames.tb_next is not None
        assert frames.tb_next.tb_frame.f_code is fail.__code__
