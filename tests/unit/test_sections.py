"""Sections of `spmd`, simulated: who enters when, and what a failure or a death does to them."""

from typing import Any

import pytest

import hpcdist
from hpcdist import CompositeException, ProcessExitedException, RemoteException
from hpcdist._cluster.sections import Sections
from hpcdist._collective.section_members import SectionMembers
from hpcdist._runtime.node import Node, here
from hpcdist.testing import Simulation

SEEDS = range(8)
INSIDE: set[int] = set()  # who runs a section's function now
MOST: list[int] = []  # how many did, each time one more came


@pytest.fixture(autouse=True)
def nobody_inside() -> None:
    INSIDE.clear()
    MOST.clear()


def stay(seconds: float) -> int:
    me = here.node.me
    assert me not in INSIDE
    INSIDE.add(me)
    MOST.append(len(INSIDE))
    hpcdist.sleep(seconds)
    INSIDE.discard(me)
    return me


def fail_on(pid: int) -> int:
    if here.node.me == pid:
        raise ValueError("no")
    return stay(5)


def meet() -> Any:
    world = hpcdist.comm()
    rank = world.rank
    told = world.bcast(f"from {rank}" if rank == 0 else None)
    parts = world.scatter([0, 1, 2][: world.size]) if world.size == 3 else rank
    world.Barrier()
    return (
        rank,
        world.size,
        told,
        world.allgather(parts**2),
        world.allreduce(rank),
        world.alltoall([10 * rank] * world.size),
    )


def name_of_comm() -> int:
    return id(hpcdist.comm())


def wait_for_all_but(pid: int) -> None:
    if here.node.me == pid:
        raise ValueError("not me")
    hpcdist.comm().barrier()


async def double(number: int) -> int:
    return 2 * number


def is_tidy(nodes: list[Node]) -> bool:
    """Tell whether no process has anything left of a section."""
    sections = nodes[0].service(Sections)
    return not (
        sections._active
        or sections._queue
        or any(node.service(SectionMembers)._runs or node.pending for node in nodes)
    )


def nodes_of(sim: Simulation, count: int, but: int = 0) -> list[Node]:
    return [sim.node(pid).node for pid in range(1, count + 1) if pid != but]


@pytest.mark.parametrize("seed", SEEDS)
def test_members_run_at_the_same_time(seed: int) -> None:
    with Simulation(nodes=7, seed=seed) as sim:
        assert sim.node(1).run(lambda: hpcdist.spmd(stay, 1)) == [2, 3, 4, 5, 6, 7]
        assert max(MOST) == 6
        assert is_tidy(nodes_of(sim, 7))


@pytest.mark.parametrize("seed", SEEDS)
def test_sets_with_a_member_in_common_come_one_after_the_other(seed: int) -> None:
    sets = ([2, 3], [3, 4], [2, 3, 4, 5], [4, 5], [3])
    with Simulation(nodes=6, seed=seed) as sim:
        asked = [
            sim.node(caller).start(lambda pids=pids: hpcdist.spmd(stay, 0.1, pids=pids))
            for caller, pids in zip((1, 6, 1, 6, 6), sets, strict=True)
        ]
        assert tuple(task.result() for task in asked) == sets
        assert is_tidy(nodes_of(sim, 6))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_that_fails_frees_the_others(seed: int) -> None:
    with Simulation(nodes=5, seed=seed) as sim:
        with pytest.raises(RemoteException, match="no") as caught:
            sim.node(1).run(lambda: hpcdist.spmd(fail_on, 3, grace=1))
        assert caught.value.pid == 3
        INSIDE.clear()  # they were interrupted
        assert sim.now < 4
        assert sim.node(1).run(lambda: hpcdist.spmd(stay, 0)) == [2, 3, 4, 5]
        assert is_tidy(nodes_of(sim, 5))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_that_dies_frees_the_others(seed: int) -> None:
    with Simulation(nodes=6, seed=seed) as sim:
        task = sim.node(1).start(lambda: hpcdist.spmd(stay, 60, grace=0.5))
        sim.advance(0.002 * seed)
        sim.kill(4)
        with pytest.raises((ProcessExitedException, CompositeException)) as caught:
            task.result()
        errors = getattr(caught.value, "exceptions", [caught.value])
        assert [error.pid for error in errors] == [4]
        assert sim.now < 30
        INSIDE.clear()
        assert sim.node(1).run(lambda: hpcdist.spmd(stay, 0)) == [2, 3, 5, 6]
        assert is_tidy(nodes_of(sim, 6, but=4))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_caller_that_dies_holds_up_nobody(seed: int) -> None:
    with Simulation(nodes=6, seed=seed) as sim:
        sim.node(6).start(lambda: hpcdist.spmd(stay, 0.5, pids=[2, 3, 4]))
        sim.advance(0.0005 * seed)
        sim.kill(6)
        assert sim.node(1).run(lambda: hpcdist.spmd(stay, 0, pids=[3, 4, 5])) == [3, 4, 5]
        sim.advance(20)
        assert is_tidy(nodes_of(sim, 6, but=6))


def test_coroutines() -> None:
    with Simulation(nodes=3, seed=2) as sim:
        assert sim.node(1).run(lambda: hpcdist.spmd(double, 4)) == [8, 8]


@pytest.mark.parametrize("seed", SEEDS)
def test_members_meet_in_their_communicator(seed: int) -> None:
    with Simulation(nodes=5, seed=seed) as sim:
        found = sim.node(1).run(lambda: hpcdist.spmd(meet, pids=[2, 4, 5]))
        assert found == [(rank, 3, "from 0", [0, 1, 4], 3, [0, 10, 20]) for rank in range(3)]
        assert is_tidy(nodes_of(sim, 5))


def test_a_communicator_is_kept_and_used_again() -> None:
    with Simulation(nodes=4, seed=2) as sim:
        first, again, other = (
            sim.node(1).run(lambda pids=pids: hpcdist.spmd(name_of_comm, pids=pids))
            for pids in ([2, 3, 4], [2, 3, 4], [2, 3])
        )
        assert first == again
        assert len({*first, *other}) == 5


@pytest.mark.parametrize("seed", SEEDS)
def test_members_that_wait_in_a_communicator_are_freed(seed: int) -> None:
    with Simulation(nodes=5, seed=seed) as sim:
        task = sim.node(1).start(lambda: hpcdist.spmd(wait_for_all_but, 4, grace=2))
        with pytest.raises(RemoteException, match="not me") as caught:
            task.result()
        assert caught.value.pid == 4
        assert 2 <= sim.now < 8
        assert sim.node(1).run(lambda: hpcdist.spmd(meet))[0][1] == 4
        assert is_tidy(nodes_of(sim, 5))


def test_a_simulated_communicator_says_what_it_lacks() -> None:
    with Simulation(nodes=3, seed=2) as sim:
        with pytest.raises(AttributeError, match=r"no 'Alltoallw'; it has .*allreduce"):
            sim.node(1).run(lambda: hpcdist.spmd(lambda: hpcdist.comm().Alltoallw(), pids=3))
        with pytest.raises(RuntimeError, match="this code is in none"):
            sim.node(1).run(hpcdist.comm)
