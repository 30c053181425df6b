"""One cluster of all ranks of a launch: process 1 is rank 0, the others are its workers."""

import gc
import os
import random
import sys
import time
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    Future,
    MPIManager,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    addprocs,
    cluster_cookie,
    fetch,
    interrupt,
    myid,
    nworkers,
    procs,
    remotecall,
    remotecall_fetch,
    rmprocs,
    workers,
)
from tests.helpers import cpu_seconds, eventually, faults_of_temporaries

pytestmark = pytest.mark.mpi(min_size=4)
LONG = 30.0  # seconds after which a wait that ought to end is taken for lost

# --- what the workers run; they import this module -----------------------------------------------


def relay(way: list[int]) -> list[int]:
    """Call along a way, each from the one before, and return who was there."""
    if not way:
        return [myid()]
    return [myid(), *remotecall_fetch(relay, way[0], way[1:])]


def checksum(array: np.ndarray) -> tuple[int, int]:
    return array.nbytes, int(array.view(np.uint8)[:: 4096 + 1].astype(np.int64).sum())


def make(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, nbytes, dtype=np.uint8)


def pump(source: RemoteChannel, sink: RemoteChannel) -> int:
    count = 0
    for item in source:
        sink.put((myid(), item))
        count += 1
    return count


def rank() -> int:
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.rank)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


# --- calls ---------------------------------------------------------------------------------------


def crowding() -> float:
    from hpcdist._runtime.node import here

    return here.node.progress.crowding


@pytest.mark.parametrize("cluster", ["first", "second"])
def test_all_ranks_count_all_processes_of_the_host(world: list[int], cluster: str) -> None:
    """They wait and gather messages accordingly; the master counts itself, too."""
    expected = max(1.0, (len(world) + 1) / len(os.sched_getaffinity(0)))
    assert {remotecall_fetch(crowding, pid) for pid in procs()} == {expected}


def test_memory_of_temporary_arrays_is_kept(world: list[int]) -> None:
    assert remotecall_fetch(faults_of_temporaries, world[0]) < 1000


def test_who_is_who(world: list[int]) -> None:
    assert procs() == [1, *world]
    assert workers() == world == list(range(2, len(world) + 2))
    assert myid() == 1
    assert [remotecall_fetch(rank, pid) for pid in world] == [pid - 1 for pid in world]
    for pid in world:
        assert remotecall_fetch(procs, pid) == procs()
    assert [row.manager for row in hpcdist.status()[1:]] == ["MPIManager"] * len(world)
    assert {remotecall_fetch(cluster_cookie, pid) for pid in world} == {cluster_cookie()}


def test_all_pairs(world: list[int]) -> None:
    everyone = procs()
    calls = {
        (one, other): remotecall(remotecall_fetch, one, myid, other)
        for one in everyone
        for other in everyone
    }
    for (_, other), call in calls.items():
        assert call.fetch(timeout=LONG) == other


def test_nested(world: list[int]) -> None:
    way = [random.choice(procs()) for _ in range(12)]
    assert remotecall_fetch(relay, world[0], way) == [world[0], *way]
    assert remotecall_fetch(relay, 2, [3, 4, 2]) == [2, 3, 4, 2]


def test_nested_errors(world: list[int]) -> None:
    with pytest.raises(RemoteException) as caught:
        remotecall_fetch(remotecall_fetch, 2, remotecall_fetch, 3, divmod, 4, 1, 0)
    way: list[int | None] = []
    error: BaseException = caught.value
    while isinstance(error, RemoteException):
        way.append(error.pid)
        error = error.cause
    assert way == [2, 3, 4]
    assert type(error) is ZeroDivisionError
    assert "ZeroDivisionError" in str(caught.value)


def test_many_at_once(world: list[int]) -> None:
    calls = [remotecall(pow, world[k % len(world)], k, 2) for k in range(5000)]
    assert [call.fetch(timeout=LONG) for call in calls] == [k * k for k in range(5000)]


@pytest.mark.parametrize("nbytes", [0, 1, 65_535, 65_536, 65_537, 1_000_003, 20_000_000])
def test_arrays(nbytes: int, world: list[int]) -> None:
    array = make(nbytes, nbytes)
    for pid in world:
        assert remotecall_fetch(checksum, pid, array) == checksum(array)
    back = remotecall_fetch(remotecall_fetch, world[0], make, world[1], nbytes, nbytes)
    assert np.array_equal(back, array)


def test_300_megabytes_at_once(world: list[int]) -> None:
    arrays = [make(50_000_000, k) for k in range(6)]
    calls = [remotecall(checksum, world[k % len(world)], a) for k, a in enumerate(arrays)]
    small = remotecall_fetch(myid, world[0])
    assert small == world[0]
    assert [call.fetch(timeout=LONG) for call in calls] == [checksum(a) for a in arrays]


def test_large_both_ways_between_workers(world: list[int]) -> None:
    """Two that send to each other at the same moment do not wait for each other."""
    first, second = world[:2]
    array = make(30_000_000, 1)
    there, back = Future(first), Future(second)
    there.put(array)
    back.put(array)
    calls = [remotecall(fetch_and_sum, second, there), remotecall(fetch_and_sum, first, back)]
    assert [call.fetch(timeout=LONG) for call in calls] == [checksum(array)] * 2


def fetch_and_sum(future: Future) -> tuple[int, int]:
    return checksum(fetch(future))


def test_channels_between_workers(world: list[int]) -> None:
    first, second, third = world[:3]
    with RemoteChannel(4, first) as source, RemoteChannel(4, third) as sink:
        pumps = [remotecall(pump, pid, source, sink) for pid in (second, third)]
        feeding = remotecall(feed, first, source, 200)
        got = [sink.take(timeout=LONG) for _ in range(200)]
        assert feeding.fetch(timeout=LONG) == 200
        assert sum(p.fetch(timeout=LONG) for p in pumps) == 200
    assert sorted(item for _, item in got) == list(range(200))
    assert {pid for pid, _ in got} <= {second, third}


def feed(channel: RemoteChannel, count: int) -> int:
    for k in range(count):
        channel.put(k)
    channel.close()
    return count


def test_output(world: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    for pid in world:
        remotecall_fetch(say, pid, f"I am {pid}")
    out, err = "", ""
    for pid in world:

        def there(pid: int = pid) -> bool:
            nonlocal out, err
            more = capsys.readouterr()
            out, err = out + more.out, err + more.err
            return f"From worker {pid}:\tI am {pid}\n" in out and f"{pid}:\tto stderr\n" in err

        eventually(there)
        assert out.count(f"I am {pid}\n") == 1


def say(text: str) -> None:
    print(text)
    print("to stderr", file=sys.stderr)


@pytest.mark.parametrize("f", [time.sleep, spin, hpcdist.sleep])
def test_interrupt(f: Any, world: list[int]) -> None:
    pid = world[0]
    call = remotecall(f, pid, 60.0)
    eventually(lambda: next(row for row in hpcdist.status() if row.pid == pid).running == 1)
    interrupt(pid)
    with pytest.raises(RemoteException) as caught:
        call.fetch(timeout=LONG)
    assert type(caught.value.cause) is KeyboardInterrupt
    assert remotecall_fetch(rank, pid) == pid - 1


def test_idle_ranks_use_no_cpu(world: list[int]) -> None:
    os_pids = [remotecall_fetch(os.getpid, pid) for pid in world]
    for pid in world:  # as below
        remotecall_fetch(gc.collect, pid)
    before = [cpu_seconds(os_pid) for os_pid in os_pids]
    time.sleep(2)
    after = [cpu_seconds(os_pid) for os_pid in os_pids]
    assert max(b - a for a, b in zip(before, after, strict=True)) <= 0.04


# --- init, and more workers ----------------------------------------------------------------------


def test_init_again_does_nothing(world: list[int]) -> None:
    hpcdist.init()
    hpcdist.init(7)
    assert workers() == world
    assert remotecall_fetch(init_there, world[0]) == procs()


def init_there() -> list[int]:
    hpcdist.init()
    return procs()


def test_addprocs_beside_the_world(world: list[int]) -> None:
    new = addprocs(2)
    try:
        assert workers() == [*world, *new]
        assert min(new) > max(world)
        everyone = procs()
        for one in everyone:
            for other in everyone:
                assert remotecall_fetch(remotecall_fetch, one, myid, other) == other, (one, other)
        array = make(3_000_000, 3)
        for one, other in ((new[0], world[0]), (world[0], new[0])):
            there = remotecall_fetch(remotecall_fetch, one, checksum, other, array)
            assert there == checksum(array)
        with RemoteChannel(1, world[1]) as rc:
            remotecall(rc.put, new[1], "from the other world")
            assert remotecall_fetch(rc.take, world[0]) == "from the other world"
    finally:
        rmprocs(new)
    assert workers() == world


def test_ids_go_on(world: list[int]) -> None:
    first = addprocs(1)
    rmprocs(first)
    second = addprocs(1)
    rmprocs(second)
    assert second[0] > first[0] > max(world)


# --- removal -------------------------------------------------------------------------------------


def test_removed_rank_is_parked(world: list[int]) -> None:
    pid = world[-1]
    os_pid = remotecall_fetch(os.getpid, pid)
    # A full collection of this test process's heap takes 30 ms: not in the second that counts.
    remotecall_fetch(gc.collect, pid)
    queued = Future(pid)
    rmprocs(pid)
    assert pid not in workers()
    assert pid not in remotecall_fetch(workers, world[0])
    for f in (lambda: remotecall(myid, pid), lambda: queued.fetch(timeout=LONG)):
        with pytest.raises(ProcessExitedException) as caught:
            f()
        assert caught.value.pid == pid
    with pytest.raises(RemoteException) as elsewhere:
        remotecall_fetch(remotecall_fetch, world[0], myid, pid)
    assert type(elsewhere.value.cause) is ProcessExitedException
    before = cpu_seconds(os_pid)
    time.sleep(1)
    assert cpu_seconds(os_pid) - before <= 0.02
    assert remotecall_fetch(relay, world[0], [world[1], 1]) == [world[0], world[1], 1]


def test_parked_rank_is_back_in_the_next_cluster(world: list[int]) -> None:
    assert [remotecall_fetch(rank, pid) for pid in world] == [pid - 1 for pid in world]


def test_removing_all(world: list[int]) -> None:
    rmprocs(world)
    assert workers() == [1]
    assert nworkers() == 1
    assert remotecall_fetch(myid, 1) == 1


# --- SPMD programs; every rank runs these --------------------------------------------------------


def test_twice_in_one_program() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    for turn in range(3):
        with hpcdist.cluster(MPIManager()) as pids:
            assert (pids is None) == (comm.rank != 0)
            if pids is not None:
                assert pids == list(range(2, comm.size + 1))
                assert remotecall_fetch(relay, 2, [3, 4, 2]) == [2, 3, 4, 2]
                assert remotecall_fetch(pow, 2, 2, turn) == 2**turn
        assert comm.allreduce(1) == comm.size


def test_before_the_block_every_call_is_refused() -> None:
    for f in (workers, myid, lambda: addprocs(1), lambda: remotecall(abs, 1, 1), hpcdist.status):
        with pytest.raises(RuntimeError, match="init"):
            f()


def test_error_in_the_block() -> None:
    """It is raised on rank 0; the others are let go, and all go on together."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    caught = False
    try:
        with hpcdist.cluster(MPIManager()) as pids:
            if pids is not None:
                raise LookupError("mine")
    except LookupError:
        caught = True
    assert caught == (comm.rank == 0)
    assert comm.allreduce(int(caught)) == 1


def test_part_of_the_ranks() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    part = comm.Split(int(comm.rank < comm.size - 1), comm.rank)
    if comm.rank < comm.size - 1:
        with hpcdist.cluster(MPIManager(comm=part)) as pids:
            if pids is not None:
                assert pids == list(range(2, part.size + 1))
                assert [remotecall_fetch(rank, pid) for pid in pids] == list(range(1, part.size))
                assert remotecall_fetch(relay, 2, [3, 2]) == [2, 3, 2]
    else:
        assert part.size == 1
    assert comm.allreduce(1) == comm.size
    part.Free()


def test_other_order_of_ranks() -> None:
    """Process 1 is rank 0 of the communicator that was given, whatever that is in the world."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    turned = comm.Split(0, -comm.rank)
    with hpcdist.cluster(MPIManager(comm=turned)) as pids:
        assert (pids is not None) == (comm.rank == comm.size - 1)
        if pids is not None:
            there = [remotecall_fetch(rank, pid) for pid in pids]
            assert there == list(reversed(range(comm.size - 1)))
    turned.Free()
    assert comm.allreduce(1) == comm.size


def test_two_clusters_side_by_side() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    half = comm.Split(comm.rank % 2, comm.rank)
    with hpcdist.cluster(MPIManager(comm=half)) as pids:
        if pids is not None:
            assert pids == list(range(2, half.size + 1))
            ranks = [remotecall_fetch(rank, pid) for pid in pids]
            assert ranks == [k for k in range(comm.size) if k % 2 == comm.rank % 2][1:]
    half.Free()
    assert comm.allreduce(1) == comm.size


def test_users_messages_beside_ours() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    token = comm.sendrecv(
        comm.rank, (comm.rank + 1) % comm.size, 0, None, (comm.rank - 1) % comm.size, 0
    )
    assert token == (comm.rank - 1) % comm.size
    with hpcdist.cluster(MPIManager()) as pids:
        if pids is not None:
            calls = [remotecall(exchange, pid) for pid in pids]
            total = exchange()
            assert [call.fetch(timeout=LONG) for call in calls] == [total] * len(pids)


def exchange() -> int:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    for _ in range(50):
        comm.sendrecv(bytes(1000), comm.rank ^ 1, 0, None, comm.rank ^ 1, 0)
    return int(comm.allreduce(comm.rank))
