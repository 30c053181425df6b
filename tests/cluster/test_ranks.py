"""Tasks of several ranks: `ranks=k`, with real MPI."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ProcessExitedException,
    RemoteException,
    comm,
    everywhere,
    myid,
    remotecall,
    remotecall_fetch,
    spmd,
    workers,
)
from hpcdist._cluster import placement
from hpcdist._cluster.sections import Sections
from hpcdist._collective.section_members import SectionMembers
from tests.helpers import eventually, kill9


@pytest.fixture(scope="module")
def six() -> Iterator[list[int]]:
    """Six workers for all tests of this module."""
    pids = hpcdist.addprocs(6)
    yield pids
    hpcdist.rmprocs(pids)


def meet(number: int) -> tuple[int, list[int]]:
    world = comm()
    world.Barrier()
    return world.allreduce(number), world.allgather(myid())


def fail_or_meet(rank: int, number: int) -> int:
    if comm().rank == rank:
        raise ValueError(number)
    return sum(comm().allgather(1))


def kill_or_meet(rank: int) -> int:
    if comm().rank == rank:
        kill9(os.getpid())
    return sum(comm().allgather(1))


def kept_comms(pids: list[int]) -> list[int]:
    """Count the communicators that each worker has."""
    found = everywhere.call(lambda: len(SectionMembers.here()._kept), pids=pids)
    return [found[pid] for pid in pids]


def test_many_tasks_side_by_side(six: list[int]) -> None:
    futures = [spmd.submit(meet, k, ranks=2) for k in range(60)]
    found = [future.fetch(60) for future in futures]
    assert [total for total, _ in found] == [2 * k for k in range(60)]
    sets = Counter(tuple(pids) for _, pids in found)
    assert len(sets) == 3
    assert kept_comms(six) == [1] * 6


def test_tasks_of_several_sizes(six: list[int]) -> None:
    sizes = [1, 6, 2, 5, 3, 4, 6, 2, 1, 3] * 3
    futures = [spmd.submit(meet, 1, ranks=ranks) for ranks in sizes]
    assert [future.fetch(60)[0] for future in futures] == sizes


def test_all_results_of_a_task_that_is_waited_for(six: list[int]) -> None:
    found = spmd(meet, 5, ranks=2, pids=six[2:5])
    assert found[0] == found[1]
    assert found[0][0] == 10
    assert set(found[0][1]) <= set(six[2:5])


def test_tasks_that_workers_ask_for(six: list[int]) -> None:
    ask = lambda: [spmd.submit(meet, 1, ranks=ranks).fetch(60)[0] for ranks in (3, 2, 4)]
    asking = [remotecall(ask, pid) for pid in six[:3]]
    assert [future.fetch(60) for future in asking] == [[3, 2, 4]] * 3


def test_an_error_ends_its_own_task_alone(six: list[int]) -> None:
    failing = [spmd.submit(fail_or_meet, rank, k, ranks=2) for k, rank in enumerate((7, 7, 7))]
    assert [future.fetch(60) for future in failing] == [2, 2, 2]
    raising = lambda k: spmd.submit(lambda: comm().rank or [][k], ranks=2)
    futures: list[Any] = [raising(k) if k % 2 else spmd.submit(meet, k, ranks=2) for k in range(8)]
    for k, future in enumerate(futures):
        if k % 2:
            with pytest.raises(IndexError) as caught:
                future.fetch(60)
            assert isinstance(caught.value, RemoteException)
        else:
            assert future.fetch(60)[0] == 2 * k
    assert set(six) <= set(workers())


def test_unused_communicators_are_freed(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "KEPT_MOST", 2)
    pids = fresh(4)
    for _ in range(3):
        for some in itertools.combinations(pids, 2):
            found = spmd.submit(meet, 1, ranks=2, pids=some).fetch(60)
            assert found == (2, list(some))
    assert spmd(meet, 1, pids=pids)[0] == (4, pids)  # here all hear what they are to free
    assert sum(kept_comms(pids)) == 2 * 2 + 4


def test_maps_and_executors(six: list[int]) -> None:
    assert hpcdist.pmap(meet, range(12), ranks=3)[5][0] == 15
    found = sorted(hpcdist.imap_unordered(meet, range(12), ranks=2))
    assert [total for total, _ in found] == list(range(0, 24, 2))
    with hpcdist.Executor(six[:4], ranks=2) as executor:
        pids = [pid for _, pids in executor.map(meet, range(12)) for pid in pids]
        assert set(pids) <= set(six[:4])


def test_what_ranks_cannot_be(six: list[int]) -> None:
    for wrong, error in ((0, ValueError), (True, TypeError), ("4", TypeError), (2.5, TypeError)):
        with pytest.raises(error, match=r"ranks is .* not"):
            spmd.submit(meet, 1, ranks=wrong)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"ranks=7 .* the largest world there are has 6"):
        spmd.submit(meet, 1, ranks=7)
    with pytest.raises(ValueError, match="has 6"):
        remotecall_fetch(lambda: spmd.submit(meet, 1, ranks=7).fetch(), six[0])


def test_a_death_ends_its_own_task_alone(fresh: Any) -> None:
    pids = fresh(6)
    futures: list[Any] = [spmd.submit(meet, k, ranks=2, pids=pids) for k in range(6)]
    futures.insert(3, spmd.submit(kill_or_meet, 1, ranks=2, pids=pids, grace=0.5))
    lost = futures.pop(3)
    assert [future.fetch(60)[0] for future in futures] == [2 * k for k in range(6)]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        lost.fetch(60)
    left = eventually(lambda: [pid for pid in pids if pid in workers()])
    more = [spmd.submit(meet, 1, ranks=2, pids=left) for _ in range(6)]
    assert [future.fetch(60)[0] for future in more] == [2] * 6


def test_mpi_may_know_of_a_death_before_process_1(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of others that begins meanwhile goes on: its members make a communicator."""
    *pids, lost = fresh(6)
    kill9(hpcdist.remotecall_fetch(os.getpid, lost))
    eventually(lambda: lost not in workers())
    monkeypatch.setattr(Sections, "_lost_beside", lambda self, pid: [])
    tasks = [spmd.submit(meet, 1, pids=pair) for pair in itertools.combinations(pids, 2)]
    for task in tasks:
        assert [total for total, _ in task.fetch(60)] == [2, 2]
