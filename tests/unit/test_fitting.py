"""Items of maps and the ends of their workers' jobs, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import ProcessExitedException, imap_unordered, pmap
from hpcdist._runtime.node import here
from hpcdist._wire.member import JobEnd
from hpcdist.testing import Simulation, compute


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=4, seed=3) as made:
        yield made


def end_jobs(walltime: float = 3600, **seconds: float) -> None:
    """Let the jobs of workers end in so many seconds: `w2=30`."""
    now = here.node.machine.time()
    ends = {int(pid[1:]): JobEnd(now + s, walltime) for pid, s in seconds.items()}
    here.node.members.note_ends(ends)


def took(seconds: float) -> tuple[int, float]:
    """Work for so long; return where, and when it was done."""
    compute(seconds)
    return hpcdist.myid(), here.node.machine.time()


def test_no_item_is_given_to_a_worker_whose_job_ends_sooner(sim: Simulation) -> None:
    def program() -> tuple[float, list[tuple[int, float]]]:
        pmap(took, [10.0] * 3)
        begin = here.node.machine.time()
        end_jobs(w2=35)
        return begin + 35, pmap(took, [10.0] * 12)

    end, done = sim.node(1).run(program)
    by_2 = [at for pid, at in done if pid == 2]
    assert 1 <= len(by_2) <= 3
    assert max(by_2) < end
    assert sim.node(1).run(lambda: here.node.members.draining) == {2}


def test_what_an_item_takes_may_be_said(sim: Simulation) -> None:
    def program() -> list[tuple[int, float]]:
        end_jobs(w2=35, w3=5)
        return pmap(took, [1.0] * 12, duration=20)

    assert {pid for pid, _ in sim.node(1).run(program)} == {2, 4}


def test_short_items_go_on_where_long_ones_no_longer_do(sim: Simulation) -> None:
    def program() -> tuple[set[int], set[int]]:
        end_jobs(w2=15)
        long = pmap(took, [20.0] * 4, duration=20)
        end_jobs(w2=15)
        short = pmap(took, [0.5] * 12, duration=0.5)
        return {pid for pid, _ in long}, {pid for pid, _ in short}

    long, short = sim.node(1).run(program)
    assert 2 not in long
    assert 2 in short


def test_more_time_is_used(sim: Simulation) -> None:
    def program() -> tuple[set[int], set[int]]:
        node = here.node
        end_jobs(w2=5)
        node.progress.call_later(10, lambda: end_jobs(w2=1000))
        done = pmap(took, [30.0] * 12, duration=30)
        return {pid for pid, _ in done}, set(node.members.draining)

    assert sim.node(1).run(program) == ({2, 3, 4}, set())


def test_the_end_of_a_job_is_charged_to_no_item(sim: Simulation) -> None:
    """The item of a worker whose job ends runs again, though its like ended three workers."""

    def program() -> list[tuple[int, float]]:
        end_jobs(w2=20, w3=20)
        return list(imap_unordered(took, [50.0, 50.0, 50.0], on_exit="raise"))

    task = sim.node(1).start(program)
    sim.advance(19.5)
    sim.kill(2, 3)
    assert [pid for pid, _ in task.result()] == [4, 4, 4]


def test_an_item_that_fits_into_no_job_is_named(sim: Simulation) -> None:
    def program() -> None:
        end_jobs(w2=100, w3=205, walltime=100)
        pmap(took, [1e5], pool=hpcdist.WorkerPool([2, 3]))

    task = sim.node(1).start(program)
    sim.advance(99.5)
    sim.kill(2)
    sim.advance(105)
    sim.kill(3)
    with pytest.raises(ProcessExitedException, match="item 0 was cut off 2 times") as caught:
        task.result()
    assert "it does not fit into a job of 1:40" in str(caught.value)
    assert caught.value.index == 0  # type: ignore[attr-defined]


def test_a_duration_is_a_number() -> None:
    for wrong in (0, -1, "5", True, math.nan):
        with pytest.raises(ValueError, match="duration is a number of seconds above 0"):
            pmap(abs, [1], duration=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [pmap, hpcdist.imap, imap_unordered])
def test_what_fits_into_no_job_is_refused(sim: Simulation, how: Callable[..., Any]) -> None:
    def program() -> None:
        end_jobs(w2=50, w3=55, w4=58, walltime=60)
        list(how(took, [1.0], duration=60))

    with pytest.raises(ValueError, match=r"duration=60: no item fits into a job.*for 1:00"):
        sim.node(1).run(program)


# Executors


def mapped(items: list[float], **how: Any) -> list[tuple[int, float]]:
    with hpcdist.Executor() as executor:
        return list(executor.map(took, items, **how))


def test_no_task_is_given_to_a_worker_whose_job_ends_sooner(sim: Simulation) -> None:
    def program() -> tuple[float, list[tuple[int, float]]]:
        begin = here.node.machine.time()
        end_jobs(w2=35)
        return begin + 35, mapped([10.0] * 15)

    end, done = sim.node(1).run(program)
    by_2 = [at for pid, at in done if pid == 2]
    assert len(by_2) == 3
    assert max(by_2) < end
    assert sim.node(1).run(lambda: here.node.members.draining) == {2}


@pytest.mark.parametrize("chunksize", [1, 2])
def test_what_an_item_of_an_executor_takes_may_be_said(sim: Simulation, chunksize: int) -> None:
    def program() -> list[tuple[int, float]]:
        end_jobs(w2=50, w3=15)
        return mapped([1.0] * 12, duration=20, chunksize=chunksize)

    assert {pid for pid, _ in sim.node(1).run(program)} == {2, 4}


def test_what_a_task_takes_may_be_said(sim: Simulation) -> None:
    def program() -> set[int]:
        end_jobs(w2=50, w3=15)
        with hpcdist.Executor(duration=20) as executor:
            return {executor.submit(took, 1.0).result()[0] for _ in range(6)}

    assert 3 not in sim.node(1).run(program)


def test_short_tasks_go_on_where_long_ones_no_longer_do(sim: Simulation) -> None:
    def program() -> tuple[set[int], set[int]]:
        end_jobs(w2=15, w3=15)
        long = {pid for pid, _ in mapped([20.0] * 2, duration=20)}
        end_jobs(w2=15, w3=15)
        return long, {pid for pid, _ in mapped([0.5] * 12, duration=0.5)}

    assert sim.node(1).run(program) == ({4}, {2, 3, 4})


def test_more_time_is_used_by_tasks(sim: Simulation) -> None:
    def program() -> set[int]:
        end_jobs(w2=5, w3=5)
        here.node.progress.call_later(10, lambda: end_jobs(w2=1000, w3=1000))
        return {pid for pid, _ in mapped([30.0] * 12, duration=30)}

    assert sim.node(1).run(program) == {2, 3, 4}


def test_the_end_of_a_job_is_charged_to_no_item_of_an_executor(sim: Simulation) -> None:
    def program() -> list[tuple[int, float]]:
        end_jobs(w2=20, w3=20)
        return mapped([50.0] * 3)

    task = sim.node(1).start(program)
    sim.advance(19.5)
    sim.kill(2, 3)
    assert [pid for pid, _ in task.result()] == [4, 4, 4]


def test_another_death_ends_the_task(sim: Simulation) -> None:
    task = sim.node(1).start(mapped, [50.0] * 3)
    sim.advance(5)
    sim.kill(2)
    with pytest.raises(ProcessExitedException):
        task.result()


def test_an_item_of_an_executor_that_fits_into_no_job_is_named(sim: Simulation) -> None:
    def program() -> None:
        end_jobs(w2=100, w3=205, walltime=100)
        with hpcdist.Executor([2, 3]) as executor:
            list(executor.map(took, [1e5]))

    task = sim.node(1).start(program)
    sim.advance(99.5)
    sim.kill(2)
    sim.advance(105)
    sim.kill(3)
    with pytest.raises(ProcessExitedException, match="item 0 was cut off 2 times"):
        task.result()


def test_tasks_that_fit_into_no_job_are_refused(sim: Simulation) -> None:
    def program() -> None:
        end_jobs(w2=50, w3=55, w4=58, walltime=60)
        mapped([1.0], duration=60)

    with pytest.raises(ValueError, match=r"duration=60: no item fits into a job"):
        sim.node(1).run(program)


@pytest.mark.parametrize("duration", [0, -1, "soon", True, math.nan])
def test_nonsense_is_refused_by_executors(sim: Simulation, duration: Any) -> None:
    with pytest.raises(ValueError, match="duration is a number of seconds above 0"):
        sim.node(1).run(lambda: hpcdist.Executor(duration=duration))
    with pytest.raises(ValueError, match="duration is a number of seconds above 0"):
        sim.node(1).run(lambda: mapped([1.0], duration=duration))
