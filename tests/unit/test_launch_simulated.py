"""Launches and worlds, simulated: from the first worker asked for to the last one gone."""

import pytest

import hpcdist
from hpcdist.testing import Simulation

pytestmark = pytest.mark.any_mpi
SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_launch_is_one_world_more(seed: int) -> None:
    with Simulation(nodes=3, seed=seed) as sim:
        new = sim.node(1).run(hpcdist.addprocs, 3)
        assert new == [4, 5, 6]
        living = sim.node(1).node.members.living
        assert len({living[pid].world for pid in new}) == 1
        assert living[4].world != living[2].world
        assert sim.node(1).run(hpcdist.nworkers) == 5


@pytest.mark.parametrize("seed", SEEDS)
def test_launches_at_once_get_workers_of_their_own(seed: int) -> None:
    with Simulation(nodes=2, seed=seed) as sim:
        tasks = [sim.node(1).start_beside(hpcdist.addprocs, 2) for _ in range(3)]
        got = [pid for task in tasks for pid in task.result()]
        assert sorted(got) == [3, 4, 5, 6, 7, 8]
        assert sim.node(1).run(hpcdist.workers) == [2, *sorted(got)]


@pytest.mark.parametrize("seed", SEEDS)
def test_who_was_removed_is_gone_for_all(seed: int) -> None:
    with Simulation(nodes=5, seed=seed) as sim:
        sim.node(1).run(hpcdist.rmprocs, 3, 5)
        sim.advance(5)
        assert [sim.has_ended(pid) for pid in (2, 3, 4, 5)] == [False, True, False, True]
        for pid in (1, 2, 4):
            assert sorted(sim.node(pid).node.members.gone) == [3, 5]
        assert sim.node(1).run(hpcdist.workers) == [2, 4]


def test_the_loss_of_a_world_leaves_the_others() -> None:
    with Simulation(nodes=7, worlds=3) as sim:
        sim.lose_world(2)
        sim.advance(10)
        assert sim.node(1).run(hpcdist.workers) == [2, 3, 6, 7]
        assert sim.node(1).run(hpcdist.addprocs, 1) == [8]  # no number comes twice
