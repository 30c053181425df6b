"""Channels, futures and their cells, and the outboxes beneath, on simulated clusters."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist import Channel, ChannelClosed, Future, RemoteChannel
from hpcdist._remote.channels import Waiter
from hpcdist._runtime.node import Node
from hpcdist._runtime.references import References
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import HEAD_SIZE
from hpcdist._wire.messages import Sent
from hpcdist.testing import Simulation

pytestmark = pytest.mark.any_mpi


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=4, seed=3) as made:
        yield made


def owned(sim: Simulation, pid: int) -> int:
    """Count what a process owns for others, once all that was let go of has gone."""
    for _ in range(3):  # what goes may have held more
        sim.collect()
        sim.advance(5)
    return len(sim.node(pid).node.service(References).owned)


# Channels


def taker(got: list[tuple[int, Any]]) -> Waiter:
    return Waiter(lambda number, value: got.append((number, value)))


def test_takers_are_served_in_order_and_one_may_leave() -> None:
    channel, got = Channel(2), list[tuple[int, Any]]()
    first, second, third = taker(got), taker(got), taker(got)
    for waiter in (first, second, third):
        channel.start_take(waiter)
    assert channel.withdraw(second)
    assert not channel.withdraw(second)
    channel.put("a")
    channel.put("b")
    assert got == [(1, "a"), (2, "b")]
    assert channel.isempty()


def test_an_item_goes_back_to_its_place() -> None:
    channel = Channel(3)
    for item in "abc":
        channel.put(item)
    one, other = channel.try_take(), channel.try_take()
    assert one is not None
    assert other is not None
    channel.give_back(*other)
    channel.give_back(*one)
    assert [channel.take() for _ in "abc"] == ["a", "b", "c"]


def test_a_full_channel_lets_putters_wait(sim: Simulation) -> None:
    channel = sim.node(1).run(RemoteChannel, 1, 3)
    puts = [sim.node(1).start_beside(channel.put, k) for k in range(3)]
    sim.advance(1)
    assert sorted(put.done() for put in puts) == [False, False, True]
    taken = [sim.node(1).run(channel.take) for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    sim.advance(1)
    assert all(put.done() for put in puts)


def test_a_taker_that_gives_up_leaves_its_item_to_others(sim: Simulation) -> None:
    channel = sim.node(1).run(RemoteChannel, 1, 3)

    def give_up() -> None:
        with pytest.raises(TimeoutError):
            channel.take(timeout=1)

    sim.node(1).run(give_up)
    sim.node(1).run(channel.put, "x")
    assert sim.node(1).run(channel.take) == "x"


def test_what_a_dead_taker_had_under_way_goes_to_the_next(sim: Simulation) -> None:
    """Its answer is held up between the owner and it."""
    channel = sim.node(1).run(RemoteChannel, 1, 3)
    task = sim.node(1).start_beside(hpcdist.remotecall_fetch, channel.take, 2)
    sim.advance(1)
    sim.partition({3}, {2})
    sim.node(1).run(channel.put, "x")
    sim.advance(1)
    sim.kill(2)
    sim.heal()
    with pytest.raises(hpcdist.ProcessExitedException):
        task.result()
    assert sim.node(1).run(channel.take) == "x"


def test_those_who_wait_hear_that_a_channel_closes(sim: Simulation) -> None:
    channel = sim.node(1).run(RemoteChannel, 1, 3)
    task = sim.node(1).start_beside(channel.take)
    sim.advance(1)
    sim.node(1).run(channel.close)
    with pytest.raises(ChannelClosed):
        task.result()


# Futures and cells


def test_a_result_goes_when_it_has_been_fetched(sim: Simulation) -> None:
    future = sim.node(1).run(hpcdist.remotecall, len, 2, "four")
    sim.advance(1)
    assert owned(sim, 2) == 1
    assert sim.node(1).run(future.fetch) == 4
    assert owned(sim, 2) == 0


def test_one_result_for_all_who_fetch_it(sim: Simulation) -> None:
    def fetch_everywhere() -> list[Any]:
        future = Future(2)
        calls = [hpcdist.remotecall(lambda f: f.fetch(), pid, future) for pid in (2, 3, 4)]
        future.put([1, 2])
        return [call.fetch() for call in calls]

    assert sim.node(1).run(fetch_everywhere) == [[1, 2]] * 3
    assert owned(sim, 2) == 0


def test_a_call_that_has_not_started_can_be_cancelled(sim: Simulation) -> None:
    def cancel() -> tuple[bool, bool, list[bool]]:
        told = list[bool]()
        busy = hpcdist.remotecall(hpcdist.testing.compute, 2, 5)
        future = hpcdist.remotecall(len, 2, "four")
        future.add_done_callback(lambda f: told.append(f.cancelled()))
        cancelled = future.cancel()
        busy.fetch()
        hpcdist.sleep(1)
        return cancelled, future.done(), told

    assert sim.node(1).run(cancel) == (True, True, [True])


# What is to be sent


def test_an_outbox_is_flushed_once_for_all_that_is_in_it() -> None:
    node = Node()
    sent: list[list[Any]] = []

    class Way:
        idle = True

        def send(self, items: list[Any]) -> None:
            sent.append(items)

        def close(self) -> None:
            pass

    peer = Peer(7, node.progress)
    peer.link = Way()  # type: ignore[assignment]
    peer.send(Sent(1, 2, 3))
    peer.send(Sent(1, 2, 4))
    peer.acknowledge(5)
    assert node.progress.dirty == deque([peer])
    peer.flush()
    (items,) = sent
    assert len(items) == 3
    assert len(items[2]) == HEAD_SIZE  # behind what somebody waits for
    assert not peer.outbox


def test_who_has_lent_buffers_to_a_dead_process_gets_them_back() -> None:
    node, ended = Node(), list[int]()
    peer = Peer(7, node.progress)
    peer.post(b"head", (b"buffer",), lambda: ended.append(1))
    peer.drop()
    assert ended == [1]
    assert not peer.outbox


def test_workers_of_a_master_do_not_talk_to_each_other() -> None:
    with Simulation(nodes=3, topology="master_worker") as sim:
        with pytest.raises(RuntimeError, match="not connected to 2"):
            sim.node(2).run(lambda: hpcdist.remotecall_fetch(len, 3, "four"))
        assert sim.traffic(2, 3).messages == 0
