"""`spmd` among the ranks of one MPI launch."""

import numpy as np
import pytest

from hpcdist import Executor, comm, myid, pmap, remotecall, spmd

pytestmark = pytest.mark.mpi(min_size=4)


def add_up() -> float:
    world = comm()
    total = np.empty(1000)
    world.Allreduce(np.full(1000, float(world.rank)), total)
    return float(total[0])


def members() -> list[int]:
    return comm().allgather(myid())


def from_here(pids: list[int]) -> list[float]:
    return spmd(add_up, pids=pids)


def fail_first() -> int:
    if comm().rank == 0:
        raise ZeroDivisionError
    return comm().rank


def test_all_workers(world: list[int]) -> None:
    assert spmd(members) == [world] * len(world)
    assert spmd(add_up) == [float(sum(range(len(world))))] * len(world)


def test_sub_sets_and_callers_on_workers(world: list[int]) -> None:
    left, right = world[:2], world[2:]
    futures = [spmd.submit(members, pids=some) for some in (left, right, left, world)]
    assert [future.fetch()[0] for future in futures] == [left, right, left, world]
    assert remotecall(from_here, world[-1], world[:2]).fetch(20) == [1.0, 1.0]


def test_process_1_may_be_a_member(world: list[int]) -> None:
    assert spmd(members, pids=[1, *world]) == [[1, *world]] * (len(world) + 1)


def test_a_failure_outside_of_mpi(world: list[int]) -> None:
    with pytest.raises(ZeroDivisionError):
        spmd(fail_first, grace=5)
    assert spmd(members) == [world] * len(world)


def test_tasks_of_several_ranks(world: list[int]) -> None:
    futures = [spmd.submit(members, ranks=1 + k % len(world)) for k in range(20)]
    found = [future.fetch(60) for future in futures]
    assert [len(pids) for pids in found] == [1 + k % len(world) for k in range(20)]
    assert all(set(pids) <= set(world) for pids in found)
    with pytest.raises(ValueError, match=f"has {len(world)}"):
        spmd.submit(members, ranks=len(world) + 1)


def test_maps_and_executors_of_several_ranks(world: list[int]) -> None:
    assert [len(pids) for pids in pmap(lambda k: members(), range(10), ranks=2)] == [2] * 10
    with Executor(ranks=len(world)) as executor:
        assert executor.submit(members).result() == world
