"""Who is there: adding and removing workers, their settings, interrupts, the table of them."""

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    Future,
    LocalManager,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    addprocs,
    interrupt,
    launch,
    myid,
    nprocs,
    nworkers,
    procs,
    remotecall,
    remotecall_fetch,
    rmprocs,
    workers,
)
from tests.cluster.test_futures import in_thread
from tests.helpers import eventually, faults_of_temporaries

LONG = 30.0  # seconds after which a wait that ought to end is taken for lost
NAP = 60.0  # seconds a call sleeps that is to be cut short; longer than any patience here

# --- what the workers run; they import this module -----------------------------------------------


def view() -> tuple[list[int], list[int], int, int]:
    return procs(), workers(), nprocs(), nworkers()


def options() -> dict[str, Any]:
    return {
        "dir": os.getcwd(),
        "path": sys.path,
        "xoptions": dict(sys._xoptions),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "own": os.environ.get("HD_OWN"),
    }


def mark_and(started: str, f: Callable[..., Any], *args: Any) -> Any:
    """Tell that this call runs, by no wait of ours: it must keep its turn. Then do its work."""
    Path(started).touch()
    return f(*args)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def add_one() -> list[int]:
    return addprocs(1)


def process_is_gone(os_pid: int) -> bool:
    """Tell whether a process has ended; one that nobody has waited for has ended too."""
    try:
        stat = Path(f"/proc/{os_pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def running(pid: int, f: Callable[..., Any], *args: Any) -> Future:
    """Start `f` on a worker, and return once it runs."""
    with tempfile.TemporaryDirectory() as folder:
        started = Path(folder) / "started"
        call = remotecall(mark_and, pid, str(started), f, *args)
        eventually(started.exists, timeout=LONG)
    return call


# --- who is there --------------------------------------------------------------------------------


def test_alone(script: Callable[..., Any]) -> None:
    text = """
        from hpcdist import addprocs, myid, nprocs, nworkers, procs, remotecall_fetch, workers

        assert (myid(), procs(), workers(), nprocs(), nworkers()) == (1, [1], [1], 1, 1)
        assert procs(1) == [1]
        assert addprocs(0) == []
        assert workers() == [1]
        assert remotecall_fetch(myid, workers()[0]) == 1
    """
    done = script(dedent(text))
    assert (done.rc, done.err) == (0, "")


def test_all_agree(pids: list[int]) -> None:
    assert view() == ([1, *pids], pids, 4, 3)
    for pid in pids:
        eventually(lambda pid=pid: remotecall_fetch(view, pid) == view())
    assert sorted(procs(1)) == [1, *pids]
    assert sorted(remotecall_fetch(procs, pids[0], pids[1])) == [1, *pids]


def test_ids_are_never_used_again(fresh: Callable[..., list[int]]) -> None:
    first = fresh(2)
    assert first == sorted(first)
    assert set(first) <= set(workers())
    rmprocs(first)
    (second,) = fresh(1)
    assert second > max(first)


def test_one_per_core_by_default(fresh: Callable[..., list[int]]) -> None:
    assert len(fresh(None)) == len(os.sched_getaffinity(0))


def test_managers_are_accepted(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(LocalManager(1))
    assert remotecall_fetch(myid, pid) == pid


def test_threads_may_add_at_the_same_time(fresh: Callable[..., list[int]]) -> None:
    adding = [in_thread(fresh, 1) for _ in range(3)]
    new = [pid for thread in adding for pid in thread.result(2 * LONG)]
    assert len(set(new)) == 3
    assert sorted(remotecall_fetch(myid, pid) for pid in new) == sorted(new)


def test_only_pid_1_adds_and_removes(pids: list[int]) -> None:
    message = "Only process 1 can add and remove workers"
    with pytest.raises(RuntimeError, match=message):
        remotecall_fetch(add_one, pids[0])
    with pytest.raises(RuntimeError, match=message):
        remotecall_fetch(rmprocs, pids[0], pids[1])
    assert workers() == pids


def test_with_cluster() -> None:
    with hpcdist.cluster(2) as pids:
        assert pids is not None
        assert len(pids) == 2
        assert set(pids) <= set(workers())
        os_pids = [remotecall_fetch(os.getpid, pid) for pid in pids]
    assert not set(pids) & set(workers())
    for os_pid in os_pids:
        eventually(lambda os_pid=os_pid: process_is_gone(os_pid))


# --- parameters ----------------------------------------------------------------------------------


def test_unknown_keyword(pids: list[int]) -> None:
    for start in (addprocs, launch):
        with pytest.raises(TypeError, match=r"topolgy.*topology"):
            start(1, topolgy="all_to_all")
    assert workers() == pids


def test_directory_and_path_are_those_of_pid_1(pids: list[int]) -> None:
    found = remotecall_fetch(options, pids[0])
    assert found["dir"] == os.getcwd()
    assert set(filter(None, sys.path)) <= set(found["path"])
    assert found["threads"] == "1"


def test_settings_of_a_worker(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    (pid,) = fresh(
        1,
        dir=str(tmp_path),
        env={"HD_OWN": "ours", "OMP_NUM_THREADS": "3"},
        exeflags=["-X", "hd_flag"],
        python=sys.executable,
        lazy=True,
    )
    found = remotecall_fetch(options, pid)
    assert os.path.samefile(found["dir"], tmp_path)
    assert found["own"] == "ours"
    assert found["threads"] == "3"
    assert found["xoptions"].get("hd_flag") is True
    assert remotecall_fetch(myid, pid) == pid


def test_the_very_first_call_runs_on_the_main_thread(fresh: Callable[..., list[int]]) -> None:
    """It may come before the worker serves."""
    for _ in range(3):
        first = [hpcdist.remotecall(thread_name, pid) for pid in fresh(4)]
        assert [future.fetch() for future in first] == ["MainThread"] * 4


def thread_name() -> str:
    return threading.current_thread().name


def test_memory_of_temporary_arrays_is_kept(fresh: Callable[..., list[int]]) -> None:
    (kept,) = fresh(1)
    small = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    (given_back,) = fresh(1, env=small)
    assert remotecall_fetch(faults_of_temporaries, kept) < 1000
    assert remotecall_fetch(faults_of_temporaries, given_back) > 5000, "the user's own setting"


def test_threaded_blas(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1, enable_threaded_blas=True)
    assert remotecall_fetch(options, pid)["threads"] == os.environ.get("OMP_NUM_THREADS")


def test_exename_is_another_name_for_python(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1, exename=sys.executable)
    assert remotecall_fetch(myid, pid) == pid


@pytest.mark.parametrize("isolation", ["world", "process", "auto"])
def test_isolation(isolation: str, fresh: Callable[..., list[int]]) -> None:
    first, second = fresh(2, isolation=isolation)
    assert remotecall_fetch(remotecall_fetch, first, myid, second) == second
    data = bytes(5_000_000)
    assert remotecall_fetch(remotecall_fetch, first, len, second, data) == len(data)


def test_min_workers(fresh: Callable[..., list[int]]) -> None:
    before = nworkers() if workers() != [1] else 0
    new = fresh(2, min_workers=1)
    assert 1 <= len(new) <= 2
    eventually(lambda: nworkers() == before + 2, timeout=LONG)
    rmprocs(workers()[before:])


@pytest.mark.parametrize(
    "params", [{"topology": "ring"}, {"isolation": "perhaps"}, {"concurrency": 0}]
)
def test_values_that_make_no_sense(params: dict[str, Any], pids: list[int]) -> None:
    with pytest.raises(ValueError):
        addprocs(1, **params)
    assert workers() == pids


def test_topologies_do_not_mix(pids: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)all_to_all.*master_worker|master_worker.*all_to_all"
    ):
        addprocs(1, topology="master_worker")
    assert workers() == pids


def test_master_worker_topology(script: Callable[..., Any]) -> None:
    text = """
        from hpcdist import addprocs, myid, remotecall_fetch

        addprocs(2, topology="master_worker")
        assert remotecall_fetch(remotecall_fetch, 2, myid, 1) == 1
        assert remotecall_fetch(remotecall_fetch, 2, myid, 2) == 2
        try:
            remotecall_fetch(remotecall_fetch, 2, myid, 3)
        except RuntimeError as exc:
            assert exc.pid == 2, exc
            assert "master_worker" in str(exc)
        else:
            raise SystemExit("2 may call 3")
        assert remotecall_fetch(myid, 3) == 3
    """
    done = script(dedent(text))
    assert done.rc == 0, done.err


# --- launch --------------------------------------------------------------------------------------


def test_launch_does_not_wait() -> None:
    starting = launch(2)
    try:
        new = starting.wait(timeout=2 * LONG)
        assert new == sorted(new) == sorted(starting.pids)
        assert len(new) == 2
        assert str(starting.state) == "RUNNING"
        assert [remotecall_fetch(myid, pid) for pid in new] == new
    finally:
        rmprocs(starting.pids)


def test_launch_waits_for_some_or_not_long() -> None:
    starting = launch(2)
    try:
        try:
            starting.wait(timeout=0)
        except TimeoutError:
            pass
        some = starting.wait(1, timeout=2 * LONG)
        assert len(some) >= 1
        assert set(some) <= set(starting.wait(timeout=2 * LONG))
    finally:
        rmprocs(starting.pids)


def test_launch_can_be_cancelled(pids: list[int]) -> None:
    starting = launch(2)
    starting.cancel()
    starting.cancel()
    eventually(lambda: workers() == pids, timeout=LONG)
    assert str(starting.state) == "CANCELLED"
    with pytest.raises(hpcdist.LaunchError):
        starting.wait(timeout=LONG)


# --- removal -------------------------------------------------------------------------------------


def test_rmprocs_takes_numbers_and_lists(fresh: Callable[..., list[int]]) -> None:
    first, second, third = fresh(3)
    os_pids = [remotecall_fetch(os.getpid, pid) for pid in (first, second, third)]
    rmprocs(first, [second, third])
    assert not {first, second, third} & set(workers())
    for os_pid in os_pids:
        eventually(lambda os_pid=os_pid: process_is_gone(os_pid))
    with pytest.raises(ProcessExitedException):
        remotecall(myid, first)


def test_rmprocs_without_waiting(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, pid)
    removal = rmprocs(pid, waitfor=0)
    assert isinstance(removal, hpcdist.Removal)
    assert pid not in workers()
    removal.wait(timeout=LONG)
    eventually(lambda: process_is_gone(os_pid))


def test_rmprocs_of_one_that_will_not_go(fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, pid)
    call = running(pid, spin, NAP)
    with pytest.raises(TimeoutError, match=str(pid)):
        rmprocs(pid, waitfor=0.001)
    assert pid not in workers()
    eventually(lambda: process_is_gone(os_pid), timeout=25)  # Escalation takes at most 15 s.
    # It may have been interrupted on the way.
    with pytest.raises((ProcessExitedException, RemoteException)):
        call.fetch(timeout=LONG)


def test_rmprocs_of_pid_1_warns(pids: list[int]) -> None:
    with pytest.warns(Warning, match="1"):
        rmprocs(1)
    assert remotecall_fetch(myid, 1) == 1


def test_rmprocs_of_nobody(pids: list[int], fresh: Callable[..., list[int]]) -> None:
    (pid,) = fresh(1)
    rmprocs(pid)
    rmprocs(pid, 99999, [])
    rmprocs()
    assert workers() == pids


def test_calls_under_way_end_with_the_worker(
    fresh: Callable[..., list[int]], pids: list[int]
) -> None:
    (pid,) = fresh(1)
    call = running(pid, Future().fetch)
    elsewhere = remotecall(hpcdist.fetch, pids[0], call)
    rmprocs(pid)
    for future in (call, elsewhere):
        with pytest.raises((ProcessExitedException, RemoteException)):
            future.fetch(timeout=LONG)


# --- interrupt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [time.sleep, spin], ids=["time.sleep", "computation"])
def test_interrupt_ends_the_running_call(f: Callable[..., Any], pids: list[int]) -> None:
    pid = pids[0]
    os_pid = remotecall_fetch(os.getpid, pid)
    call = running(pid, f, NAP)
    queued = remotecall(myid, pid)
    interrupt(pid)
    with pytest.raises(RemoteException) as caught:
        call.fetch(timeout=LONG)
    assert type(caught.value.cause) is KeyboardInterrupt
    assert queued.fetch(timeout=LONG) == pid
    assert remotecall_fetch(os.getpid, pid) == os_pid


def test_interrupt_ends_a_wait(pids: list[int]) -> None:
    never, empty = Future(pids[1]), RemoteChannel(1, pids[1])
    waits: list[tuple[Any, ...]] = [(never.fetch,), (never.wait,), (empty.take,), (empty.fetch,)]
    for wait in (*waits, (hpcdist.sleep, NAP)):
        call = running(pids[0], *wait)
        interrupt(pids[0])
        with pytest.raises(RemoteException) as caught:
            call.fetch(timeout=LONG)
        assert type(caught.value.cause) is KeyboardInterrupt
    empty.put("whole")
    assert empty.take(timeout=LONG) == "whole"


def test_interrupt_without_pids_reaches_all(pids: list[int]) -> None:
    calls = [running(pid, time.sleep, NAP) for pid in pids]
    interrupt()
    for call in calls:
        with pytest.raises(RemoteException):
            call.fetch(timeout=LONG)
    assert [remotecall_fetch(myid, pid) for pid in pids] == pids


def test_interrupt_of_an_idle_worker_does_nothing(pids: list[int]) -> None:
    os_pids = [remotecall_fetch(os.getpid, pid) for pid in pids]
    for _ in range(20):
        interrupt(pids)
        assert [remotecall_fetch(os.getpid, pid) for pid in pids] == os_pids


# --- status --------------------------------------------------------------------------------------


def test_status(pids: list[int]) -> None:
    call = running(pids[0], time.sleep, NAP)
    queued = remotecall(myid, pids[0])
    try:
        eventually(lambda: row_of(pids[0]).running == 1 and row_of(pids[0]).queued >= 1)
        rows = hpcdist.status()
        assert [row.pid for row in rows] == [1, *pids]
        assert rows[0].os_pid == os.getpid()
        for row in rows[1:]:
            assert isinstance(row, hpcdist.WorkerStatus)
            assert row.host in (socket.gethostname(), socket.getfqdn(), "localhost")
        assert rows[2].os_pid == remotecall_fetch(os.getpid, pids[1])
        assert (rows[2].rss or 0) > 1_000_000
        table = str(rows).splitlines()
        assert all(any(str(row.os_pid) in line for line in table) for row in rows)
    finally:
        interrupt(pids[0])
    with pytest.raises(RemoteException):
        call.fetch(timeout=LONG)
    assert queued.fetch(timeout=LONG) == pids[0]


def row_of(pid: int) -> Any:
    return next(row for row in hpcdist.status() if row.pid == pid)


# --- whole drivers -------------------------------------------------------------------------------


def test_init_makes_one_script_run_in_every_way(script: Callable[..., Any]) -> None:
    text = """
        import hpcdist
        from hpcdist import myid, procs, remotecall_fetch, workers

        hpcdist.init(2)
        hpcdist.init(5)
        assert myid() == 1
        assert workers() == [2, 3], workers()
        assert [remotecall_fetch(procs, pid) for pid in workers()] == [procs()] * 2
        print("once")
    """
    for ranks in (None, 3):
        done = script(dedent(text), ranks=ranks)
        assert done.rc == 0, done.err
        assert done.out.split() == ["once"]


def test_init_comes_first_under_mpi(script: Callable[..., Any]) -> None:
    done = script("import hpcdist\nprint(hpcdist.workers())\n", ranks=2)
    assert done.rc != 0
    assert "RuntimeError" in done.err
    assert "init()" in done.err
    assert "[1]" not in done.out


def test_shutdown_and_again(script: Callable[..., Any]) -> None:
    text = """
        from hpcdist import addprocs, myid, remotecall_fetch, shutdown, workers

        addprocs(2)
        shutdown()
        shutdown()
        assert workers() == [1]
        (pid,) = addprocs(1)
        assert pid == 4 and remotecall_fetch(myid, pid) == pid
    """
    done = script(dedent(text))
    assert (done.rc, done.err) == (0, "")


def test_spmd_style_block_in_an_mpi_launch(script: Callable[..., Any]) -> None:
    text = """
        import hpcdist
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        assert world.allreduce(1) == 3
        with hpcdist.cluster(hpcdist.MPIManager()) as pids:
            if pids is not None:
                assert world.rank == 0 and pids == [2, 3]
                ranks = [hpcdist.remotecall_fetch(lambda: MPI.COMM_WORLD.rank, p) for p in pids]
                assert ranks == [1, 2], ranks
        assert world.allreduce(world.rank) == 3
    """
    done = script(dedent(text), ranks=3)
    assert done.rc == 0, done.err
