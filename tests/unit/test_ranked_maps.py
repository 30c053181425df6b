"""Maps with `ranks=`, simulated: errors, deaths, random numbers, checkpoints, endings."""

from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import ProcessExitedException, imap, imap_unordered, pmap
from hpcdist._cluster.sections import Sections
from hpcdist._runtime.node import here
from hpcdist.testing import Simulation

SEEDS = range(5)
RUN: list[int] = []  # items that rank 0 has begun


@pytest.fixture(autouse=True)
def nothing_run() -> None:
    RUN.clear()


def square(x: int, seconds: float = 0.01) -> int:
    world = hpcdist.comm()
    if world.rank == 0:
        RUN.append(x)
    hpcdist.sleep(seconds)
    return int(world.allreduce(x)) * x // world.size


def fail_on_7(x: int) -> int:
    if x != 7:
        return square(x)
    if hpcdist.comm().rank == 1:
        raise ValueError("seven")
    return 49


def drawn(x: int) -> list[float]:
    return hpcdist.comm().allgather(round(hpcdist.rng().random(), 6))


def who(x: int) -> list[int]:
    return hpcdist.comm().allgather(here.node.me)


def not_7(error: BaseException) -> bool:
    return "seven" not in str(error)


async def asynchronous(x: int) -> int:
    return square(x)


SQUARES = [x * x for x in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_maps(seed: int) -> None:
    with Simulation(nodes=8, seed=seed) as sim:
        run = sim.node(1).run
        assert run(lambda: pmap(square, range(20), ranks=3)) == SQUARES
        assert run(lambda: list(imap(square, iter(range(20)), ranks=2))) == SQUARES
        assert run(lambda: sorted(imap_unordered(square, range(20), ranks=2))) == SQUARES
        assert run(lambda: pmap(square, range(20), [0.02] * 20, ranks=7)) == SQUARES
        assert run(lambda: pmap(asynchronous, range(20), ranks=4)) == SQUARES
        assert run(lambda: pmap(square, [], ranks=4)) == []
        assert sim.node(3).run(lambda: pmap(square, range(20), ranks=3)) == SQUARES


@pytest.mark.parametrize("seed", SEEDS)
def test_an_item_that_fails_ends_the_map_and_is_named(seed: int) -> None:
    with Simulation(nodes=7, seed=seed) as sim:
        with pytest.raises(ValueError, match="seven") as caught:
            sim.node(1).run(lambda: pmap(fail_on_7, range(1000), ranks=2))
        assert (caught.value.index, caught.value.item) == (7, 7)  # type: ignore[attr-defined]
        assert len(RUN) < 30
        sim.advance(1)
        assert not sim.node(1).node.service(Sections)._queue


@pytest.mark.parametrize("seed", SEEDS)
def test_on_error_and_retries(seed: int) -> None:
    with Simulation(nodes=7, seed=seed) as sim:
        handled = lambda error: (str(error), error.index, hpcdist.myid() > 1)
        found: Any = sim.node(1).run(lambda: pmap(fail_on_7, range(20), ranks=2, on_error=handled))
        assert found == [*SQUARES[:7], ("seven", 7, True), *SQUARES[8:]]
        with pytest.raises(ValueError, match="seven"):
            sim.node(1).run(lambda: pmap(fail_on_7, range(20), ranks=2, retry_delays=[1, 2]))
        assert sim.now > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_items_before_one_that_failed_are_still_given_in_order(seed: int) -> None:
    def some() -> list[int]:
        found: list[int] = []
        with pytest.raises(ValueError, match="seven"):
            for value in imap(fail_on_7, range(100), ranks=2, retry_delays=[1], retry_check=not_7):
                found.append(value)
        return found

    with Simulation(nodes=9, seed=seed) as sim:
        task = sim.node(1).start(some)
        sim.advance(0.011)
        sim.kill(3)  # what it ran runs again
        assert task.result() == SQUARES[:7]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_death_costs_nothing(seed: int) -> None:
    with Simulation(nodes=8, seed=seed) as sim:
        task = sim.node(1).start(lambda: pmap(square, range(20), [0.2] * 20, ranks=2))
        sim.advance(0.1 + 0.1 * seed)
        sim.kill(4)
        assert task.result() == SQUARES


def test_a_death_ends_the_map_if_it_is_told_to() -> None:
    with Simulation(nodes=8, seed=1) as sim:
        how: Any = {"ranks": 2, "on_exit": "raise"}
        task = sim.node(1).start(lambda: pmap(square, range(20), [0.2] * 20, **how))
        sim.advance(0.3)
        sim.kill(4)
        with pytest.raises(ProcessExitedException) as caught:
            task.result()
        assert caught.value.pid == 4


def test_a_map_for_which_too_few_are_left_ends_with_the_death() -> None:
    with Simulation(nodes=5, seed=1) as sim:
        task = sim.node(1).start(lambda: pmap(square, range(20), [0.2] * 20, ranks=4))
        sim.advance(0.3)
        sim.kill(4)
        with pytest.raises(ProcessExitedException):
            task.result()


def test_a_map_goes_on_with_workers_that_come_in_the_place_of_the_dead() -> None:
    with Simulation(nodes=5, seed=1, renew=True) as sim:
        task = sim.node(1).start(lambda: pmap(square, range(20), [0.2] * 20, ranks=4))
        sim.advance(0.3)
        sim.kill(4)
        assert task.result() == SQUARES


def test_each_rank_draws_its_own_numbers_the_same_wherever_it_runs() -> None:
    found = []
    for nodes in (4, 8):
        with Simulation(nodes=nodes, seed=nodes) as sim:
            found.append(sim.node(1).run(lambda: pmap(drawn, range(9), ranks=3, seed=5)))
    assert found[0] == found[1]
    assert len({number for item in found[0] for number in item}) == 27


def test_a_map_that_is_closed_leaves_nothing_waiting() -> None:
    with Simulation(nodes=5, seed=1) as sim:

        def some() -> list[int]:
            results = imap_unordered(square, range(1000), ranks=2)
            found = [next(results) for _ in range(4)]
            results.close()
            return found

        assert len(sim.node(1).run(some)) == 4
        sim.advance(5)
        assert len(RUN) < 12
        assert not sim.node(1).node.service(Sections)._queue


def test_a_checkpoint(tmp_path: Path) -> None:
    file = str(tmp_path / "some.ckpt")
    with Simulation(nodes=5, seed=1) as sim:
        with pytest.raises(ValueError, match="seven"):
            sim.node(1).run(lambda: pmap(fail_on_7, range(20), ranks=2, checkpoint=file))
        RUN.clear()
        how: Any = {"ranks": 2, "checkpoint": file, "on_error": lambda error: 49}
        assert sim.node(1).run(lambda: pmap(fail_on_7, range(20), **how)) == SQUARES
        assert not set(RUN) & set(range(5))


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"ranks": 0}, ValueError, "1 or more"),
        ({"ranks": True}, TypeError, "whole number"),
        ({"ranks": "4"}, TypeError, "whole number"),
        ({"ranks": 5}, ValueError, "the largest world there are has 4"),
        ({"ranks": 2, "batch_size": 3}, ValueError, "a task of its own"),
        ({"ranks": 2, "distributed": False}, ValueError, "needs workers"),
        ({"ranks": 2, "pool": "gpu"}, ValueError, "tag"),
    ],
)
def test_what_cannot_be(how: Any, error: type[Exception], words: str) -> None:
    with Simulation(nodes=5, seed=1) as sim, pytest.raises(error, match=words):
        sim.node(1).run(lambda: pmap(square, range(3), **how))


# The executor


def prepare(name: str) -> None:
    RUN.append(here.node.me)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_executor(seed: int) -> None:
    def use() -> Any:
        with hpcdist.Executor(ranks=2) as executor:
            one = executor.submit(square, 3)
            assert list(executor.map(square, range(20))) == SQUARES
            assert list(executor.map(square, range(20), chunksize=6)) == SQUARES
            first, second = (list(executor.map(drawn, range(6), seed=5)) for _ in range(2))
            assert first == second
            assert len({number for item in first for number in item}) == 12
            failing = executor.submit(fail_on_7, 7)
            with pytest.raises(ValueError, match="seven"):
                failing.result()
            return one.result()

    with Simulation(nodes=8, seed=seed) as sim:
        assert sim.node(1).run(use) == 9


def test_an_executor_prepares_the_workers_that_it_uses() -> None:
    def use() -> Any:
        how: Any = {"initializer": prepare, "initargs": ("x",), "max_workers": 4}
        with hpcdist.Executor(ranks=2, **how) as executor:
            return list(executor.map(who, range(20)))

    with Simulation(nodes=8, seed=1) as sim:
        used = {pid for pids in sim.node(1).run(use) for pid in pids}
        assert used == {2, 3, 4, 5}
        assert sorted(RUN) == [2, 3, 4, 5]


def test_a_death_costs_an_executor_one_task() -> None:
    def use() -> Any:
        with hpcdist.Executor(ranks=2) as executor:
            futures = [executor.submit(square, k, 0.2) for k in range(20)]
            return [future.exception() for future in futures]

    with Simulation(nodes=8, seed=1) as sim:
        task = sim.node(1).start(use)
        sim.advance(0.3)
        sim.kill(4)
        errors = [error for error in task.result() if error is not None]
        assert [type(error) for error in errors] == [ProcessExitedException]


def test_what_an_executor_cannot_be() -> None:
    def fail(**how: Any) -> None:
        hpcdist.Executor(**how).submit(square, 1).result()

    with Simulation(nodes=5, seed=1) as sim:
        for how in ({"ranks": 0}, {"ranks": 3, "max_workers": 2}, {"ranks": 5}):
            with pytest.raises(ValueError, match="ranks"):
                sim.node(1).run(fail, **how)
        with pytest.raises(TypeError, match="ranks"):
            sim.node(1).run(fail, ranks="4")
