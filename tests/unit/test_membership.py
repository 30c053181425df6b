"""Who joins and who goes, in crowds: each worker learns of all, by few messages."""

from collections.abc import Callable
from functools import partial

import pytest

import hpcdist
from hpcdist import ProcessExitedException
from hpcdist._cluster.gathering import Gathering
from hpcdist._cluster.roster import Roster, State
from hpcdist._runtime.node import Node, here
from hpcdist.testing import Simulation

pytestmark = pytest.mark.any_mpi
SEEDS = range(6)


def known_to(sim: Simulation, pid: int) -> list[int]:
    return sorted(sim.node(pid).node.members.living)


def told(sim: Simulation, act: Callable[[], object]) -> int:
    """Count the messages that process 1 sends meanwhile."""
    ways = sim.network.traffic

    def count() -> int:
        return sum(t.messages for (sender, _), t in ways.items() if sender == 1)

    before = count()
    act()
    sim.advance(2)
    return count() - before


@pytest.mark.parametrize("seed", SEEDS)
def test_all_know_each_other_when_addprocs_returns(seed: int) -> None:
    with Simulation(nodes=4, seed=seed, worlds=2) as sim:
        new = sim.node(1).run(hpcdist.addprocs, 3)
        assert sim.node(1).run(hpcdist.remotecall_fetch, hpcdist.workers, new[0]) == [
            *(2, 3, 4),
            *new,
        ]
        sim.advance(0.1)
        for pid in (2, 3, 4, *new):
            assert known_to(sim, pid) == [2, 3, 4, *new]


def call_onward(pids: list[int]) -> list[int]:
    """Call the next of some workers, each from the one before."""
    first, *rest = pids
    more = hpcdist.remotecall_fetch(call_onward, rest[0], rest) if rest else []
    assert here.node.me == first
    return [first, *more]


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_that_have_just_come_can_be_told_of(seed: int) -> None:
    """Process 1 itself counts a worker only once all others are being told of it."""
    with Simulation(nodes=4, seed=seed, worlds=3) as sim:
        sim.delay(0.0005)
        came: list[int] = []
        told_of: list[list[int]] = []
        chains = []
        sim.node(1).node.on_join.append(came.append)
        task = sim.node(1).start_beside(hpcdist.addprocs, 4)
        for _ in range(200):
            sim.advance(0.001)
            while came:
                told_of.append([2, 3, came.pop(0)])
                chains.append(
                    sim.node(1).start(hpcdist.remotecall_fetch, call_onward, 2, told_of[-1])
                )
        assert task.done()
        assert len(chains) == 4
        assert [chain.result() for chain in chains] == told_of


def test_a_worker_answers_one_it_has_not_been_told_of() -> None:
    with Simulation(nodes=2, seed=1) as sim:
        sim.delay(2.0, between=[1, 2])
        (new,) = sim.node(1).run(hpcdist.addprocs, 1)
        sim.advance(0.1)
        assert sim.node(new).run(hpcdist.remotecall_fetch, hpcdist.workers, 2) == [2]
        sim.advance(3)
        assert known_to(sim, 2) == [2, new]
        assert sim.node(2).run(hpcdist.remotecall_fetch, hpcdist.myid, new) == new


def test_joining_and_going_take_some_messages_for_each_worker() -> None:
    with Simulation(nodes=41, worlds=4) as sim:
        new: list[int] = []
        assert told(sim, lambda: new.extend(sim.node(1).run(hpcdist.addprocs, 40))) <= 7 * 80
        assert told(sim, lambda: sim.node(1).run(hpcdist.rmprocs, new)) <= 40 + 6 * 40
        assert told(sim, lambda: sim.lose_world(4)) <= 6 * 30


@pytest.mark.parametrize("seed", SEEDS)
def test_all_hear_of_every_death(seed: int) -> None:
    with Simulation(nodes=25, seed=seed, worlds=4) as sim:
        sim.lose_world(2)
        sim.kill(2, 20)
        sim.advance(2)
        left = [pid for pid in range(2, 26) if pid not in (2, 20, *range(8, 14))]
        for pid in left:
            assert known_to(sim, pid) == left
            why = str(sim.node(pid).node.members.gone[2])
            assert why == "Worker 2 on host2 has exited: killed by SIGKILL."


def one_that_arrives(sim: Simulation) -> int:
    """Let the time pass until a worker has greeted and does not count yet."""
    roster = sim.node(1).node.service(Roster)
    for _ in range(200):
        for pid, record in roster.book.items():
            if record.state is State.ARRIVED:
                return pid
        sim.advance(0.0005)
    raise AssertionError("each worker counts as soon as it has greeted")


@pytest.mark.parametrize("seed", SEEDS)
def test_one_that_dies_as_it_comes_has_joined_and_died(seed: int) -> None:
    """What is told of a worker begins with its coming, however soon it goes."""
    with Simulation(nodes=3, seed=seed) as sim:
        events: list[tuple[str, int]] = []
        sim.node(1).run(
            hpcdist.on_worker,
            added=lambda pid: events.append(("added", pid)),
            lost=lambda pid: events.append(("lost", pid)),
        )
        sim.node(1).start(suppressing, partial(hpcdist.addprocs, 8))
        arrived = one_that_arrives(sim)
        sim.kill(arrived)
        sim.advance(10)
        mine = [what for what, pid in events if pid == arrived]
        assert mine == ["added", "lost"]


def suppressing(f: Callable[[], object]) -> None:
    try:
        f()
    except (hpcdist.LaunchError, ProcessExitedException):
        pass


def test_one_that_is_removed_as_it_comes_leaves() -> None:
    with Simulation(nodes=3, seed=2) as sim:
        sim.node(1).start(suppressing, partial(hpcdist.addprocs, 8))
        arrived = one_that_arrives(sim)
        removal = sim.node(1).start_beside(hpcdist.rmprocs, arrived)
        sim.advance(3)
        assert removal.result().done()
        assert arrived not in known_to(sim, 2)


def test_what_comes_alone_is_done_at_once_and_a_crowd_together() -> None:
    with Simulation(nodes=1) as sim:
        node, done = sim.node(1).node, []
        wanted: list[int] = []
        gathering = Gathering(node, lambda: done.append(len(wanted)), lambda: 100)
        sim.node(1).run(ask_in_a_row, node, gathering, wanted)
        assert done == [1]
        sim.advance(0.5)
        assert done == [1, 5]
        sim.node(1).run(gathering.soon)
        assert done == [1, 5, 5]


def ask_in_a_row(node: Node, gathering: Gathering, wanted: list[int]) -> None:
    for k in range(5):
        wanted.append(k)
        gathering.soon()
