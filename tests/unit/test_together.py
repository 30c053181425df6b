"""What processes do together, simulated: trees, reductions, loops, values that many have."""

import operator
from contextlib import suppress
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    CompositeException,
    ProcessExitedException,
    RemoteException,
    RemoteValue,
)
from hpcdist._collective.remote_values import RemoteValues
from hpcdist._collective.trees import WIDTH, Trees
from hpcdist._runtime.node import Node, here
from hpcdist._runtime.references import References
from hpcdist.testing import Simulation

LARGE = bytes(range(256)) * 40_000  # 10 MB: three pieces
SEEDS = range(8)


DONE: list[int] = []  # what functions have done, on whichever process


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    DONE.clear()


def pid_here() -> int:
    return here.node.me


def note(item: int) -> None:
    DONE.append(item)


def pid_as_text() -> str:
    return f"{here.node.me} "


def pid_after_a_while() -> int:
    DONE.append(here.node.me)
    hpcdist.sleep(0.01 * here.node.me)
    return here.node.me


def nodes_of(sim: Simulation, count: int, but: int = 0) -> list[Node]:
    return [sim.node(pid).node for pid in range(1, count + 1) if pid != but]


def values_of(node: Node) -> dict[Any, Any]:
    return node.service(RemoteValues).copies.held


def nothing_is_left(nodes: list[Node]) -> bool:
    """Tell whether nothing is held for anybody."""
    return not any(
        values_of(node)
        or node.service(References).owned
        or node.pending
        or any(job.waiting for job in node.service(Trees).jobs.values())
        for node in nodes
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_call_on_all_goes_down_a_tree(seed: int) -> None:
    pids = list(range(2, 34))
    with Simulation(nodes=33, seed=seed) as sim:
        before = [sim.traffic(1, pid).messages for pid in pids]
        found = sim.node(1).run(lambda: hpcdist.everywhere.call(pid_here, pids=pids))
        assert found == {pid: pid for pid in pids}
        after = [sim.traffic(1, pid).messages for pid in pids]
        assert sum(after) - sum(before) == WIDTH
        assert not sim.node(1).node.service(Trees).jobs


@pytest.mark.parametrize("seed", SEEDS)
def test_a_death_in_a_tree_costs_one_result(seed: int) -> None:
    """Those below the dead one are asked again, and what they have done they do not do twice."""
    pids = list(range(2, 23))
    with Simulation(nodes=22, seed=seed) as sim:
        task = sim.node(1).start(lambda: hpcdist.everywhere.call(pid_after_a_while, pids=pids))
        sim.advance(0.003 * seed)
        sim.kill(2 + seed)
        with pytest.raises(ProcessExitedException) as caught:
            task.result()
        assert caught.value.pid == 2 + seed
        assert sorted({*DONE, 2 + seed}) == pids
        assert len(DONE) == len(set(DONE))


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_are_combined_in_order(seed: int) -> None:
    count = 3 + seed * 2
    pids = list(range(2, count + 1))
    with Simulation(nodes=count, seed=seed) as sim:
        for _ in range(2):  # the second time the parts are known to be small
            found = sim.node(1).run(lambda: hpcdist.reduce(operator.add, pid_as_text, pids=pids))
            assert found == "".join(f"{pid} " for pid in pids)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reduction_ends_though_one_dies(seed: int) -> None:
    with Simulation(nodes=18, seed=seed) as sim:
        task = sim.node(1).start(
            lambda: hpcdist.reduce(lambda a, b: a + b, pid_after_a_while, pids=range(2, 19))
        )
        sim.advance(0.002 * seed)
        sim.kill(2 + seed)
        with pytest.raises((ProcessExitedException, CompositeException)) as caught:
            task.result()
        errors = getattr(caught.value, "exceptions", [caught.value])
        assert {error.pid for error in errors} == {2 + seed}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loop_runs_each_item_once(seed: int) -> None:
    with Simulation(nodes=6, seed=seed) as sim:
        handle = sim.node(1).run(lambda: hpcdist.distributed(range(40))(note))
        sim.node(1).run(handle.wait)
        assert sorted(DONE) == list(range(40))
        total = sim.node(1).run(lambda: hpcdist.distributed(range(40), operator.add)(abs))
        assert total == sum(range(40))


def test_an_error_in_a_loop_says_where() -> None:
    with Simulation(nodes=4, seed=3) as sim:
        with pytest.raises(RemoteException) as caught:
            sim.node(1).run(lambda: hpcdist.distributed(range(9), max)(lambda k: 1 // (k - 4)))
        assert caught.value.pid == 3
        assert "In item 4 of the loop" in str(caught.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_broadcast_reaches_all_that_live(seed: int) -> None:
    pids = list(range(2, 12))
    with Simulation(nodes=11, seed=seed) as sim:
        task = sim.node(1).start(lambda: hpcdist.bcast(LARGE, pids=pids))
        sim.advance(0.0004 * seed)
        sim.kill(4)
        with suppress(ProcessExitedException):  # unless it was over
            sim.node(1).run(task.result().free)
        value = sim.node(1).run(lambda: hpcdist.bcast(LARGE, pids=[2, 5, 11]))
        for pid in (2, 5, 11):
            (copy,) = values_of(sim.node(pid).node).values()
            assert copy.load() == LARGE
        sim.node(1).run(value.free)
        sim.advance(1)
        assert nothing_is_left(nodes_of(sim, 11, but=4))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_end_of_a_value_goes_down_a_tree(seed: int) -> None:
    pids = list(range(2, 34))
    with Simulation(nodes=33, seed=seed) as sim:
        value = sim.node(1).run(lambda: hpcdist.bcast([1, 2], pids=pids))
        before = [sim.traffic(1, pid).messages for pid in pids]
        sim.node(1).run(value.free)
        if seed % 2:
            sim.advance(0.0001 * seed)
            sim.kill(3)  # it leads others
        sim.advance(1)
        after = [sim.traffic(1, pid).messages for pid in pids]
        assert nothing_is_left(nodes_of(sim, 33, but=3 if seed % 2 else 0))
        if not seed % 2:
            assert sum(after) - sum(before) <= WIDTH


@pytest.mark.parametrize("value", [[1, 2], LARGE], ids=["small", "large"])
@pytest.mark.parametrize("seed", SEEDS)
def test_ctrl_c_leaves_no_copy_of_a_value(seed: int, value: object) -> None:
    """The word that it is freed must not overtake the value."""
    with Simulation(nodes=9, seed=seed) as sim:
        task = sim.node(1).start(lambda: hpcdist.bcast(value, pids=range(2, 10)).free())
        sim.advance(0.0002)
        sim.press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            task.result()
        sim.advance(1)
        assert nothing_is_left(nodes_of(sim, 9))


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_go_with_their_handles(seed: int) -> None:
    with Simulation(nodes=5, seed=seed) as sim:

        def use() -> list[int]:
            parts = hpcdist.scatter(range(10), pids=[2, 3, 4])
            assert all(isinstance(part, RemoteValue) for part in parts)
            return [item for part in hpcdist.gather(parts) for item in part]

        assert sim.node(5).run(use) == list(range(10))
        sim.advance(1)
        assert nothing_is_left(nodes_of(sim, 5))


@pytest.mark.parametrize("seed", SEEDS)
def test_values_go_with_their_owner(seed: int) -> None:
    with Simulation(nodes=5, seed=seed) as sim:
        kept = sim.node(3).run(lambda: hpcdist.bcast([1, 2], pids=[2, 4]))
        assert [len(values_of(node)) for node in nodes_of(sim, 5)] == [0, 1, 1, 1, 0]
        sim.kill(3)
        sim.advance(1)
        assert nothing_is_left(nodes_of(sim, 5, but=3))
        kept._held = 0  # its process is dead


def test_one_seed_gives_one_run() -> None:
    def trace() -> str:
        with Simulation(nodes=9, seed=5) as sim:
            sim.node(1).run(lambda: hpcdist.bcast(LARGE, pids=range(2, 10)).free())
            sim.node(1).run(lambda: hpcdist.distributed(range(40), operator.add)(abs))
            sim.node(1).run(lambda: hpcdist.distributed(range(40), operator.add)(abs))
            return str(sim.trace)

    assert trace() == trace()
