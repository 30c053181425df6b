"""What goes wrong: workers that die, drivers that die, Ctrl-C, launches that fail."""

import asyncio
import ctypes
import gc
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ClusterManager,
    Future,
    LaunchError,
    MPIManager,
    ProcessExitedException,
    RemoteChannel,
    WorkerConfig,
    addprocs,
    myid,
    remotecall,
    remotecall_fetch,
    rmprocs,
    workers,
)
from hpcdist._cluster import roster
from hpcdist._keeper.processes import segments_of, stat_of
from tests.cluster.test_channels import blocked
from tests.cluster.test_futures import in_thread
from tests.cluster.test_processes import process_is_gone, running
from tests.helpers import eventually, kill9, mpi_flavour

LONG = 30.0  # seconds after which a wait that ought to end is taken for lost
NOTICED = 20.0  # seconds within which a death is to be known everywhere, on any load
ENDED = 8.0  # seconds after which no worker may be left of a driver that is gone

# --- what the workers run; they import this module -----------------------------------------------


def for_ever() -> None:
    """Wait as no wait of hpcdist would; ends with the process alone."""
    threading.Event().wait()


def segfault() -> None:
    ctypes.string_at(0)


def fork_a_child() -> int:
    """Leave behind a child that holds every descriptor its parent had open."""
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    return child


def fetch_and_return_pid_of_the_dead(reference: Any) -> int:
    try:
        hpcdist.fetch(reference)
    except ProcessExitedException as exc:
        return exc.pid
    return -1


async def await_and_return_pid_of_the_dead(future: Future) -> int:
    try:
        await future
    except ProcessExitedException as exc:
        return exc.pid
    return -1


def obituary(pid: int) -> ProcessExitedException:
    """Return what is known by now of the end of a process."""
    with pytest.raises(ProcessExitedException) as caught:
        remotecall(myid, pid)
    return caught.value


# --- a worker dies -------------------------------------------------------------------------------

DEATHS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[str, ...]]] = {
    "SIGKILL": (for_ever, (), ("SIGKILL", "signal 9")),
    "SIGSEGV": (segfault, (), ("SIGSEGV", "signal 11")),
    "os._exit": (os._exit, (7,), ("7",)),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_is_known_to_all_who_wait(
    death: str, pids: list[int], fresh: Callable[..., list[int]]
) -> None:
    fatal, args, words = DEATHS[death]
    (victim,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, victim)
    owned, empty = RemoteChannel(1, victim), Future(victim)

    # Everything that can wait for a process does: here, in threads, and on the other workers.
    ask = fetch_and_return_pid_of_the_dead
    elsewhere = [remotecall(ask, pid, thing) for pid in pids for thing in (owned, empty)]
    elsewhere += [remotecall(await_and_return_pid_of_the_dead, pid, empty) for pid in pids]
    waits = [owned.take, owned.fetch, owned.wait, empty.fetch, empty.wait, empty.result]
    here = [in_thread(wait) for wait in waits]
    asynchronous = in_thread(asyncio.run, await_and_return_pid_of_the_dead(empty))
    here.append(in_thread(remotecall_fetch, empty.fetch, victim))
    call = remotecall(fatal, victim, *args)
    elsewhere.append(remotecall(ask, pids[0], call))
    start = time.monotonic()
    if fatal is for_ever:
        kill9(os_pid)
        start = time.monotonic()

    with pytest.raises(ProcessExitedException) as caught:
        call.fetch(timeout=NOTICED)
    assert caught.value.pid == victim
    for thread in here:
        error = thread.exception(NOTICED)
        assert isinstance(error, ProcessExitedException), error
        assert error.pid == victim
    assert asynchronous.result(NOTICED) == victim
    assert [future.fetch(timeout=NOTICED) for future in elsewhere] == [victim] * len(elsewhere)
    assert time.monotonic() - start < 2 * NOTICED
    eventually(lambda: any(word in obituary(victim).why for word in words))

    # The others go on, and nobody can call the dead.
    assert workers() == pids
    for caller in (1, *pids):
        assert remotecall_fetch(remotecall_fetch, caller, myid, pids[-1]) == pids[-1]
    with pytest.raises(ProcessExitedException):
        remotecall(myid, victim)
    with pytest.raises(ProcessExitedException):
        owned.put(1)
    (successor,) = fresh(1)
    assert successor > victim
    assert remotecall_fetch(myid, successor) == successor


@pytest.mark.parametrize("isolation", ["auto", "process"])
def test_deaths_in_one_launch_stay_apart(isolation: str, fresh: Callable[..., list[int]]) -> None:
    first, second, third = fresh(3, isolation=isolation)
    waiting = running(second, for_ever)
    kill9(remotecall_fetch(os.getpid, first))
    eventually(lambda: first not in workers(), timeout=NOTICED)
    assert not waiting.done()
    assert remotecall_fetch(remotecall_fetch, third, myid, 1) == 1
    data = os.urandom(3_000_000)
    assert remotecall_fetch(len, third, data) == len(data)
    kill9(status_of(second).os_pid)
    with pytest.raises(ProcessExitedException):
        waiting.fetch(timeout=NOTICED)
    assert remotecall_fetch(myid, third) == third


@pytest.mark.parametrize("isolation", ["auto", "process"])
def test_mpi_abort_ends_its_worker_with_its_code(
    isolation: str, fresh: Callable[..., list[int]]
) -> None:
    """MPICH's only writes a line to the keeper, and returns."""
    first, *others = fresh(3, isolation=isolation)
    call = remotecall(abort, first, 7)
    with pytest.raises(ProcessExitedException, match="MPI_Abort with code 7"):
        call.fetch(timeout=LONG)
    assert obituary(first).why == "MPI_Abort with code 7"
    if mpi_flavour() == "openmpi" and isolation == "auto":
        # Its launcher may end them as well, and then they say whose doing it was.
        eventually(lambda: all(alive(pid) or abort_of(first, pid) for pid in others))
        return
    assert [remotecall_fetch(myid, pid) for pid in others] == others


def alive(pid: int) -> bool:
    try:
        return remotecall_fetch(myid, pid) == pid
    except ProcessExitedException:
        return False


def abort_of(guilty: int, pid: int) -> bool:
    return obituary(pid).why == f"MPI_Abort with code 7 in worker {guilty}"


def abort(code: int) -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(code)


@pytest.mark.parametrize("killed", [False, True])
def test_mpi_imported_outside_of_a_world_leaves_nothing(
    killed: bool, fresh: Callable[..., list[int]]
) -> None:
    """The library removes its shared memory and its folder in MPI_Finalize, where few come."""
    (pid,) = fresh(1, isolation="process")
    os_pid, names, folders = remotecall_fetch(import_mpi, pid)
    assert names == set()
    assert folders == []
    if killed:
        kill9(os_pid)
    rmprocs(pid)
    eventually(lambda: process_is_gone(os_pid))


def import_mpi() -> tuple[int, set[str], list[Path]]:
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    folders = list(Path(tempfile.gettempdir()).glob("ompi.*"))
    return os.getpid(), segments_of(os.getpid()), folders


def test_a_keeper_that_is_killed_leaves_nothing(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(2)
    if mpi_flavour() != "openmpi":  # whose launcher removes them
        eventually(lambda: not any(remotecall_fetch(own_segments, pid) for pid in pids))
    names = set().union(*(remotecall_fetch(own_segments, pid) for pid in pids))
    kill9(keeper_of(status_of(pids[0]).os_pid))
    eventually(lambda: not set(pids) & set(workers()))
    eventually(lambda: not any(os.path.exists(name) for name in names))


def own_segments() -> set[str]:
    return segments_of(os.getpid())


def keeper_of(os_pid: int) -> int:
    """Return the ancestor of a worker that is a child of this process."""
    while True:
        status = stat_of(os_pid)
        assert status is not None
        if status.parent == os.getpid():
            return os_pid
        os_pid = status.parent


def status_of(pid: int) -> Any:
    return next(row for row in hpcdist.status() if row.pid == pid)


def test_a_child_of_the_dead_hides_nothing(fresh: Callable[..., list[int]]) -> None:
    (victim,) = fresh(1)
    child = remotecall_fetch(fork_a_child, victim)
    try:
        call = running(victim, for_ever)
        kill9(status_of(victim).os_pid)
        with pytest.raises(ProcessExitedException):
            call.fetch(timeout=NOTICED)
        eventually(lambda: victim not in workers())
    finally:
        if not process_is_gone(child):
            kill9(child)


def test_the_last_lines_of_stderr_are_in_the_error(fresh: Callable[..., list[int]]) -> None:
    (victim,) = fresh(1)
    call = remotecall(say_and_leave, victim, "the last words")
    with pytest.raises(ProcessExitedException) as caught:
        call.fetch(timeout=NOTICED)
    assert caught.value.pid == victim
    eventually(lambda: any("the last words" in line for line in obituary(victim).stderr))
    assert "the last words" in str(obituary(victim))


def test_a_death_says_what_ran(fresh: Callable[..., list[int]]) -> None:
    """Open MPI's stack of C, 20 lines and more, was all that was left of the last words."""
    (first,), (second,) = fresh(1), fresh(1)  # one that leaves may take along its world (Open MPI)
    call = remotecall(say_and_leave, first, "words")
    with pytest.raises(ProcessExitedException, match=r"\(it was running say_and_leave\)"):
        call.fetch(timeout=LONG)
    with pytest.raises(ProcessExitedException, match=r"SIGSEGV \(it was running say_and_crash\)"):
        remotecall_fetch(say_and_crash, second)
    eventually(lambda: any("in say_and_crash" in line for line in obituary(second).stderr))
    words = obituary(second).stderr
    assert words[0] == "the last words", words
    assert not any("hpcdist/_managers" in line for line in words), words


def test_a_death_quotes_the_call_that_died(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    (victim,) = fresh(1)
    remotecall_fetch(say, victim, "old")
    go = tmp_path / "go"
    calls = [remotecall(say_and_leave_later, victim, "new", go), remotecall(myid, victim)]
    go.touch()
    for call in calls:  # the second has not begun
        with pytest.raises(ProcessExitedException) as caught:
            call.fetch(timeout=LONG)
        error = caught.value
        assert "new" in error.stderr
        assert "old" in error.older
        assert "old" not in str(error).split()
        assert error.call == "say_and_leave_later"
        assert error.call_seconds is not None
        assert f"The call had run for {error.call_seconds:.3g} s" in str(error)


def test_a_death_marks_what_is_older(fresh: Callable[..., list[int]]) -> None:
    (victim,) = fresh(1)
    remotecall_fetch(say, victim, "old")
    call = running(victim, for_ever)
    kill9(status_of(victim).os_pid)
    with pytest.raises(ProcessExitedException) as caught:
        call.fetch(timeout=LONG)
    error = caught.value
    assert (error.stderr, error.older) == ([], ["old"])
    assert "(it was running mark_and)." in str(error)
    assert str(error).endswith("\nOlder lines of its stderr, from before that call:\n    old")
    if mpi_flavour() != "openmpi":  # whose launcher alone sees its ranks' ends
        assert error.peak_rss is not None
    if error.peak_rss is not None:
        assert f"memory had reached {error.peak_rss / 1e6:,.0f} MB." in str(error)
        assert error.peak_rss > 10_000_000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(obituary(victim)) == str(error)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def say_and_leave_later(text: str, go: Path) -> None:
    print(text, file=sys.stderr, flush=True)
    while not go.exists():
        time.sleep(0.01)
    os._exit(3)


def say_and_crash() -> None:
    print("the last words", file=sys.stderr, flush=True)
    segfault()


def say_and_leave(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(3)


def test_deaths_during_large_transfers(fresh: Callable[..., list[int]], pids: list[int]) -> None:
    for sender, receiver in ((1, None), (None, 1), (pids[0], None), (None, pids[0])):
        (victim,) = fresh(1)
        os_pid = remotecall_fetch(os.getpid, victim)
        data_from, data_to = sender or victim, receiver or victim
        transfers = [
            remotecall(remotecall_fetch, data_from, len, data_to, bytes(20_000_000))
            for _ in range(3)
        ]
        kill9(os_pid)
        for transfer in transfers:
            try:
                assert transfer.fetch(timeout=NOTICED) == 20_000_000
            except hpcdist.HpcdistError:
                pass  # Done before the end or not, but never stuck.
        eventually(lambda victim=victim: victim not in workers())
        assert remotecall_fetch(remotecall_fetch, pids[0], len, pids[1], bytes(10**6)) == 10**6


def test_removing_the_dead_is_no_error(fresh: Callable[..., list[int]]) -> None:
    (victim,) = fresh(1)
    kill9(remotecall_fetch(os.getpid, victim))
    rmprocs(victim)
    assert victim not in workers()


@pytest.mark.parametrize("isolation", ["auto", "process"])
def test_a_stopped_worker_is_removed_without_being_asked(
    isolation: str, fresh: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can hear nothing: to ask it took 12 s of each removal, and 2 s of a driver's end."""
    for step in ("_INTERRUPT_AFTER", "_TERM_AFTER", "_KILL_AFTER"):
        monkeypatch.setattr(roster, step, 1000.0)
    stopped, other = fresh(2, isolation=isolation)
    os_pid = status_of(stopped).os_pid
    waiting = running(stopped, for_ever)
    os.kill(os_pid, signal.SIGSTOP)
    eventually(lambda: stat_of(os_pid).state == "T")  # each of its threads
    with pytest.raises(TimeoutError):
        waiting.fetch(timeout=0.1)
    with pytest.raises(TimeoutError):
        remotecall(myid, stopped).fetch(timeout=0.1)
    rmprocs(stopped)
    with pytest.raises(ProcessExitedException):
        waiting.fetch(timeout=LONG)
    eventually(lambda: process_is_gone(os_pid))
    assert remotecall_fetch(myid, other) == other


def test_joins_and_leaves_do_not_add_up(pids: list[int], fresh: Callable[..., list[int]]) -> None:
    """Each kept its link's buffer, 280 KB, its peers, its record and its launch for ever."""

    def come_and_go() -> None:
        (pid,) = fresh(1, isolation="process")
        assert remotecall_fetch(remotecall_fetch, pids[0], myid, pid) == pid
        rmprocs(pid)

    come_and_go()
    before, there = held(), eventually(lambda: peers_at(pids[0]))
    for _ in range(6):
        come_and_go()
    # What has ended is forgotten at the next launch; the last ones may not have ended by then.
    eventually(lambda: all(n <= before[kind] + 2 for kind, n in held().items()), timeout=40)
    eventually(lambda: peers_at(pids[0]) <= there, timeout=40)


def peers_at(pid: int) -> int:
    return remotecall_fetch(lambda: len(hpcdist._runtime.node.here.node.peers), pid)


def held() -> Counter[str]:
    """Count what process 1 has of each worker or launch."""
    gc.collect()
    kinds = ("Peer", "Link", "Record", "World", "Launch", "LocalManager")
    return Counter(k for k in (type(o).__name__ for o in gc.get_objects()) if k in kinds)


def test_deaths_do_not_add_up_to_anything(fresh: Callable[..., list[int]]) -> None:
    for _ in range(3):
        new = fresh(3)
        for pid in new[:2]:
            blocked(pid, RemoteChannel(1, new[2]).take)
        for os_pid in [remotecall_fetch(os.getpid, pid) for pid in new]:
            kill9(os_pid)
        eventually(lambda new=new: not set(new) & set(workers()), timeout=NOTICED)


# --- the driver ends -----------------------------------------------------------------------------

# Four workers: idle, in Python code, in a wait of ours, and in C with the interpreter's lock held,
# where no thread of the worker can notice anything.
BUSY_WORKERS = """
import ctypes, os, signal, sys, time
from pathlib import Path
from hpcdist import RemoteChannel, addprocs, remote_do, remotecall_fetch
from tests.helpers import eventually

pids = addprocs(4)
print(*[remotecall_fetch(os.getpid, pid) for pid in pids], flush=True)
mark = Path(sys.argv[1])
rc = RemoteChannel(1)


def spin(mark):
    Path(mark).touch()
    while True:
        pass


def stuck_in_c(mark):
    Path(mark).touch()
    ctypes.PyDLL(None).sleep(120)


remote_do(spin, pids[1], f"{mark}.spin")
remote_do(rc.take, pids[2])
remote_do(stuck_in_c, pids[3], f"{mark}.c")
eventually(Path(f"{mark}.spin").exists)
eventually(Path(f"{mark}.c").exists)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os._exit(5)", 5),
        ("sys.exit(3)", 3),
        ("raise ValueError('uncaught')", 1),
        ("", 0),
    ],
    ids=["SIGKILL", "SIGTERM", "os._exit", "sys.exit", "exception", "end"],
)
def test_no_worker_outlives_its_driver(
    ending: str, code: int, script: Callable[..., Any], tmp_path: Path
) -> None:
    done = script(f"{BUSY_WORKERS}\n{ending}\n", args=[str(tmp_path / "mark")])
    assert done.rc == code, done.err
    os_pids = [int(word) for word in done.out.splitlines()[0].split()]
    assert len(os_pids) == 4
    try:
        eventually(lambda: all(map(process_is_gone, os_pids)), timeout=ENDED)
    finally:
        for os_pid in os_pids:
            if not process_is_gone(os_pid):
                kill9(os_pid)


# A worker asks a driver that is stopped; what has a deadline ends by it, the rest goes on after.
STOPPED_DRIVER = """
import os, sys
from pathlib import Path
import hpcdist
from hpcdist import RemoteChannel, addprocs, myid, remotecall
from tests.cluster.test_failures import asks_the_stopped
from tests.helpers import eventually

mark = sys.argv[1]
pid, other = addprocs(2)
rc = RemoteChannel(1)
call = remotecall(asks_the_stopped, pid, rc, other, mark)
eventually(Path(f"{mark}.over").exists)
rc.put("an item")
assert call.fetch() == ["take", "fetch", "call", other, "an item"], call.fetch()
"""


def asks_the_stopped(rc: RemoteChannel, other: int, mark: str) -> list[Any]:
    Path(f"{mark}.ready").touch()
    eventually(Path(f"{mark}.stopped").exists)
    asks = {
        "take": lambda: rc.take(timeout=0.1),
        "fetch": lambda: Future(1).fetch(timeout=0.1),
        "call": lambda: remotecall(myid, 1).fetch(timeout=0.1),
    }
    found: list[Any] = []
    for name, ask in asks.items():
        try:
            ask()
        except TimeoutError:
            found.append(name)
    found.append(remotecall_fetch(myid, other))  # the two go on without it
    Path(f"{mark}.over").touch()
    return [*found, rc.take()]


def test_nothing_waits_for_a_stopped_driver_beyond_its_timeout(
    script: Callable[..., Any], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"

    def stop_and_go() -> None:
        eventually((tmp_path / "mark.ready").exists)
        (os_pid,) = driver_with(str(mark))
        os.kill(os_pid, signal.SIGSTOP)
        eventually(lambda: stat_of(os_pid).state == "T")
        (tmp_path / "mark.stopped").touch()
        try:
            eventually((tmp_path / "mark.over").exists)
        finally:
            os.kill(os_pid, signal.SIGCONT)

    accident = in_thread(stop_and_go)
    done = script(STOPPED_DRIVER, args=[str(mark)])
    accident.result(LONG)
    assert done.rc == 0, done.err


def driver_with(argument: str) -> list[int]:
    """Find our child whose last argument this is."""
    tasks = Path("/proc/self/task").iterdir()
    found = [int(word) for task in tasks for word in children_of(task)]
    return [os_pid for os_pid in found if words_of(os_pid)[-1:] == [argument]]


def children_of(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def words_of(os_pid: int) -> list[str]:
    return Path(f"/proc/{os_pid}/cmdline").read_text().rstrip("\0").split("\0")


# --- Ctrl-C --------------------------------------------------------------------------------------

# As the terminal does it: to every process of the driver's group.
CTRL_C = """
import os, signal, threading
import hpcdist
from hpcdist import (
    Channel, Future, RemoteChannel, addprocs, myid, remotecall, remotecall_fetch, remotecall_wait,
)


def interrupted(wait, *args, **kw):
    timer = threading.Timer(0.2, os.killpg, (os.getpgrp(), signal.SIGINT))
    timer.start()
    try:
        wait(*args, **kw)
    except KeyboardInterrupt:
        timer.join()
        return True
    return False


pids = addprocs(2)
os_pids = [remotecall_fetch(os.getpid, pid) for pid in pids]
"""


@pytest.mark.parametrize("owner", ["1", "pids[0]"], ids=["here", "there"])
def test_ctrl_c_withdraws_a_wait_on_a_channel(owner: str, script: Callable[..., Any]) -> None:
    text = f"""
        rc = RemoteChannel(1, {owner})
        for wait in (rc.take, rc.fetch, rc.wait, lambda: [v for v in rc]):
            assert interrupted(wait)
        rc.put("first")
        assert interrupted(rc.put, "withdrawn")
        assert rc.take() == "first", "a taker was left behind"
        assert rc.isempty(), "a putter was left behind"
        rc.put("second")
        assert remotecall_fetch(hpcdist.take, pids[1], rc) == "second"
        assert [remotecall_fetch(os.getpid, pid) for pid in pids] == os_pids
    """
    done = script(CTRL_C + dedent(text))
    assert done.rc == 0, done.err


def test_ctrl_c_leaves_calls_alone(script: Callable[..., Any]) -> None:
    text = """
        import asyncio

        gate = RemoteChannel(1)
        call = remotecall(gate.take, pids[0])
        for wait in (call.fetch, call.wait, call.result, lambda: hpcdist.fetch(call)):
            assert interrupted(wait)
        assert not call.done()
        gate.put("through")
        assert call.fetch() == "through"

        second = RemoteChannel(1)
        assert interrupted(remotecall_fetch, second.take, pids[0])
        second.put("taken by the call that went on")
        assert remotecall_fetch(myid, pids[0]) == pids[0]

        never = Future()
        assert interrupted(never.fetch)
        assert interrupted(hpcdist.sleep, 30)
        assert interrupted(Channel(1).take)
        assert interrupted(remotecall_wait, never.fetch, pids[1])
        assert [remotecall_fetch(os.getpid, pid) for pid in pids] == os_pids
    """
    done = script(CTRL_C + dedent(text))
    assert done.rc == 0, done.err


def test_ctrl_c_without_a_handler_ends_the_driver_as_usual(script: Callable[..., Any]) -> None:
    text = """
        print(*os_pids, flush=True)
        threading.Timer(0.2, os.killpg, (os.getpgrp(), signal.SIGINT)).start()
        RemoteChannel(1, pids[0]).take()
    """
    done = script(CTRL_C + dedent(text))
    assert done.rc in (-signal.SIGINT, 128 + signal.SIGINT), done.err
    assert "KeyboardInterrupt" in done.err
    os_pids = [int(word) for word in done.out.splitlines()[0].split()]
    eventually(lambda: all(map(process_is_gone, os_pids)), timeout=ENDED)


# --- launches that fail --------------------------------------------------------------------------


@pytest.fixture
def unchanged(pids: list[int]) -> Iterator[None]:
    """Check that a failed launch leaves the cluster as it was, and usable."""
    yield
    assert workers() == pids
    assert [remotecall_fetch(myid, pid) for pid in pids] == pids


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.usefixtures("unchanged")
def test_python_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "python")
    with pytest.raises(LaunchError) as caught:
        addprocs(1, python=missing)
    assert missing in str(caught.value)
    assert caught.value.pids == []


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("n", [1, 2])
def test_python_that_ends_at_once(n: int, tmp_path: Path) -> None:
    python = program(tmp_path / "python", "echo no licence >&2; exit 3")
    start = time.monotonic()
    with pytest.raises(LaunchError, match="no licence"):
        addprocs(n, python=python, timeout=LONG)
    assert time.monotonic() - start < LONG / 2  # Its end is noticed, not its silence.


@pytest.mark.usefixtures("unchanged")
def test_python_that_never_answers(tmp_path: Path) -> None:
    python = program(tmp_path / "python", "exec sleep 1000")
    start = time.monotonic()
    with pytest.raises(LaunchError):
        addprocs(1, python=python, timeout=1)
    assert time.monotonic() - start < LONG


@pytest.mark.usefixtures("unchanged")
def test_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises((LaunchError, ValueError), match="nowhere"):
        addprocs(1, dir=str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.timeout(90)
def test_mpiexec_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "mpiexec", "echo this is no MPI >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        new = addprocs(MPIManager(2), timeout=LONG)
    except LaunchError as error:
        assert "this is no MPI" in str(error)  # noqa: PT017 - may, need not
    else:  # It knew better, and took the one that belongs to this Python.
        assert remotecall_fetch(remotecall_fetch, new[0], myid, new[1]) == new[1]
        rmprocs(new)


class Rubbish(ClusterManager):
    """Starts something that is no worker, and talks."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        process = subprocess.Popen(["sh", "-c", self.text], stdout=subprocess.PIPE)
        self.processes.append(process)
        yield WorkerConfig(process=process)

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        pass

    def kill(self, pid: int, config: WorkerConfig) -> None:
        self.end()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(LONG)
            if process.stdout is not None:
                process.stdout.close()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "text", ["echo hello; echo 127.0.0.1; exit 0", "yes hpcdist", "exec sleep 1000"]
)
def test_launch_of_something_else(text: str) -> None:
    manager = Rubbish(text)
    try:
        with pytest.raises(LaunchError):
            addprocs(manager, timeout=2)
    finally:
        manager.end()


class Refusing(ClusterManager):
    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        raise PermissionError("no account")
        yield

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        pass


@pytest.mark.usefixtures("unchanged")
def test_manager_whose_launch_raises() -> None:
    with pytest.raises(LaunchError, match="no account"):
        addprocs(Refusing())


class Half(ClusterManager):
    """Starts one worker, and one process that fails when there is a file named `go`."""

    def __init__(self, go: Path) -> None:
        self.go = go
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        failing = f'while [ ! -e "{self.go}" ]; do sleep 0.02; done; exit 3'
        for command in (self.worker_command(params), ["sh", "-c", failing]):
            process = subprocess.Popen(command, start_new_session=True)
            self.processes.append(process)
            yield WorkerConfig(process=process)

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        pass


def test_workers_that_did_come_up_stay(pids: list[int], tmp_path: Path) -> None:
    manager = Half(tmp_path / "go")
    adding = in_thread(addprocs, manager, timeout=LONG)
    try:
        eventually(lambda: len(workers()) == len(pids) + 1, timeout=LONG)
        came_up = workers()[-1]
        assert remotecall_fetch(myid, came_up) == came_up
    finally:
        manager.go.touch()
    error = adding.exception(LONG)
    try:
        assert isinstance(error, LaunchError)
        assert error.pids == [came_up]
        assert workers() == [*pids, came_up]
    finally:
        rmprocs(came_up)
        for process in manager.processes:
            process.wait(LONG)
