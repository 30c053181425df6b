"""Trees: `bcast`, `scatter`, `gather`, `reduce`, and what `everywhere` costs process 1."""

import gc
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    CompositeException,
    HpcdistError,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    RemoteValue,
    bcast,
    everywhere,
    gather,
    myid,
    remotecall,
    remotecall_fetch,
    scatter,
    workers,
)
from hpcdist._collective import trees
from hpcdist._collective.remote_values import RemoteValues
from hpcdist._collective.shared_memory import Segments, _is_free
from hpcdist._collective.trees import Trees
from hpcdist._collective.value_copies import ValueCopies
from hpcdist._runtime.node import here
from hpcdist._transport.router import Peer
from hpcdist._wire.messages import NUMBERS, Up
from tests.helpers import eventually

LARGE = 1_500_000  # float64: 12 MB, three pieces


@pytest.fixture(params=["shared", "sent"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a broadcast moves: through shared memory, or in pieces down the tree."""
    monkeypatch.setattr(RemoteValues.here(), "shares_memory", request.param == "shared")
    return str(request.param)


def summed(array: Any) -> float:
    return float(array.sum())


def writeable(array: Any) -> bool:
    return bool(array.flags.writeable)


def copies_here() -> int:
    return len(ValueCopies.here().held)


def ones(n: int) -> Any:
    return np.ones(n)


def fetch_again(value: Any, pid: int) -> Any:
    return value


def broadcast_and_sum(pids: list[int]) -> list[float]:
    with bcast(np.ones(LARGE), pids) as value:
        return [remotecall_fetch(summed, pid, value) for pid in pids]


# --- broadcast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [42, [1, {"a": 2}], "x" * 1_000_000, np.arange(1000)])
def test_small_values(value: Any, way: str, pids: list[int]) -> None:
    with bcast(value) as handle:
        assert handle.pids == pids
        for pid in pids:
            assert np.array_equal(remotecall_fetch(fetch_again, pid, handle, pid), value)
        assert np.array_equal(handle.fetch(), value)


def test_a_large_array(way: str, pids: list[int]) -> None:
    array = np.arange(LARGE, dtype=float)
    handle = bcast(array)
    array[:] = 0  # the copies are made
    assert isinstance(handle, RemoteValue)
    assert handle.nbytes >= 8 * LARGE
    expected = float(np.arange(LARGE, dtype=float).sum())
    assert [remotecall_fetch(summed, pid, handle) for pid in pids] == [expected] * 3
    assert summed(handle.fetch()) == expected
    handle.free()


def test_shared_memory_is_read_only(pids: list[int]) -> None:
    with bcast(np.ones(LARGE)) as handle:
        assert not any(remotecall_fetch(writeable, pid, handle) for pid in pids)
        assert not writeable(handle.fetch())


def test_several_buffers(way: str, pids: list[int]) -> None:
    value = {"a": np.arange(LARGE), "b": [np.ones(100_000), bytes(700_000)], "c": "text"}
    with bcast(value) as handle:
        back = remotecall_fetch(
            lambda v: (v["a"][-1], v["b"][0].sum(), len(v["b"][1]), v["c"]), pids[1], handle
        )
    assert back == (LARGE - 1, 100_000, 700_000, "text")


def test_a_process_without_a_copy_pulls_it(way: str, pids: list[int]) -> None:
    array = np.ones(LARGE)
    with bcast(array, pids=pids[:1]) as handle:
        assert handle.pids == pids[:1]
        assert remotecall_fetch(summed, pids[1], handle) == LARGE
        assert remotecall_fetch(summed, 1, handle) == LARGE
        future = remotecall(lambda v: hpcdist.remotecall_fetch(summed, pids[2], v), pids[0], array)
        assert future.fetch() == LARGE


def test_inside_other_arguments(pids: list[int]) -> None:
    with bcast([1, 2, 3]) as handle:
        assert (
            remotecall_fetch(
                lambda d, k=None: sum(d["x"][0]) + len(k), pids[0], {"x": (handle,)}, k=handle
            )
            == 9
        )
        total: Any = handle
        assert remotecall_fetch(lambda: sum(total), pids[0]) == 6
        assert remotecall_fetch(sum, 1, handle) == 6
        assert remotecall_fetch(sum, myid(), handle) == 6
        with RemoteChannel(1, pids[0]) as rc:
            rc.put({"v": handle})
            assert rc.take() == {"v": [1, 2, 3]}


def test_from_a_worker(way: str, pids: list[int]) -> None:
    assert remotecall_fetch(broadcast_and_sum, pids[0], [*pids, 1]) == [LARGE] * 4


def test_references_inside(pids: list[int]) -> None:
    future = remotecall(lambda: 7, pids[0])
    with bcast([future]) as handle:
        del future
        gc.collect()
        assert remotecall_fetch(lambda v: v[0].fetch(), pids[1], handle) == 7


def test_some_workers_compute(way: str, pids: list[int]) -> None:
    done = threading.Event()
    busy = remotecall(lambda: sum(i * i for i in range(20_000_000)), pids[0])
    threading.Thread(target=lambda: (busy.wait(), done.set())).start()
    with bcast(np.ones(LARGE)) as handle:
        assert not done.is_set()
        assert remotecall_fetch(summed, pids[1], handle) == LARGE
    busy.fetch()


def test_what_cannot_be_pickled_reaches_nobody(pids: list[int]) -> None:
    with pytest.raises(TypeError):
        bcast(threading.Lock())
    assert remotecall_fetch(copies_here, pids[0]) == 0


# --- freeing -------------------------------------------------------------------------------------


def test_free(way: str, pids: list[int]) -> None:
    handle = bcast(np.ones(LARGE))
    assert remotecall_fetch(copies_here, pids[0]) == 1
    handle.free()
    handle.free()
    eventually(lambda: [remotecall_fetch(copies_here, pid) for pid in pids] == [0] * 3)
    with pytest.raises(HpcdistError):
        handle.fetch()
    with pytest.raises(HpcdistError):
        remotecall_fetch(summed, pids[0], handle)


def test_the_last_handle_frees(pids: list[int]) -> None:
    handle = bcast(np.ones(LARGE))
    future = remotecall(lambda v: (time.sleep(0.3), summed(v))[1], pids[0], handle)
    del handle
    gc.collect()
    assert future.fetch() == LARGE
    eventually(lambda: [remotecall_fetch(copies_here, pid) for pid in pids] == [0] * 3)
    eventually(lambda: copies_here() == 0)


def test_a_segment_is_used_again_when_its_views_are_gone(pids: list[int]) -> None:
    for _ in range(8):
        with bcast(np.ones(LARGE)) as handle:
            assert remotecall_fetch(summed, pids[0], handle) == LARGE
        eventually(lambda: all(_is_free(s) for s in Segments.here()._pool.values()))
    assert len(Segments.here()._pool) <= 3


def test_a_view_outlives_its_value(pids: list[int]) -> None:
    everywhere("hd_kept = []")
    with bcast(np.full(LARGE, 3.0)) as handle:
        remotecall_fetch(keep, pids[0], handle)
        mine = handle.fetch()
    for n in range(3):
        with bcast(np.full(LARGE, float(n))) as handle:
            remotecall_fetch(summed, pids[0], handle)
    assert summed(mine) == 3.0 * LARGE
    assert everywhere("float(hd_kept[0].sum())", pids=pids[0]) == 3.0 * LARGE
    del mine
    everywhere("del hd_kept")
    eventually(lambda: all(_is_free(s) for s in Segments.here()._pool.values()))


def keep(array: Any) -> None:
    import __main__

    __main__.hd_kept.append(array)


def test_nothing_is_left_in_shared_memory(pids: list[int]) -> None:
    before = set(os.listdir("/dev/shm"))
    with bcast(np.ones(LARGE)):
        assert set(os.listdir("/dev/shm")) <= before


# --- scatter and gather --------------------------------------------------------------------------


def test_scatter_gives_each_a_part(pids: list[int]) -> None:
    parts = scatter(list(range(8)))
    assert [part.pids for part in parts] == [[pid] for pid in pids]
    assert gather(parts) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert remotecall_fetch(sum, pids[1], parts[1]) == 12
    assert remotecall_fetch(sum, pids[0], parts[1]) == 12  # pulled
    assert [part.fetch() for part in scatter(range(2))] == [range(1), range(1, 2), range(2, 2)]
    with pytest.raises(TypeError):
        scatter({1, 2, 3})


def test_scattered_arrays(pids: list[int]) -> None:
    array = np.arange(3 * LARGE, dtype=float).reshape(3, LARGE)
    parts = scatter(array)
    futures = [remotecall(summed, pid, part) for pid, part in zip(pids, parts, strict=True)]
    assert gather(futures) == [row.sum() for row in array]
    assert np.array_equal(np.concatenate(gather(parts)), array)
    del parts
    gc.collect()
    eventually(lambda: [remotecall_fetch(copies_here, pid) for pid in pids] == [0] * 3)


def test_gather_takes_both_kinds_and_nothing_else(pids: list[int]) -> None:
    with bcast("b") as handle:
        assert gather([remotecall(myid, pids[1]), handle]) == [pids[1], "b"]
    with pytest.raises(TypeError):
        gather([1])  # type: ignore[list-item]
    with pytest.raises(ZeroDivisionError):
        gather([remotecall(divmod, pids[0], 1, 0)])


# --- reduce --------------------------------------------------------------------------------------


def test_reduce_in_order(pids: list[int]) -> None:
    assert hpcdist.reduce(operator.add, lambda: [myid()]) == pids
    assert hpcdist.reduce(operator.add, lambda: [myid()], pids=[pids[2], 1, pids[0]]) == [
        pids[2],
        1,
        pids[0],
    ]
    assert hpcdist.reduce(max, pow, 2, 3) == 8
    assert remotecall_fetch(lambda: hpcdist.reduce(min, myid), pids[1]) == pids[0]


@pytest.mark.parametrize(
    ("op", "expected"),
    [(operator.add, 3), (np.add, 3), (np.maximum, 1), (min, 1), (operator.mul, 1)],
)
def test_reduce_arrays(op: Any, expected: float, pids: list[int]) -> None:
    result = hpcdist.reduce(op, ones, LARGE)
    assert result.shape == (LARGE,)
    assert set(result) == {expected}


def test_the_workers_arrays_are_left_alone(pids: list[int]) -> None:
    everywhere("import numpy as np; hd_array = np.ones(200_000)")
    for _ in range(2):
        assert set(hpcdist.reduce(operator.add, their_array)) == {3.0}
    assert all(everywhere("set(hd_array) == {1.0}", pids=pid) for pid in pids)
    everywhere("del hd_array")


def their_array() -> Any:
    import __main__

    return __main__.hd_array


def test_failures_of_reduce(pids: list[int]) -> None:
    with pytest.raises(CompositeException) as several:
        hpcdist.reduce(operator.add, divmod, 1, 0)
    assert [error.pid for error in several.value.exceptions] == pids
    with pytest.raises(ZeroDivisionError) as single:
        hpcdist.reduce(operator.add, lambda: 1 / (myid() - pids[1]))
    assert isinstance(single.value, RemoteException)
    assert single.value.pid == pids[1]


def test_a_turn_is_taken(pids: list[int]) -> None:
    busy = remotecall(time.sleep, pids[2], 0.2)
    assert hpcdist.reduce(operator.add, myid) == sum(pids)
    assert busy.done()


# --- deaths --------------------------------------------------------------------------------------


def test_a_death_in_the_middle_of_reduce(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(4)
    for victim in (pids[2], pids[0]):
        with pytest.raises(ProcessExitedException) as caught:
            hpcdist.reduce(
                operator.add,
                lambda v=victim: os.kill(os.getpid(), 9) if myid() == v else 1,
                pids=[pid for pid in pids if pid in workers()],
            )
        assert caught.value.pid == victim


def test_a_death_in_the_middle_of_a_broadcast(
    way: str, fresh: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "WIDTH", 1)  # a chain: the dead one stands between two
    pids = fresh(3)
    pid_of = {pid: remotecall_fetch(os.getpid, pid) for pid in pids}
    os.kill(pid_of[pids[1]], 19)  # stopped: it takes in nothing
    killer = threading.Timer(0.3, os.kill, (pid_of[pids[1]], 9))
    killer.start()
    with pytest.raises(ProcessExitedException) as caught:
        bcast(np.ones(LARGE), pids)
    assert caught.value.pid == pids[1]
    killer.join()
    with bcast(np.ones(LARGE), [pids[0], pids[2]]) as handle:
        assert remotecall_fetch(summed, pids[2], handle) == LARGE


def test_everywhere_reaches_those_behind_a_dead_one(
    fresh: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "WIDTH", 1)
    pids = fresh(4)
    everywhere("hd_runs = 0")
    os_pid = remotecall_fetch(os.getpid, pids[1])
    os.kill(os_pid, 19)
    threading.Timer(0.3, os.kill, (os_pid, 9)).start()
    with pytest.raises(CompositeException) as caught:
        everywhere("hd_runs += 1", pids=pids)
    assert [type(error) for error in caught.value.exceptions] == [ProcessExitedException]
    left = [pid for pid in pids if pid != pids[1]]
    assert [everywhere("hd_runs", pids=pid) for pid in left] == [1, 1, 1]


# --- several worlds, other topologies ------------------------------------------------------------


def test_several_worlds(way: str, fresh: Callable[..., list[int]]) -> None:
    pids = [*fresh(2), *fresh(2)]
    assert len({Trees.here().world_of(pid) for pid in pids}) == 2
    with bcast(np.ones(LARGE), pids) as handle:
        assert [remotecall_fetch(summed, pid, handle) for pid in pids] == [LARGE] * 4
    assert hpcdist.reduce(operator.add, lambda: [myid()], pids=pids) == pids
    assert everywhere.call(myid, pids=pids) == {pid: pid for pid in pids}


def test_one_copy_enters_each_world(
    fresh: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteValues.here(), "shares_memory", False)
    pids = [*fresh(3), *fresh(2)]
    with counted() as told, bcast(np.ones(LARGE), pids):
        pass
    assert sorted(told.bytes_to) == [pids[0], pids[3]]
    assert all(8 * LARGE < n < 8 * LARGE + 10_000 for n in told.bytes_to.values())


# --- what it costs process 1 ---------------------------------------------------------------------


class Told:
    """What this process has sent."""

    def __init__(self) -> None:
        self.messages = 0
        self.bytes_to: dict[int, int] = {}


class counted:
    """Count the messages this process posts and the outcomes that come up to it."""

    def __enter__(self) -> Told:
        self.told = told = Told()
        self.post = post = Peer.post
        self.up = up = here.node.handlers[NUMBERS[Up]]

        def counting(peer: Peer, data: bytes, buffers: Any = (), end: Any = None) -> None:
            told.messages += 1
            size = len(data) + sum(memoryview(b).nbytes for b in buffers)
            if size > 10_000:
                told.bytes_to[peer.pid] = told.bytes_to.get(peer.pid, 0) + size
            post(peer, data, buffers, end)

        def counting_up(*args: Any) -> None:
            told.messages += 1
            up(*args)

        Peer.post = counting  # type: ignore[method-assign, assignment]
        here.node.handlers[NUMBERS[Up]] = counting_up
        return told

    def __exit__(self, *_: object) -> None:
        Peer.post = self.post  # type: ignore[method-assign]
        here.node.handlers[NUMBERS[Up]] = self.up


@pytest.mark.timeout(120)
def test_everywhere_costs_process_1_no_more_with_more_workers(
    fresh: Callable[..., list[int]],
) -> None:
    costs = {}
    pids: list[int] = []
    for n in (2, 8, 16):
        pids += fresh(n - len(pids))
        everywhere("1", pids=pids)
        with counted() as told:
            everywhere("hd_n = 1", pids=pids)
        costs[n] = told.messages
    assert costs[2] == 4
    assert costs[16] <= costs[8] <= 2 * trees.WIDTH


@pytest.mark.parametrize("n", [1, 2, 5, 8, 64, 1000])
def test_shapes(n: int) -> None:
    pids = list(range(2, n + 2))
    fanned = trees.fan(pids, range(n))
    doubled = [trees.doubling(pids, 0, n)]
    assert len(fanned) <= trees.WIDTH
    for shape in (fanned, doubled):
        found = list(walk(shape))
        assert sorted(found) == [(k, k + 2) for k in range(n)]
        assert depth(shape) <= n.bit_length()
    assert list(walk(doubled)) == [(k, k + 2) for k in range(n)]


def walk(branches: Any) -> Iterator[tuple[int, int]]:
    for position, pid, subs in branches:
        yield position, pid
        yield from walk(subs)


def depth(branches: Any) -> int:
    return max((1 + depth(subs) for _, _, subs in branches), default=0)


def test_workers_that_may_not_talk_to_each_other(script: Callable[..., Any]) -> None:
    finished = script(
        "import operator, hpcdist\n"
        "from hpcdist import *\n"
        "pids = addprocs(3, topology='master_worker')\n"
        "data = bcast(bytes(5_000_000), pids[:1])\n"
        "print([remotecall_fetch(len, pid, data) for pid in pids])\n"
        "print(hpcdist.reduce(operator.add, lambda: [myid()]) == pids)\n"
        "print(distributed('abcdef', operator.add)(lambda c: c))\n"
        "print(gather(scatter(range(3))), everywhere.call(myid, pids=pids))\n"
    )
    assert finished.err == ""
    assert finished.out.splitlines() == [
        "[5000000, 5000000, 5000000]",
        "True",
        "abcdef",
        "[range(0, 1), range(1, 2), range(2, 3)] {2: 2, 3: 3, 4: 4}",
    ]


def test_in_an_mpi_launch(script: Callable[..., Any]) -> None:
    finished = script(
        "import operator, hpcdist\n"
        "from hpcdist import *\n"
        "hpcdist.init()\n"
        "with bcast(bytes(5_000_000)) as data:\n"
        "    print([remotecall_fetch(len, pid, data) for pid in workers()])\n"
        "print(hpcdist.reduce(operator.add, myid), everywhere.call(myid))\n"
        "print(distributed(range(10), operator.add, pids=procs())(lambda i: i))\n",
        ranks=4,
    )
    assert finished.rc == 0
    assert finished.out.splitlines() == [
        "[5000000, 5000000, 5000000]",
        "9 {1: 1, 2: 2, 3: 3, 4: 4}",
        "45",
    ]
