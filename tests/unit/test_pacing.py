"""A caller that is far ahead of a process waits until that has begun some of its calls."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import Future, ProcessExitedException, RemoteObject, _config, remote_do, remotecall
from hpcdist.testing import Simulation, compute

pytestmark = pytest.mark.any_mpi

BOUND = 64  # calls without arguments worth mentioning: 64 KB, and 1 KB for each
SLACK = 12  # marks stand behind every few calls


@pytest.fixture(autouse=True)
def _low(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HPCDIST_OUTSTANDING", f"{BOUND}K")
    _config.forget()
    yield
    _config.forget()


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=3, seed=11) as made:
        yield made


begun: list[int] = []  # calls, in their order; the processes of a simulation share it


def work(k: int, *_: object) -> int:
    begun.append(k)
    compute(0.01)
    return k


class Flood:
    """Many calls to one slow process, and how far their caller ever was ahead of it."""

    def __init__(self) -> None:
        begun.clear()
        self.made = 0
        self.ahead = 0
        self.futures: list[Future[int]] = []

    def make(self, call: Callable[..., Any], calls: int = 400, argument: bytes = b"") -> None:
        for k in range(calls):
            made = call(work, 2, k, argument)
            if made is not None:
                self.futures.append(made)
            self.made += 1
            self.ahead = max(self.ahead, self.made - len(begun))


@pytest.fixture
def flood() -> Flood:
    return Flood()


class Slow:
    """An object with a slow method."""

    def work(self, k: int) -> None:
        work(k)


def flood_from(pid: int) -> None:
    for k in range(200):
        remote_do(work, pid, k)


@pytest.mark.parametrize("call", [remotecall, remote_do])
def test_a_caller_is_so_far_ahead_and_no_farther(
    sim: Simulation, flood: Flood, call: Callable[..., Any]
) -> None:
    sim.node(1).run(flood.make, call)
    assert BOUND - SLACK <= flood.ahead <= BOUND
    assert sim.node(1).run(lambda: [f.fetch() for f in flood.futures]) in ([], list(range(400)))
    sim.advance(10)
    assert begun == list(range(400)), "each once, in order"


def test_arguments_count(sim: Simulation, flood: Flood) -> None:
    sim.node(1).run(flood.make, remote_do, 100, b"x" * 7000)
    assert 8 <= flood.ahead <= 24, "7 KB and 1 KB each: some ten of them are 64 KB"


def test_methods_of_remote_objects_count(sim: Simulation) -> None:
    ahead: list[int] = []
    begun.clear()

    def program() -> None:
        slow = RemoteObject(Slow, 2)
        for k in range(200):
            slow.work.remotecall(k)
            ahead.append(k + 1 - len(begun))

    sim.node(1).run(program)
    assert BOUND - SLACK <= max(ahead) <= BOUND


def test_what_is_fetched_at_once_is_never_far_ahead(sim: Simulation) -> None:
    sim.node(1).run(lambda: [hpcdist.remotecall_fetch(work, 2, k) for k in range(300)])
    assert sim.traffic(1, 2).messages < 310, "and so has no marks"


def test_a_call_that_waits_so_gives_its_turn_away(sim: Simulation) -> None:
    """Two workers that flood each other: neither could begin a call, if it kept its turn."""
    begun.clear()

    def both() -> None:
        for started in [remotecall(flood_from, 2, 3), remotecall(flood_from, 3, 2)]:
            started.fetch()

    sim.node(1).run(both)
    sim.advance(20)
    assert sorted(begun) == sorted([*range(200)] * 2)


def test_its_death_ends_the_wait(sim: Simulation, flood: Flood) -> None:
    task = sim.node(1).start(flood.make, remotecall)
    sim.advance(0.1)
    assert not task.done()
    sim.kill(2)
    with pytest.raises(ProcessExitedException):
        task.result()
    assert sim.node(1).run(lambda: hpcdist.remotecall_fetch(len, 3, "abc")) == 3


def test_a_stopped_process_is_waited_for(sim: Simulation, flood: Flood) -> None:
    sim.stop(2)
    task = sim.node(1).start(flood.make, remote_do)
    sim.advance(5)
    assert not task.done()
    assert BOUND - SLACK <= flood.made <= BOUND, "and what it is to do takes no more memory"
    sim.go_on(2)
    task.result()


def test_ctrl_c_ends_the_wait_and_loses_no_call(sim: Simulation, flood: Flood) -> None:
    task = sim.node(1).start(flood.make, remote_do)
    sim.advance(0.1)
    assert not task.done()
    made = flood.made
    sim.press_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        task.result()
    sim.advance(10)
    assert begun == list(range(made + 1)), "that in which it waited is under way, too"


def test_an_impossible_bound_is_named(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("lots", "-1", "0", "1.5G", "²"):
        monkeypatch.setenv("HPCDIST_OUTSTANDING", wrong)
        _config.forget()
        with pytest.raises(ValueError, match=r"HPCDIST_OUTSTANDING.*such as 256M"):
            _config.setting("outstanding")
