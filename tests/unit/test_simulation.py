"""Clusters in one process: real nodes, virtual time, and runs that can be repeated."""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import Future, ProcessExitedException
from hpcdist._runtime.node import here
from hpcdist._runtime.references import References
from hpcdist._wire.messages import Sent
from hpcdist.testing import Deadlock, Record, Simulation, SimulationError, Trace, compute

pytestmark = pytest.mark.any_mpi

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=3, seed=7) as made:
        yield made


def put_elsewhere(pid: int, value: object) -> object:
    future = Future(pid)
    future.put(value)
    return future.fetch()


def program(seed: int) -> Trace:
    """Let two processes talk at once, and kill one that a third waits for."""
    with Simulation(nodes=4, seed=seed) as sim:
        tasks = [sim.node(1).start(put_elsewhere, 2, "a"), sim.node(3).start(put_elsewhere, 2, "b")]
        tasks += [sim.node(2).start(lambda: Future(4).fetch())]
        sim.advance(0.001)
        sim.kill(4)
        assert [task.result() for task in tasks[:2]] == ["a", "b"]
        with pytest.raises(ProcessExitedException):
            tasks[2].result()
        return sim.trace


def test_processes_talk(sim: Simulation) -> None:
    assert sim.node(1).run(put_elsewhere, 2, [1, 2]) == [1, 2]
    assert sim.node(2).run(put_elsewhere, 3, "x") == "x"
    assert sim.traffic(2, 3).messages >= 2
    assert sim.traffic(3, 1).messages == 0


def test_the_same_seed_gives_the_same_run() -> None:
    assert program(1) == program(1)
    assert len({str(program(seed)) for seed in range(5)}) == 5


def test_a_run_is_the_same_in_another_process() -> None:
    """No hash, address, time or history of this process may show in it."""
    code = "from tests.unit import test_simulation as t; print(t.program(1))"
    for hashing in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hashing},
            timeout=60,
            check=True,
        )
        assert done.stdout.rstrip("\n") == str(program(1))


def first_uses() -> Trace:
    """Use what is imported at its first use, while threads lose the processor anywhere."""
    with Simulation(nodes=3, seed=5, unrest=0.1) as sim:
        channel = sim.node(1).run(lambda: hpcdist.RemoteChannel(1, 2))
        sim.node(1).run(channel.put, 1)
        sim.node(1).run(hpcdist.pmap, abs, range(3))
        return sim.trace


def test_a_run_does_not_see_those_before_it() -> None:
    code = "from tests.unit.test_simulation import first_uses; print(first_uses() == first_uses())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert done.stdout == "True\n"


def test_a_wait_takes_no_real_time(sim: Simulation) -> None:
    begin = time.monotonic()

    def wait() -> None:
        with pytest.raises(TimeoutError):
            Future(2).fetch(timeout=3600)

    sim.node(1).run(wait)
    assert sim.now >= 3600
    assert time.monotonic() - begin < 60


def test_a_death_ends_the_waits_for_it(sim: Simulation) -> None:
    waits = [sim.node(pid).start(lambda: Future(3).fetch()) for pid in (1, 2)]
    sim.advance(1)
    sim.kill(3)
    for wait in waits:
        with pytest.raises(ProcessExitedException) as caught:
            wait.result()
        assert caught.value.pid == 3


def test_a_death_has_its_reason(sim: Simulation) -> None:
    sim.kill(3)
    sim.advance(1)
    with pytest.raises(ProcessExitedException, match="killed by SIGKILL"):
        sim.node(1).run(lambda: Future(3))
    assert sim.node(2).run(hpcdist.workers) == [2]


def test_workers_come_and_go(sim: Simulation) -> None:
    assert sim.node(1).run(hpcdist.addprocs, 2) == [4, 5]
    assert sim.node(1).run(hpcdist.procs) == [1, 2, 3, 4, 5]
    sim.advance(1)
    assert sim.node(5).run(put_elsewhere, 2, "x") == "x"
    assert sim.node(1).run(hpcdist.rmprocs, 2, 4).done()
    assert sim.node(1).run(hpcdist.workers) == [3, 5]
    sim.advance(1)
    with pytest.raises(ProcessExitedException, match="removed"):
        sim.node(5).run(lambda: Future(2))
    sim.node(1).run(hpcdist.shutdown)
    assert sim.node(1).run(hpcdist.workers) == [1]


def test_workers_are_renewed() -> None:
    with Simulation(nodes=3, renew=True) as sim:
        sim.kill(2)
        sim.advance(60)
        assert len(sim.node(1).run(hpcdist.workers)) == 2
        with pytest.raises(SimulationError, match="process 3 has ended"):  # it was retired
            sim.node(3).run(hpcdist.workers)


def test_a_whole_world_is_lost() -> None:
    with Simulation(nodes=7, worlds=2) as sim:
        wait = sim.node(6).start(lambda: Future(3).fetch())
        sim.advance(1)
        sim.lose_world(1)
        with pytest.raises(ProcessExitedException) as caught:
            wait.result()
        assert caught.value.pid == 3
        assert sim.node(1).run(hpcdist.workers) == [5, 6, 7]


def test_a_worker_ends_with_process_1(sim: Simulation) -> None:
    sim.kill(1)
    sim.advance(1)
    assert [record.pid for record in sim.trace if record.what == "exit"] in ([2, 3], [3, 2])


def test_workers_that_have_only_links() -> None:
    with Simulation(nodes=4, isolation="process") as sim:
        assert sim.node(2).run(put_elsewhere, 3, "x") == "x"
        tasks = [sim.node(2).start(put_elsewhere, 4, "a"), sim.node(4).start(put_elsewhere, 2, "b")]
        assert [task.result() for task in tasks] == ["a", "b"]


def nap(k: int) -> int:
    hpcdist.sleep(10)
    return k


def test_a_computation_keeps_its_turn(sim: Simulation) -> None:
    def both() -> None:
        first = hpcdist.remotecall(compute, 2, 10)
        hpcdist.remotecall(compute, 2, 10).wait()
        assert first.ready

    sim.node(1).run(both)
    assert 20 <= sim.now < 30
    with pytest.raises(RuntimeError, match="in a simulation"):
        compute(1)


def test_a_map_sleeps_while_all_workers_have_one_long_item(sim: Simulation) -> None:
    """Looking again and again would let no time pass."""
    assert sim.node(1).run(hpcdist.pmap, nap, range(2)) == [0, 1]
    assert sim.now < 60


def test_what_can_never_end_is_shown(sim: Simulation) -> None:
    with pytest.raises(Deadlock) as caught:
        sim.node(1).run(lambda: Future(2).fetch())
    assert "1/main" in str(caught.value)
    assert "fetch" in str(caught.value)


def test_a_partition_holds_messages_back(sim: Simulation) -> None:
    sim.partition({1, 2}, {3})
    task = sim.node(2).start(put_elsewhere, 3, "x")
    sim.advance(60)
    assert not task.done()
    sim.heal()
    assert task.result() == "x"


def test_a_stopped_process_does_nothing(sim: Simulation) -> None:
    sim.stop(2)
    task = sim.node(1).start(put_elsewhere, 2, "x")
    sim.advance(60)
    assert not task.done()
    sim.go_on(2)
    assert task.result() == "x"


def test_messages_can_be_delayed(sim: Simulation) -> None:
    sim.delay(2.0)
    sim.node(1).run(put_elsewhere, 2, "x")
    assert sim.now >= 4.0
    sim.delay(0.0)
    sim.delay(5.0, 6.0, between={1, 3})
    begin = sim.now
    sim.node(1).run(put_elsewhere, 2, "x")
    assert sim.now - begin < 1
    sim.node(1).run(put_elsewhere, 3, "x")
    assert 10 <= sim.now - begin <= 13


def test_a_slow_process_takes_its_time(sim: Simulation) -> None:
    sim.slow(2, 10.0)
    sim.node(1).run(put_elsewhere, 2, "x")
    assert sim.now > 0.1


def test_ctrl_c_ends_a_wait(sim: Simulation) -> None:
    task = sim.node(1).start(lambda: Future(2).fetch())
    sim.advance(1)
    sim.press_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        task.result()


def test_a_clock_that_jumps_ends_timeouts(sim: Simulation) -> None:
    def wait() -> None:
        with pytest.raises(TimeoutError):
            Future(2).fetch(timeout=3600)

    task = sim.node(1).start(wait)
    sim.advance(1)
    sim.jump(1, 7200)
    sim.advance(1)
    assert task.done()


def test_an_error_arrives_where_it_is_waited_for(sim: Simulation) -> None:
    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        sim.node(2).run(fail)


def test_a_process_that_is_not_there(sim: Simulation) -> None:
    with pytest.raises(ValueError, match="no process with id 9"):
        sim.node(9)
    with pytest.raises(ValueError, match="at least process 1"):
        Simulation(nodes=0)


def test_the_trace_can_be_read(sim: Simulation) -> None:
    begin = len(sim.trace)
    sim.node(1).run(put_elsewhere, 2, "x")
    sent = [record for record in sim.trace[begin:] if record.what == "send"]
    assert sent[0] == Record(sent[0].at, 1, "send", "-> 2  Sent")
    assert "send" in str(sim.trace).splitlines()[sim.trace[:].index(sent[0])]


def test_nothing_of_a_simulation_stays() -> None:
    before = threading.active_count()
    with Simulation(nodes=5) as sim:
        sim.node(2).start(lambda: Future(3).fetch())
        sim.advance(1)
        sim.kill(4)
    assert threading.active_count() == before


def test_this_process_is_not_touched(sim: Simulation) -> None:
    assert hpcdist.myid() == 1
    assert hpcdist.workers() == [1]


def restless(unrest: float) -> list[Record]:
    """Take the processor away in the midst of functions."""
    with Simulation(nodes=3, seed=1, unrest=unrest) as sim:
        begin = len(sim.trace)
        tasks = [sim.node(pid).start(put_elsewhere, 3, "a") for pid in (1, 2, 1, 2, 1, 2)]
        assert [task.result() for task in tasks] == ["a"] * 6
        return sim.trace[begin:]


def test_unrest_can_be_repeated() -> None:
    often = restless(0.2)
    assert often == restless(0.2)
    assert len(often) > len(restless(0.0))


def test_references_that_are_announced_do_leave(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their owner counts them at the receiver: an interrupt must not come before they are sent."""
    held: list[bool] = []
    announce = References.announce

    def note(self: References, *args: Any) -> bytes:
        held.append(threading.get_ident() in self.node.progress.interrupts.held)
        return announce(self, *args)

    monkeypatch.setattr(References, "announce", note)

    def send_one() -> int:
        return hpcdist.remotecall_fetch(len, 2, [Future(3)])

    assert sim.node(1).run(send_one) == 1
    assert held == [True]


def test_a_message_that_an_interrupt_came_behind_leaves(sim: Simulation) -> None:
    peer = sim.node(1).node.peers[2]

    class Interrupted(deque[Any]):
        def append(self, item: object) -> None:
            super().append(item)
            raise KeyboardInterrupt

    def post() -> None:
        peer.outbox = Interrupted(peer.outbox)
        with pytest.raises(KeyboardInterrupt):
            peer.send(Sent(1, 1, 1))

    sim.node(1).run(post)
    sim.advance(1)
    assert not peer.outbox


def interrupt_behind(peer: Any) -> None:
    """Let an interrupt come just behind the next message for a process, which leaves."""

    class Interrupted(deque[Any]):
        def append(self, item: object) -> None:
            peer.outbox = deque(self)
            peer.outbox.append(item)
            raise KeyboardInterrupt

    peer.outbox = Interrupted(peer.outbox)


@pytest.mark.parametrize("args", [(), (b"x" * 2000,), (Future,)], ids=["short", "long", "by value"])
def test_a_call_that_an_interrupt_came_behind_leaves_no_result(
    sim: Simulation, args: tuple[Any, ...]
) -> None:
    """It has gone, so its owner counts a holder: that has to let go."""

    def call() -> None:
        interrupt_behind(here.node.peers[2])
        with pytest.raises(KeyboardInterrupt):
            hpcdist.remotecall(repr, 2, *args)

    sim.node(1).run(call)
    sim.advance(1)
    sim.collect()
    sim.node(1).run(hpcdist.remotecall_fetch, len, 2, "what is to be told goes with a message")
    sim.advance(1)
    assert not sim.node(2).node.service(References).owned
    assert not sim.node(1).node.pending


def test_a_method_that_an_interrupt_came_behind_leaves_no_result(sim: Simulation) -> None:
    def call() -> None:
        with hpcdist.RemoteObject(list, 2) as thing:
            interrupt_behind(here.node.peers[2])
            with pytest.raises(KeyboardInterrupt):
                thing.append.remotecall(1)

    sim.node(1).run(call)
    sim.advance(1)
    sim.collect()
    sim.node(1).run(hpcdist.remotecall_fetch, len, 2, "as above")
    sim.advance(1)
    assert not sim.node(2).node.service(References).owned


def test_a_value_that_is_fetched_while_interrupts_come_is_let_go(sim: Simulation) -> None:
    """Letting go is one act: no interrupt comes between the handle's word and the note of it."""
    peer = sim.node(1).node.peers[2]

    def fetch() -> None:
        future = hpcdist.remotecall(len, 2, "abc")
        future.wait()

        class Interrupted(list[Any]):
            def append(self, item: Any) -> None:
                peer.released = [*self, item]
                raise KeyboardInterrupt

        peer.released = Interrupted(peer.released)
        with pytest.raises(KeyboardInterrupt):
            future.fetch()
        assert future.fetch() == 3

    sim.node(1).run(fetch)
    sim.advance(1)
    assert not sim.node(2).node.service(References).owned
