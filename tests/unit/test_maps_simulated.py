"""Pools, maps and executors on simulated clusters."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import ProcessExitedException, RemoteException, WorkerPool, imap, imap_unordered, pmap
from hpcdist._maps.engine import Maps
from hpcdist._maps.kept_functions import KeptFunctions
from hpcdist._maps.map_worker import Batches
from hpcdist._maps.pool_state import Pools
from hpcdist._runtime.node import Node
from hpcdist.testing import Simulation, compute

EACH = (pmap, imap, imap_unordered)


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=4, seed=5) as made:
        yield made


def nap(x: int) -> int:
    hpcdist.sleep(0.01)
    return x


def whose(x: int) -> int:
    hpcdist.sleep(0.1)
    return hpcdist.myid()


def mapped(run: Callable[..., Any], items: int) -> list[int]:
    """Map over some items, whichever way."""
    return sorted(run(nap, range(items)))


def take(pool: WorkerPool) -> int:
    return pool.take()


def left_behind() -> tuple[int, int, int]:
    """Count what this process still has of maps: its own, batches, functions."""
    return (
        len(Maps.here().engines),
        len(Batches.here()._active),
        len(KeptFunctions.here()._kept),
    )


# --- services -------------------------------------------------------------------------------------


def test_processes_have_pools_of_their_own() -> None:
    one, other = Node(), Node()
    one.service(Pools).own((1, 5), [2, 3])
    state = one.service(Pools).state_of((1, 5))
    assert state is not None
    assert state.size() == 2
    assert other.service(Pools).state_of((1, 5)) is None


def test_processes_keep_functions_of_their_own() -> None:
    one, other = Node(), Node()
    one.service(KeptFunctions).call_first((2, 1), len, ("abc",), {})
    assert one.service(KeptFunctions).get((2, 1)) is len
    assert other.service(KeptFunctions)._kept == {}


# --- pools ----------------------------------------------------------------------------------------


def test_a_pool_serves_its_takers_in_order(sim: Simulation) -> None:
    def lend() -> None:
        pool = WorkerPool([4])
        assert pool.take() == 4
        takers = []
        for pid in (3, 2):
            takers.append(hpcdist.remotecall(take, pid, pool))
            hpcdist.sleep(1)
        for taker in takers:
            assert not taker.done()
            pool.put(4)
            assert taker.fetch() == 4

    sim.node(1).run(lend)


def test_a_pool_gets_back_what_the_dead_have_borrowed(sim: Simulation) -> None:
    pool = sim.node(1).run(WorkerPool, [4])
    assert sim.node(1).run(hpcdist.remotecall_fetch, take, 2, pool) == 4
    assert not sim.node(1).run(pool.isready)
    sim.kill(2)
    assert sim.node(1).run(pool.take) == 4


def test_a_taker_that_has_died_is_passed_over(sim: Simulation) -> None:
    pool = sim.node(1).run(WorkerPool, [4])
    assert sim.node(1).run(pool.take) == 4
    for pid in (2, 3):
        sim.node(1).run(hpcdist.remotecall, take, pid, pool)
        sim.advance(1)
    sim.kill(2)
    sim.advance(1)
    sim.node(1).run(pool.put, 4)
    sim.advance(1)
    assert not sim.node(1).run(pool.isready)
    sim.kill(3)
    assert sim.node(1).run(pool.take) == 4


def test_a_member_that_dies_leaves_its_pool(sim: Simulation) -> None:
    pool = sim.node(1).run(WorkerPool, [3, 4])
    sim.kill(3)
    sim.advance(1)
    assert sim.node(1).run(pool.workers) == [4]
    sim.kill(4)
    sim.advance(1)
    with pytest.raises(RuntimeError, match="No active worker"):
        sim.node(1).run(pool.take)


def test_the_default_pool_takes_in_who_joins(sim: Simulation) -> None:
    pool = sim.node(1).run(hpcdist.default_worker_pool)
    assert sim.node(1).run(hpcdist.addprocs, 1) == [5]
    assert sim.node(1).run(pool.workers) == [2, 3, 4, 5]
    sim.advance(1)
    assert sim.node(5).run(lambda: hpcdist.default_worker_pool().workers()) == [2, 3, 4, 5]


# --- maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", EACH)
@pytest.mark.parametrize("caller", [1, 2])
def test_items_of_dead_workers_run_elsewhere(
    sim: Simulation, run: Callable[..., Any], caller: int
) -> None:
    task = sim.node(caller).start(mapped, run, 60)
    for pid in (3, 4):
        sim.advance(0.05)
        sim.kill(pid)
    assert task.result() == list(range(60))


@pytest.mark.parametrize("seed", range(6))
def test_maps_at_once_end_in_any_order(seed: int) -> None:
    with Simulation(nodes=5, seed=seed, unrest=0.01) as sim:
        tasks = [sim.node(k % 2 + 1).start(mapped, run, 40) for k, run in enumerate(EACH)]
        sim.advance(0.02)
        sim.kill(4)
        for task in tasks:
            assert task.result() == list(range(40))
        sim.advance(10)
        assert [sim.node(pid).run(left_behind) for pid in (1, 2, 3, 5)] == [(0, 0, 0)] * 4


def test_who_joins_gets_items(sim: Simulation) -> None:
    task = sim.node(2).start(pmap, whose, range(300))
    sim.advance(0.1)
    assert sim.node(1).run(hpcdist.addprocs, 1) == [5]
    assert set(task.result()) == {2, 3, 4, 5}


def test_a_map_without_workers_says_which_died(sim: Simulation) -> None:
    task = sim.node(1).start(mapped, pmap, 300)
    sim.advance(0.1)
    for pid in (2, 3, 4):
        sim.kill(pid)
    with pytest.raises(ProcessExitedException, match="killed by SIGKILL"):
        task.result()


def test_a_map_that_is_given_up_leaves_nothing(sim: Simulation) -> None:
    def some() -> list[int]:
        results = imap(nap, itertools.count())
        found = list(itertools.islice(results, 5))
        results.close()
        return found

    assert sim.node(1).run(some) == list(range(5))
    sim.advance(10)
    assert [sim.node(pid).run(left_behind) for pid in (1, 2, 3, 4)] == [(0, 0, 0)] * 4


# --- executors ------------------------------------------------------------------------------------


def test_a_death_costs_an_executor_one_task(sim: Simulation) -> None:
    def submit() -> list[BaseException | None]:
        with hpcdist.Executor() as executor:
            futures = [executor.submit(nap, k) for k in range(60)]
        return [future.exception() for future in futures]

    task = sim.node(1).start(submit)
    sim.advance(0.1)
    sim.kill(3)
    errors = [error for error in task.result() if error is not None]
    assert len(errors) <= 1
    assert all(isinstance(error, ProcessExitedException) for error in errors)


def test_an_executor_of_a_worker_has_tasks_that_submit(sim: Simulation) -> None:
    def twice(x: int) -> int:
        with hpcdist.Executor([3]) as executor:
            return executor.submit(nap, x).result() + executor.submit(nap, x).result()

    def both() -> list[int]:
        with hpcdist.Executor([3]) as executor:
            return list(executor.map(twice, range(3)))

    assert sim.node(2).run(both) == [0, 2, 4]


def test_a_worker_that_comes_into_a_pool_gets_what_waits(sim: Simulation) -> None:
    def long() -> int:
        compute(100)
        return hpcdist.myid()

    def run() -> list[int]:
        pool = WorkerPool([2])
        with hpcdist.Executor(pool) as executor:
            futures = [executor.submit(long) for _ in range(2)]
            hpcdist.sleep(1)
            pool.push(3)
            return [future.result() for future in futures]

    began = sim.now
    assert sorted(sim.node(1).run(run)) == [2, 3]
    assert sim.now - began < 110


def test_a_pool_of_multiprocessings_kind(sim: Simulation) -> None:
    def run() -> tuple[list[int], list[int]]:
        with hpcdist.Pool() as pool:
            return pool.map(nap, range(20)), list(pool.imap(nap, range(20)))

    assert sim.node(1).run(run) == (list(range(20)), list(range(20)))


# --- trying again ---------------------------------------------------------------------------------


def fails_on(pid: int) -> int:
    if hpcdist.myid() == pid:
        raise ValueError(pid)
    return hpcdist.myid()


@pytest.mark.parametrize("seed", range(4))
def test_an_item_that_failed_goes_to_another_worker(seed: int) -> None:
    with Simulation(nodes=4, seed=seed) as sim:
        for pids in ([2], [3], [4], [4, 3, 2]):
            got = sim.node(1).run(pmap, fails_on, pids, retry_delays=[0.0])
            assert all(where != pid for where, pid in zip(got, pids, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_an_item_that_failed_does_not_wait_for_a_busier_worker(seed: int) -> None:
    """One of the two is in a long item: the other tries again, though it has failed."""
    with Simulation(nodes=3, seed=seed) as sim:

        def attempts() -> list[int]:
            counter = hpcdist.RemoteChannel[int](100)

            def work(item: int) -> None:
                if item == 0:
                    hpcdist.sleep(100)
                    return
                counter.put(hpcdist.myid())
                raise ValueError("no")

            with pytest.raises(RemoteException, match="no"):
                pmap(work, [0, 1], retry_delays=[0.1] * 3, batch_size=1)
            return [counter.take() for _ in range(4)]

        begin = sim.now
        assert len(set(sim.node(1).run(attempts))) == 1
        assert sim.now - begin < 101


def test_a_function_that_comes_from_the_dead_is_not_kept() -> None:
    """It was under way while its sender died: the word of that came by another way."""
    with Simulation(nodes=3, seed=5) as sim:
        sim.delay(0.5, between=[2, 3])
        sim.node(2).start(lambda: pmap(abs, range(4), pool=WorkerPool([3])))
        sim.advance(0.1)
        sim.kill(2)
        sim.advance(5)
        assert not sim.node(3).node.service(KeptFunctions)._kept
        assert sim.node(1).run(lambda: pmap(abs, range(4))) == [0, 1, 2, 3]
