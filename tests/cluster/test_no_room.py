"""A message for which a process has no memory: whoever waits gets a MemoryError, and it lives."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    RemoteChannel,
    everywhere,
    fetch,
    myid,
    pmap,
    put,
    remotecall,
    remotecall_fetch,
)

LARGE = 10_000_000  # floats: 80 MB
ROOM = 40 << 20


def leave_room(nbytes: int) -> None:
    """Let this process grow by so much."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size + nbytes, hard))


def ones() -> np.ndarray:
    return np.ones(LARGE)


def total_from(pid: int) -> float:
    return float(remotecall_fetch(ones, pid).sum())


def call_with_capture(pid: int) -> float:
    array = ones()
    total: float = remotecall_fetch(lambda: float(array.sum()), pid)
    return total


def length_of_the_text(text: bytes) -> int:
    return len(text)


class Adder:
    def total(self, array: np.ndarray) -> float:
        return float(array.sum())

    def length(self, text: bytes) -> int:
        return len(text)


WAYS: dict[str, Callable[[int, int], Any]] = {
    "fetch": lambda small, other: remotecall_fetch(np.sum, small, ones()),
    "future": lambda small, other: remotecall(np.sum, small, ones()).fetch(),
    "in the stream": lambda small, other: remotecall_fetch(
        length_of_the_text, small, bytes(8 * LARGE)
    ),
    "defined by the call": lambda small, other: remotecall_fetch(
        lambda array: float(array.sum()), small, ones()
    ),
    "captured": lambda small, other: call_with_capture(small),
    "from a worker": lambda small, other: fetch(
        remotecall(remotecall_fetch, other, np.sum, small, ones())
    ),
    "result": lambda small, other: remotecall_fetch(total_from, small, other),
    "method": lambda small, other: hpcdist.RemoteObject(Adder, small).total(ones()),
    "method, text": lambda small, other: hpcdist.RemoteObject(Adder, small).length(
        bytes(8 * LARGE)
    ),
    "method, future": lambda small, other: (
        hpcdist.RemoteObject(Adder, small).total.remotecall(ones()).fetch()
    ),
    "put": lambda small, other: put(RemoteChannel(1, small), ones()),
    "bcast": lambda small, other: hpcdist.bcast(ones()),
    "pmap": lambda small, other: pmap(np.sum, [ones()] * 2, pool=hpcdist.WorkerPool([small])),
}


@pytest.fixture(scope="module", params=["auto", "process"])
def workers_of(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """A worker with little room, and another one; in one MPI world, or joined by links."""
    pids = hpcdist.addprocs(2, isolation=request.param)
    # numpy has what it needs; a large array here would leave room for the next one for a while
    everywhere.call(np.ones, 10, pids=pids)
    remotecall_fetch(leave_room, pids[0], ROOM)
    yield pids
    hpcdist.rmprocs(*pids)


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_fit_fails_alone(way: str, workers_of: list[int]) -> None:
    small, other = workers_of
    with pytest.raises(hpcdist.HpcdistError) as caught:
        WAYS[way](small, other)
    assert "MemoryError" in str(caught.value)
    assert "bytes" in str(caught.value)
    # Neither the worker nor what it was told of before has gone.
    assert remotecall_fetch(myid, small) == small
    assert remotecall_fetch(lambda array: float(array.sum()), small, np.ones(10)) == 10
    assert remotecall_fetch(np.sum, small, np.ones(100_000)) == 100_000


def test_a_function_whose_first_call_did_not_arrive_comes_with_the_next(
    workers_of: list[int],
) -> None:
    def length(text: bytes) -> int:
        return len(text)

    small = workers_of[0]
    with pytest.raises(MemoryError):
        remotecall_fetch(length, small, bytes(8 * LARGE))
    assert remotecall_fetch(length, small, b"four") == 4


def test_what_nobody_can_be_told_ends_the_worker_with_a_word(
    fresh: Callable[..., list[int]],
) -> None:
    (pid,) = fresh(1)
    everywhere.call(np.ones, 10, pids=[pid])
    remotecall_fetch(leave_room, pid, ROOM // 4)
    with pytest.raises(hpcdist.ProcessExitedException) as caught:
        everywhere.call(np.sum, ones(), pids=[pid])
    assert "no memory for" in str(caught.value)
