"""`spmd` and `comm()`: one function on several workers at the same moment."""

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    CompositeException,
    Future,
    ProcessExitedException,
    RemoteException,
    addprocs,
    comm,
    interrupt,
    myid,
    remotecall,
    remotecall_fetch,
    rmprocs,
    spmd,
    workers,
)
from tests.helpers import eventually, kill9

# --- what the workers run ------------------------------------------------------------------------


def who() -> tuple[int, int, list[int]]:
    world = comm()
    return world.rank, world.size, world.allgather(myid())


def add_up(first: int, *, size: int = 1000) -> float:
    world = comm()
    mine = np.full(size, float(first + world.rank))
    total = np.empty_like(mine)
    world.Allreduce(mine, total)
    assert (total == total[0]).all()
    return float(total[0])


def collectives() -> Any:
    world = comm()
    told = world.bcast({"from": 0} if world.rank == 0 else None)
    mine = world.scatter(list(range(world.size)) if world.rank == 0 else None)
    gathered = world.gather(mine**2)
    ring = world.sendrecv(
        world.rank, (world.rank + 1) % world.size, source=(world.rank - 1) % world.size
    )
    return told, gathered, ring


def handle() -> tuple[int, int]:
    from mpi4py import MPI

    world = comm()
    return id(world), MPI._handleof(world)


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def meet_then(seconds: float) -> tuple[float, float]:
    comm().Barrier()
    start = time.time()
    time.sleep(seconds)
    return start, time.time()


def fail_at(rank: int, then: str = "barrier") -> int:
    world = comm()
    if world.rank == rank:
        raise ZeroDivisionError(f"rank {rank}")
    if then == "barrier":
        world.Barrier()
    elif then == "sleep":
        time.sleep(3)
    elif then == "fetch":
        Future().fetch()  # nobody ever puts anything there
    return world.rank


def fail_everywhere() -> None:
    raise ValueError(myid())


def reduce_for_ever(path: str) -> None:
    world = comm()
    Path(path, str(os.getpid())).touch()
    mine, total = np.ones(10), np.empty(10)
    while True:
        world.Allreduce(mine, total)


def write_together(path: str, each: int) -> int:
    from mpi4py import MPI

    world = comm()
    file = MPI.File.Open(world, path, MPI.MODE_CREATE | MPI.MODE_RDWR)
    mine = np.full(each, world.rank, dtype="i4")
    file.Write_at_all(world.rank * mine.nbytes, mine)
    file.Sync()
    world.Barrier()
    whole = np.empty(each * world.size, dtype="i4")
    file.Read_at_all(0, whole)
    file.Close()
    return int(whole.sum())


def from_here(pids: list[int]) -> list[float]:
    return spmd(add_up, 1, pids=pids)


def inside_itself(pids: list[int]) -> None:
    spmd(who, pids=pids)


def comm_in_thread() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(comm().size))
    thread.start()
    thread.join()
    return found[0]


class Unloadable:
    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    if myid() != 1:
        raise LookupError("not here")


async def asynchronous() -> int:
    return comm().allreduce(1)


# --- entering ------------------------------------------------------------------------------------


def test_every_worker_runs_it_and_results_come_in_order_of_pid(pids: list[int]) -> None:
    size = len(pids)
    assert spmd(who) == [(rank, size, pids) for rank in range(size)]


def test_ranks_go_by_pid_whatever_order_was_given(pids: list[int]) -> None:
    some = pids[:2]
    assert spmd(who, pids=some[::-1]) == [(0, 2, some), (1, 2, some)]
    assert spmd(who, pids=pids[1]) == [(0, 1, [pids[1]])]


def test_buffers_and_keywords(pids: list[int]) -> None:
    assert spmd(add_up, 10, size=100_000) == [33.0] * 3


def test_pickled_collectives(pids: list[int]) -> None:
    first, *others = spmd(collectives)
    assert first == ({"from": 0}, [0, 1, 4], 2)
    assert [ring for _, _, ring in others] == [0, 1]


def test_functions_by_value_and_coroutines(pids: list[int]) -> None:
    captured = 5
    assert spmd(lambda: hpcdist.comm().allreduce(captured)) == [15] * 3
    assert spmd(asynchronous) == [3] * 3


def test_it_runs_on_the_main_thread(pids: list[int]) -> None:
    assert spmd(on_main_thread) == [True] * 3


def test_a_communicator_is_kept_and_used_again(pids: list[int]) -> None:
    first, part = spmd(handle), spmd(handle, pids=pids[:2])
    assert spmd(handle) == first
    assert spmd(handle, pids=pids[:2]) == part
    assert first[0] != part[0]


def test_disjoint_sets_run_at_once(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(4)
    left = spmd.submit(meet_then, 1.0, pids=pids[:2])
    right = spmd.submit(meet_then, 1.0, pids=pids[2:])
    spans = left.fetch() + right.fetch()
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_overlapping_sets_take_turns(pids: list[int]) -> None:
    sets = [pids[:2], pids[1:], [pids[0], pids[2]], pids] * 5
    started = [spmd.submit(add_up, 0, pids=some) for some in sets]
    assert [future.fetch(30)[0] for future in started] == [
        sum(range(len(some))) * 1.0 for some in sets
    ]


def test_overlapping_sets_asked_for_by_many_threads_and_workers(pids: list[int]) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(spmd, add_up, 1, pids=pids[k % 2 : k % 2 + 2]) for k in range(12)]
        elsewhere = [remotecall(from_here, pid, pids) for pid in pids]
        assert [future.result(30) for future in asked] == [[3.0, 3.0]] * 12
        assert [future.fetch(30) for future in elsewhere] == [[6.0] * 3] * 3


def test_it_waits_for_the_turns_of_busy_members(pids: list[int]) -> None:
    busy = remotecall(time.sleep, pids[0], 0.7)
    start = time.monotonic()
    assert spmd(who)[0][1] == 3
    assert time.monotonic() - start > 0.5
    busy.fetch()


def test_a_future_is_an_ordinary_one(pids: list[int]) -> None:
    future = spmd.submit(add_up, 1)
    assert isinstance(future, Future)
    assert list(concurrent.futures.as_completed([future])) == [future]
    assert future.result() == hpcdist.fetch(future) == [6.0] * 3


def test_arguments_are_taken_as_they_are_at_the_call(pids: list[int]) -> None:
    busy = remotecall(time.sleep, pids[0], 0.3)
    array, futures = np.ones(100_000), Future()
    future = spmd.submit(lambda a, f: (float(a.sum()), f.fetch()), array, futures)
    array[:] = 0
    futures.put("late")
    assert future.fetch() == [(100_000.0, "late")] * 3
    busy.fetch()


# --- mistakes ------------------------------------------------------------------------------------


def test_comm_outside_of_a_section(pids: list[int]) -> None:
    with pytest.raises(RuntimeError, match="spmd"):
        comm()
    with pytest.raises(RuntimeError, match="spmd"):
        remotecall_fetch(who, pids[0])
    assert spmd(comm_in_thread) == [3] * 3


@pytest.mark.parametrize("wrong", [[], [2, 2]])
def test_sets_that_are_none(wrong: list[int], pids: list[int]) -> None:
    with pytest.raises(ValueError):
        spmd(who, pids=[pids[0]] * len(wrong))
    with pytest.raises(ValueError, match="no process with id 9999"):
        spmd(who, pids=[9999])


def test_a_section_cannot_wait_for_itself(pids: list[int]) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        spmd(inside_itself, pids, pids=pids[:1], grace=1)


def test_what_cannot_be_pickled_fails_at_the_call(pids: list[int]) -> None:
    with pytest.raises(TypeError):
        spmd.submit(who, threading.Lock())
    with pytest.raises(TypeError):
        spmd.submit("who")
    with pytest.raises(LookupError, match="not here"):
        spmd(lambda _: None, Unloadable(), pids=pids[:1])
    with pytest.raises((LookupError, CompositeException)):
        spmd(lambda _: None, Unloadable())
    with pytest.raises(CompositeException):
        spmd(threading.Lock)
    assert spmd(add_up, 1) == [6.0] * 3


def test_workers_of_different_worlds(pids: list[int], fresh: Callable[..., list[int]]) -> None:
    (other,) = fresh(1)
    with pytest.raises(ValueError, match="world"):
        spmd(who, pids=[pids[0], other])
    with pytest.raises(ValueError, match="world"):
        spmd(who, pids=[1, other])
    assert spmd(who, pids=[other]) == [(0, 1, [other])]


def test_workers_without_a_world(fresh: Callable[..., list[int]]) -> None:
    apart = fresh(2, isolation="process")
    with pytest.raises(ValueError, match="process"):
        spmd(who, pids=apart)


# --- failures ------------------------------------------------------------------------------------


def test_the_culprit_is_named_and_the_others_are_freed(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(4)
    trio = pids[:3]
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="rank 1") as caught:
        spmd(fail_at, 1, pids=trio, grace=1)
    assert isinstance(caught.value, RemoteException)
    assert caught.value.pid == trio[1]
    assert 0.9 < time.monotonic() - start < 15
    left = eventually(lambda: [pid for pid in pids if pid in workers()])
    assert trio[1] in left
    assert pids[3] in left
    assert spmd(add_up, 0, pids=left)[0] == sum(range(len(left)))


COST = """
import hpcdist
from hpcdist import comm, spmd
pids = hpcdist.addprocs(3)
def careless():
    if comm().rank == 1: raise ValueError("no data for rank 1")
    comm().Barrier()
try: spmd(careless, grace=0.5)
except ValueError as error: print(error.pid)
while len(left := [pid for pid in pids if pid in hpcdist.workers()]) not in (1, 3): pass
print(*left)
hpcdist.rmprocs(left)
print(len(spmd(lambda: comm().size, pids=hpcdist.addprocs(3))))
"""


def test_what_a_failure_has_cost_is_told(script: Callable[..., Any]) -> None:
    done = script(COST)
    assert done.rc == 0, done.err
    culprit, left, again = done.out.splitlines()
    assert (culprit, again) == ("3", "3")
    if left == "2 3 4":  # Open MPI: they are freed
        assert "cost" not in done.err
        return
    assert left == "3"
    assert "spmd: process 3 failed (ValueError: no data for rank 1)" in done.err
    assert "cost workers 2 and 4" in done.err
    assert "1 of 3 workers left" in done.err
    assert "rmprocs([3]), then addprocs gives a full world again" in done.err


def test_members_outside_of_mpi_are_left_alone(pids: list[int]) -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        spmd(fail_at, 1, "sleep", grace=0.2)
    assert time.monotonic() - start > 2.5
    assert set(pids) <= set(workers())
    assert spmd(add_up, 1) == [6.0] * 3


def test_members_that_wait_for_us_are_freed(pids: list[int]) -> None:
    with pytest.raises(ZeroDivisionError):
        spmd(fail_at, 1, "fetch", grace=0.2)
    assert set(pids) <= set(workers())


def test_several_failures_come_together(pids: list[int]) -> None:
    with pytest.raises(CompositeException) as caught:
        spmd(fail_everywhere)
    assert [exc.pid for exc in caught.value.exceptions] == pids  # type: ignore[attr-defined]
    assert spmd(add_up, 1) == [6.0] * 3


def test_a_member_is_killed_inside_mpi(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    pids = fresh(4)
    victim = pids[1]
    os_pid = remotecall_fetch(os.getpid, victim)
    future = spmd.submit(reduce_for_ever, str(tmp_path), pids=pids[:3], grace=1)
    eventually(lambda: len(list(tmp_path.iterdir())) == 3)
    time.sleep(0.1)
    kill9(os_pid)
    with pytest.raises(ProcessExitedException) as caught:
        future.fetch(30)
    assert caught.value.pid == victim
    with pytest.raises(ProcessExitedException):
        spmd(who, pids=[victim, pids[0]])
    left = [pid for pid in pids if pid in workers()]
    assert pids[3] in left
    assert spmd(add_up, 0, pids=left)[0] == sum(range(len(left)))


def test_a_member_that_is_killed_before_it_enters(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(3)
    os_pid = remotecall_fetch(os.getpid, pids[0])
    remotecall(time.sleep, pids[0], 60)
    future = spmd.submit(who, pids=pids)
    time.sleep(0.2)
    kill9(os_pid)
    with pytest.raises(ProcessExitedException) as caught:
        future.fetch(10)
    assert caught.value.pid == pids[0]
    assert spmd(who, pids=pids[1:]) == [(0, 2, pids[1:]), (1, 2, pids[1:])]


def test_a_caller_that_dies_blocks_nobody(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(3)
    caller = pids[0]
    os_pid = remotecall_fetch(os.getpid, caller)
    busy = remotecall(time.sleep, pids[1], 1.0)
    remotecall(from_here, caller, pids[1:])
    time.sleep(0.2)
    kill9(os_pid)
    busy.fetch()
    assert spmd(add_up, 1, pids=pids[1:]) == [3.0, 3.0]


def test_an_interrupt_ends_members_that_compute(pids: list[int]) -> None:
    future = spmd.submit(time.sleep, 30, grace=1)
    time.sleep(0.3)
    interrupt(pids)
    with pytest.raises(CompositeException) as caught:
        future.fetch(10)
    causes = [exc.cause for exc in caught.value.exceptions]  # type: ignore[attr-defined]
    assert all(isinstance(cause, KeyboardInterrupt) for cause in causes)


def test_an_interrupt_ends_the_wait_at_the_gate(pids: list[int]) -> None:
    busy = remotecall(signal.sigtimedwait, pids[0], [signal.SIGUSR2], 2)
    future = spmd.submit(who, grace=1)
    time.sleep(0.3)
    interrupt(pids[1])
    with pytest.raises(RemoteException) as caught:
        future.fetch(20)
    assert isinstance(caught.value.cause, KeyboardInterrupt)
    busy.fetch()
    assert spmd(add_up, 1) == [6.0] * 3


def test_parallel_io(pids: list[int], tmp_path: Path) -> None:
    path = tmp_path / "together"
    assert spmd(write_together, str(path), 1000) == [3000] * 3
    assert path.stat().st_size == 12_000


def test_alone(script: Callable[..., Any], tmp_path: Path) -> None:
    # Open MPI leaves a folder behind for a process that it was not asked to launch.
    done = script(
        "import hpcdist\n"
        "print(hpcdist.spmd(lambda: hpcdist.comm().size), hpcdist.spmd(pow, 2, 3, pids=1))\n",
        env={"OMPI_MCA_btl": "self", "TMPDIR": str(tmp_path)},
    )
    assert (done.rc, done.out) == (0, "[1] [8]\n"), done.err


def test_in_an_mpi_launch_the_culprit_is_named_before_the_launcher_ends_everything(
    script: Callable[..., Any], tmp_path: Path
) -> None:
    before = set(Path("/dev/shm").glob("mpich_shm_*"))
    done = script(
        "import hpcdist\n"
        "hpcdist.init()\n"
        "def careless():\n"
        "    if hpcdist.comm().rank == 1: raise KeyError('lost')\n"
        "    hpcdist.comm().Barrier()\n"
        "try: hpcdist.spmd(careless, grace=1)\n"
        "except KeyError as error: print('process', error.pid, 'failed')\n",
        ranks=3,
        env={"TMPDIR": str(tmp_path)},
    )
    assert "process 3 failed" in done.out + done.err
    assert "KeyError" in done.err
    for left in set(Path("/dev/shm").glob("mpich_shm_*")) - before:
        left.unlink(missing_ok=True)  # MPICH's, when its launcher kills the world


def test_after_all_workers_were_replaced(fresh: Callable[..., list[int]]) -> None:
    first = fresh(2)
    assert spmd(add_up, 1, pids=first) == [3.0, 3.0]
    rmprocs(first)
    second = addprocs(2)
    assert spmd(add_up, 1, pids=second) == [3.0, 3.0]
    rmprocs(second)
