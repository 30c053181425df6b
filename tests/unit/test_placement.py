"""Tasks of several ranks, simulated: which workers run them, in which order, and what is kept."""

from collections.abc import Callable
from typing import Any

import pytest

import hpcdist
from hpcdist import ProcessExitedException, RemoteException, spmd
from hpcdist._cluster import placement
from hpcdist._cluster.sections import Sections
from hpcdist._collective.section_members import SectionMembers
from hpcdist._runtime.node import here
from hpcdist.testing import Simulation, compute

SEEDS = range(6)
INSIDE: dict[int, int] = {}  # workers that run a task, and which
SEEN: list[tuple[int, ...]] = []  # who ran each task, in the order of their ends
MOST: list[int] = []  # how many workers were inside as each task began


@pytest.fixture(autouse=True)
def nobody_inside() -> None:
    INSIDE.clear()
    SEEN.clear()
    MOST.clear()


def task(number: int, seconds: float) -> tuple[int, ...]:
    """Run for so long, with nobody else on any of these workers; return who they are."""
    world = hpcdist.comm()
    me = here.node.me
    assert me not in INSIDE
    INSIDE[me] = number
    try:
        pids = tuple(world.allgather(me))
        MOST.append(len(INSIDE))
        hpcdist.sleep(seconds)
        world.barrier()
    finally:
        assert INSIDE.pop(me) == number
    if world.rank == 0:
        SEEN.append(pids)
    return pids


def fail_at(rank: int) -> tuple[int, ...]:
    world = hpcdist.comm()
    if world.rank == rank:
        raise ValueError(f"rank {rank}")
    world.barrier()
    return ()


def submit_all(counts: list[int], seconds: float = 0.01) -> list[tuple[int, ...]]:
    futures = [spmd.submit(task, k, seconds, ranks=ranks) for k, ranks in enumerate(counts)]
    return [future.fetch() for future in futures]


def comms_made(sim: Simulation) -> int:
    """Count the communicators that the workers of the first world have made."""
    plane: Any = sim.node(2).node.progress.plane
    return len(plane._world.meetings)


def is_tidy(sim: Simulation, pids: list[int]) -> bool:
    """Tell whether nothing is left of any section."""
    nodes = [sim.node(pid).node for pid in pids]
    sections = nodes[0].service(Sections)
    return not (
        sections._active
        or sections._queue
        or any(node.service(SectionMembers)._runs or node.pending for node in nodes)
    )


# Where tasks run


@pytest.mark.parametrize("seed", SEEDS)
def test_many_tasks_run_side_by_side_on_few_communicators(seed: int) -> None:
    with Simulation(nodes=13, per_host=4, seed=seed) as sim:
        found = sim.node(1).run(submit_all, [4] * 40)
        assert max(MOST) == 12
        assert {(pids[0] - 2) % 4 for pids in found} == {0}  # each on one host
        assert all(pids == tuple(range(pids[0], pids[0] + 4)) for pids in found)
        assert comms_made(sim) == 3
        assert is_tidy(sim, list(range(1, 14)))


@pytest.mark.timeout(240)
def test_500_tasks_of_4_ranks_on_32_workers_make_few_communicators() -> None:
    with Simulation(nodes=33, per_host=16, seed=1) as sim:
        sim.trace.is_on = False
        sizes = [4] * 500
        assert list(map(len, sim.node(1).run(submit_all, sizes, 0.1))) == sizes
        assert max(MOST) == 32
        assert comms_made(sim) == 8


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_of_several_sizes_all_run(seed: int) -> None:
    sizes = [1, 8, 3, 5, 2, 7, 4, 8, 6, 1, 2, 3] * 4
    with Simulation(nodes=9, per_host=3, seed=seed) as sim:
        assert list(map(len, sim.node(1).run(submit_all, sizes))) == sizes
        assert is_tidy(sim, list(range(1, 10)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_task_runs_in_one_world(seed: int) -> None:
    with Simulation(nodes=9, worlds=2, seed=seed) as sim:
        found = sim.node(1).run(submit_all, [3, 4, 2, 1, 3, 3, 4, 2] * 3)
        assert all(max(pids) < 6 or min(pids) > 5 for pids in found)


def test_one_host_is_chosen_where_it_has_room_and_the_smallest_that_has() -> None:
    with Simulation(nodes=8, per_host=3, seed=1) as sim:  # hosts: 2-4, 5-7, 8
        run = sim.node(1).run
        assert run(submit_all, [1]) == [(8,)]
        assert run(submit_all, [2]) == [(2, 3)]
        assert run(submit_all, [3]) == [(2, 3, 4)]
        assert run(submit_all, [3, 3], 1.0) == [(2, 3, 4), (5, 6, 7)]
        assert run(submit_all, [4])[0][:3] == (2, 3, 4)


def test_the_workers_may_be_named() -> None:
    with Simulation(nodes=7, seed=1) as sim:

        def named() -> Any:
            pool = hpcdist.WorkerPool([6, 7, 4])
            one = spmd.submit(task, 0, 0, ranks=2, pids=pool)
            return one, spmd(task, 1, 0, ranks=2, pids=[5, 3])

        one, other = sim.node(1).run(named)
        assert set(sim.node(1).run(one.fetch)) <= {4, 6, 7}
        assert other == [(3, 5), (3, 5)]  # all values, as ever


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_that_are_busy_are_not_waited_for_if_others_will_do(seed: int) -> None:
    with Simulation(nodes=7, seed=seed) as sim:
        busy = [sim.node(1).run(hpcdist.remotecall, compute, pid, 50) for pid in (2, 3, 5)]
        found = sim.node(1).run(submit_all, [3, 3, 2])
        assert all(set(pids) <= {4, 6, 7} for pids in found)
        assert sim.now < 40
        assert len(sim.node(1).run(submit_all, [4, 4])[0]) == 4
        assert 50 <= sim.now < 60
        assert [sim.node(1).run(future.fetch) for future in busy] == [None] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_with_a_turn_to_spare_is_not_busy(seed: int) -> None:
    with Simulation(nodes=4, seed=seed, concurrency=2) as sim:
        sim.node(1).run(hpcdist.remotecall, compute, 3, 50)
        assert sim.node(1).run(submit_all, [3, 3]) == [(2, 3, 4)] * 2
        assert sim.now < 40


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_call_too(seed: int) -> None:
    with Simulation(nodes=9, seed=seed) as sim:
        tasks = [sim.node(pid).start(submit_all, [2, 3, 2, 1]) for pid in (1, 2, 5)]
        assert [list(map(len, task.result())) for task in tasks] == [[2, 3, 2, 1]] * 3
        sim.advance(1)
        assert is_tidy(sim, list(range(1, 10)))


# Who comes first


@pytest.mark.parametrize("seed", SEEDS)
def test_a_large_task_is_not_overtaken_for_ever(seed: int) -> None:
    def crowd() -> list[int]:
        small = [spmd.submit(task, k, 0.1, ranks=1) for k in range(30)]
        large = spmd.submit(task, 30, 0.1, ranks=5)
        more = [spmd.submit(task, 31 + k, 0.1, ranks=1) for k in range(30)]
        [future.fetch() for future in (*small, large, *more)]
        return list(map(len, SEEN))

    with Simulation(nodes=7, seed=seed) as sim:
        sizes = sim.node(1).run(crowd)
        assert 26 <= sizes.index(5) <= 36


@pytest.mark.parametrize("seed", SEEDS)
def test_single_calls_and_tasks_go_on_beside_each_other(seed: int) -> None:
    def beside() -> tuple[float, float]:
        now = here.node.machine.now
        tasks = [spmd.submit(task, k, 0.1, ranks=4) for k in range(40)]
        begin = now()
        calls = [hpcdist.remotecall(compute, 2 + k % 4, 0.1) for k in range(40)]
        [future.fetch() for future in calls]
        called = now() - begin
        [future.fetch() for future in tasks]
        return called, now() - begin

    with Simulation(nodes=5, seed=seed) as sim:
        called, ended = sim.node(1).run(beside)
        assert called < 2.5  # 1 s of work on each, and not behind 4 s of tasks
        assert ended < 6


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_get_their_turn_beside_a_map(seed: int) -> None:
    def beside() -> list[tuple[int, ...]]:
        found = hpcdist.imap(compute, [0.01] * 2000)
        next(found)
        tasks = submit_all([4, 2, 3] * 5, 0)
        assert next(found) is None
        found.close()
        return tasks

    with Simulation(nodes=5, seed=seed) as sim:
        sim.trace.is_on = False
        assert list(map(len, sim.node(1).run(beside))) == [4, 2, 3] * 5
        assert sim.now < 4


# What cannot be


@pytest.mark.parametrize(
    ("ranks", "error", "words"),
    [
        (0, ValueError, "1 or more, not 0"),
        (-2, ValueError, "1 or more, not -2"),
        (True, TypeError, "whole number, not True"),
        ("4", TypeError, "whole number, not '4'"),
        (2.0, TypeError, "whole number, not 2.0"),
        (5, ValueError, "ranks=5 .* the largest world there are has 4"),
    ],
)
def test_what_ranks_cannot_be(ranks: Any, error: type[Exception], words: str) -> None:
    with Simulation(nodes=8, worlds=2, seed=1) as sim:
        with pytest.raises(error, match=words):
            sim.node(1).run(lambda: spmd.submit(task, 0, 0, ranks=ranks))
        with pytest.raises(error, match=words):
            sim.node(3).run(lambda: spmd.submit(task, 0, 0, ranks=ranks).fetch())


def test_workers_without_mpi_have_no_ranks() -> None:
    with Simulation(nodes=4, isolation="process", seed=1) as sim:
        with pytest.raises(ValueError, match="isolation is 'process'"):
            sim.node(1).run(lambda: spmd.submit(task, 0, 0, ranks=2))


def test_a_task_cannot_wait_for_its_own_workers() -> None:
    inner: Callable[[int], object] = lambda ranks: spmd.submit(task, 0, 0, ranks=ranks).fetch()
    with Simulation(nodes=4, seed=1) as sim:
        with pytest.raises(RuntimeError, match="only 2 workers are outside"):
            sim.node(1).run(lambda: spmd(inner, 3, ranks=1, grace=0.1))
        assert sim.node(1).run(lambda: spmd(inner, 2, ranks=1)) == [(3, 4)]


# Failures and deaths


@pytest.mark.parametrize("seed", SEEDS)
def test_an_error_ends_its_own_task_alone(seed: int) -> None:
    def some_fail() -> list[Any]:
        futures = []
        for k in range(12):
            f, first = (fail_at, 1) if k % 3 == 0 else (task, k)
            rest = () if f is fail_at else (0.1,)
            futures.append(spmd.submit(f, first, *rest, ranks=2, grace=0.5))
        return [future.exception() for future in futures]

    with Simulation(nodes=7, seed=seed) as sim:
        errors = sim.node(1).run(some_fail)
        assert [error is not None for error in errors] == [True, False, False] * 4
        assert all(isinstance(errors[k], RemoteException) for k in range(0, 12, 3))
        assert is_tidy(sim, list(range(1, 8)))
        assert len(sim.node(1).run(hpcdist.workers)) == 6


@pytest.mark.parametrize("seed", SEEDS)
def test_a_death_ends_its_own_task_alone(seed: int) -> None:
    def outcomes() -> list[Any]:
        futures = [spmd.submit(task, k, 0.2, ranks=2, grace=0.5) for k in range(20)]
        return [future.exception() for future in futures]

    with Simulation(nodes=8, seed=seed) as sim:
        running = sim.node(1).start(outcomes)
        sim.advance(0.1 + 0.05 * seed)
        sim.kill(3)
        errors = [error for error in running.result() if error is not None]
        assert len(errors) == 1
        assert isinstance(errors[0], ProcessExitedException)
        assert errors[0].pid == 3
        living = [1, 2, *range(4, 9)]
        assert is_tidy(sim, living)


def test_a_task_for_which_too_few_are_left_fails() -> None:
    with Simulation(nodes=5, seed=1) as sim:
        first = sim.node(1).run(lambda: spmd.submit(task, 0, 5, ranks=4, grace=0.1))
        second = sim.node(1).run(lambda: spmd.submit(task, 1, 0, ranks=4))
        third = sim.node(1).run(lambda: spmd.submit(task, 2, 0, ranks=3))
        sim.advance(1)
        sim.kill(4)
        INSIDE.clear()
        with pytest.raises(ProcessExitedException):
            sim.node(1).run(first.fetch)
        with pytest.raises(ValueError, match=r"ranks=4 .* has 3"):
            sim.node(1).run(second.fetch)
        assert sim.node(1).run(third.fetch) == (2, 3, 5)


def test_a_task_waits_for_workers_that_come_in_the_place_of_the_dead() -> None:
    with Simulation(nodes=4, seed=1, renew=True) as sim:
        first = sim.node(1).run(lambda: spmd.submit(task, 0, 5, ranks=3, grace=0.1))
        second = sim.node(1).run(lambda: spmd.submit(task, 1, 0, ranks=3))
        sim.advance(1)
        sim.kill(3)
        INSIDE.clear()
        with pytest.raises(ProcessExitedException):
            sim.node(1).run(first.fetch)
        assert sim.node(1).run(second.fetch) == (5, 6, 7)


def test_a_caller_that_dies_leaves_nothing_waiting() -> None:
    with Simulation(nodes=6, seed=1) as sim:
        sim.node(6).start(submit_all, [3, 3, 4, 2])
        sim.advance(0.003)
        sim.kill(6)
        sim.advance(20)
        INSIDE.clear()
        assert list(map(len, sim.node(1).run(submit_all, [4, 2]))) == [4, 2]
        sim.advance(5)
        assert is_tidy(sim, [1, 2, 3, 4, 5])


# Communicators


def test_communicators_that_are_unused_for_long_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "KEPT_MOST", 3)
    with Simulation(nodes=6, seed=1) as sim:
        run = sim.node(1).run
        run(lambda: spmd(task, 0, 0, pids=[2, 6]))  # named: never freed
        for first in range(2, 6):
            for second in range(first + 1, 7):
                run(lambda: spmd(task, 0, 0, ranks=2, pids=[first, second]))  # noqa: B023
        run(lambda: spmd(task, 0, 0))  # all hear what they are to free
        members = [sim.node(pid).node.service(SectionMembers) for pid in range(2, 7)]
        assert sum(len(member._kept) for member in members) == 2 * (3 + 1) + 5
        made = comms_made(sim)
        assert run(lambda: spmd(task, 0, 0, ranks=2, pids=[5, 6])) == [(5, 6)] * 2
        assert comms_made(sim) == made
        assert run(lambda: spmd(task, 0, 0, ranks=2, pids=[2, 3])) == [(2, 3)] * 2
        assert comms_made(sim) == made + 1
