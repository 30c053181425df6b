"""How an MPI launch ends: the driver's exit code, no hang, and nobody left."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.cluster.test_processes import process_is_gone
from tests.conftest import RUN
from tests.helpers import eventually, mpi_flavour

ENDED = 20.0  # seconds a launch may take altogether, on the slowest machine
LEFT = 8.0  # seconds after which no rank may be left

BEGIN = """
import os, sys, signal, time, threading
import hpcdist
from hpcdist import MPIManager, myid, remotecall, remotecall_fetch, rmprocs, workers

{enter}
print(*[remotecall_fetch(os.getpid, pid) for pid in workers()], flush=True)

def spin():
    while True:
        pass

def stuck():
    import ctypes
    ctypes.PyDLL(None).usleep(60_000_000)  # PyDLL: the interpreter's lock stays held

def busy(started, f, *args):
    started.put(myid())
    f(*args)

def occupy(f, *args):
    started = hpcdist.RemoteChannel(1)
    call = remotecall(busy, workers()[-1], started, f, *args)
    started.take()
    time.sleep(0.1)
    return call
"""

ENDS = {
    "end": ("pass", 0, ""),
    "exit": ("sys.exit(3)", 3, ""),
    "exit-0": ("sys.exit()", 0, ""),
    "exit-text": ("sys.exit('bad luck')", 1, "bad luck"),
    "exception": ("raise LookupError('lost')", 1, "LookupError: lost"),
    "remote-exception": ("remotecall_fetch(divmod, 2, 1, 0)", 1, "ZeroDivisionError"),
    "ctrl-c": ("raise KeyboardInterrupt", None, "KeyboardInterrupt"),
}
WORK = {
    "idle": "",
    "computing": "call = occupy(spin)",
    "asleep": "call = occupy(time.sleep, 60)",
    "stuck-in-C": "call = occupy(stuck)",
    "waiting": "call = occupy(hpcdist.Future().fetch)",
}


def run(script: Callable[..., Any], *, enter: str, work: str, end: str, ranks: int = 3) -> Any:
    text = BEGIN.format(enter=enter) + f"{work}\n{end}\n"
    begin = time.monotonic()
    done = script(text, ranks=ranks, timeout=ENDED + 20)
    took = time.monotonic() - begin
    assert took < ENDED, (took, done.err)
    os_pids = [int(word) for word in done.out.splitlines()[0].split()]
    assert len(os_pids) == ranks - 1
    for os_pid in os_pids:
        eventually(lambda os_pid=os_pid: process_is_gone(os_pid), timeout=LEFT)
    return done


def check(done: Any, how: str) -> None:
    _, code, words = ENDS[how]
    assert words in done.err
    if code is None:
        assert done.rc != 0
    else:
        assert done.rc == code, done.err


@pytest.fixture
def killed_world(request: pytest.FixtureRequest) -> Iterator[None]:
    """Clean up where a launcher has killed every rank: none of them could, nor did MPICH's own."""
    maps = "hydra_hwloc_xmlfile_*"  # of the machine; always in /tmp
    before = set(Path("/tmp").glob(maps))
    yield
    for path in set(Path("/tmp").glob(maps)) - before:
        path.unlink(missing_ok=True)
    left = request.config.stash[RUN].leftovers
    for name in left.files():
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ENDS)
def test_exit_code_is_the_drivers(how: str, script: Callable[..., Any]) -> None:
    done = run(script, enter="hpcdist.init()", work="", end=ENDS[how][0])
    check(done, how)
    if how == "end":
        assert done.err == ""


@pytest.mark.usefixtures("killed_world")
@pytest.mark.parametrize("how", ["end", "exit", "exception"])
@pytest.mark.parametrize("work", [name for name in WORK if name != "idle"])
def test_busy_worker_holds_nobody_up(work: str, how: str, script: Callable[..., Any]) -> None:
    done = run(script, enter="hpcdist.init()", work=WORK[work], end=ENDS[how][0])
    # The launcher that has to kill a rank which is stuck in C may say so by its own exit code.
    if work != "stuck-in-C":
        check(done, how)
    elif how != "end":
        assert done.rc != 0


@pytest.mark.parametrize("ranks", [2, 5])
def test_number_of_ranks(ranks: int, script: Callable[..., Any]) -> None:
    done = run(script, enter="hpcdist.init()", work="", end="sys.exit(4)", ranks=ranks)
    assert done.rc == 4, done.err


def test_one_rank_alone(script: Callable[..., Any]) -> None:
    text = """
        import hpcdist

        hpcdist.init()
        assert hpcdist.workers() == [1]
        (pid,) = hpcdist.addprocs(1)
        assert hpcdist.remotecall_fetch(hpcdist.myid, pid) == pid == 2
        raise SystemExit(5)
    """
    done = script(dedent(text), ranks=1)
    assert done.rc == 5, done.err


def test_addprocs_of_the_manager_is_init(script: Callable[..., Any]) -> None:
    enter = "assert hpcdist.addprocs(MPIManager()) == [2, 3]\nhpcdist.init()"
    done = run(script, enter=enter, work="", end="sys.exit(3)")
    assert done.rc == 3, done.err


@pytest.mark.parametrize("how", ["exit", "exception", "ctrl-c"])
def test_error_in_a_block(how: str, script: Callable[..., Any]) -> None:
    """Rank 0 leaves the block by an exception and ends; the others go on after it, and end too."""
    text = f"""
        import os, sys
        import hpcdist
        from hpcdist import MPIManager, remotecall_fetch, workers

        with hpcdist.cluster(MPIManager()) as pids:
            if pids is not None:
                print(*[remotecall_fetch(os.getpid, pid) for pid in pids], flush=True)
                {ENDS[how][0]}
    """
    begin = time.monotonic()
    done = script(dedent(text), ranks=3, timeout=ENDED + 20)
    assert time.monotonic() - begin < ENDED, done.err
    check(done, how)
    for word in done.out.splitlines()[0].split():
        eventually(lambda word=word: process_is_gone(int(word)), timeout=LEFT)


def test_a_block_that_ends_before_a_rank_serves(script: Callable[..., Any]) -> None:
    """Its calls are answered by then, beside the main thread, which is still on its way."""
    text = """
        import time
        import hpcdist
        from hpcdist._managers import mpi
        from hpcdist._runtime.node import node

        dial = mpi._dial_zero

        def dial_slowly(*args):
            dial(*args)
            end = time.monotonic() + 10
            while not node.turns._stopped and time.monotonic() < end:  # until it is told to leave
                time.sleep(0.01)

        mpi._dial_zero = dial_slowly
        for turn in range(2):
            with hpcdist.cluster(hpcdist.MPIManager()) as pids:
                if pids is not None:
                    assert [hpcdist.remotecall_fetch(hpcdist.myid, p) for p in pids] == pids
        print("after", flush=True)
    """
    done = script(dedent(text), ranks=3, timeout=ENDED + 20)
    assert (done.rc, done.out.split()) == (0, ["after"] * 3), done.err


def test_parked_ranks_leave_with_the_world(script: Callable[..., Any]) -> None:
    done = run(script, enter="hpcdist.init()", work="rmprocs(workers()[-1])", end="sys.exit(3)")
    assert done.rc == 3, done.err


def test_all_ranks_parked(script: Callable[..., Any]) -> None:
    done = run(script, enter="hpcdist.init()", work="rmprocs(workers())", end="pass")
    assert done.rc == 0, done.err


def test_worker_of_a_world_that_removes_while_busy(script: Callable[..., Any]) -> None:
    work = "call = occupy(time.sleep, 60)\nrmprocs(workers()[-1])"
    done = run(script, enter="hpcdist.init()", work=work, end="sys.exit(3)")
    assert done.rc == 3, done.err


def test_more_workers_than_the_world_has(script: Callable[..., Any]) -> None:
    work = """
new = hpcdist.addprocs(2)
assert new == [4, 5]
for one in workers():
    for other in workers():
        assert remotecall_fetch(remotecall_fetch, one, myid, other) == other
print(*[remotecall_fetch(os.getpid, pid) for pid in new], flush=True)
"""
    done = run(script, enter="hpcdist.init()", work=work, end="sys.exit(3)")
    assert done.rc == 3, done.err
    for word in done.out.split():
        eventually(lambda word=word: process_is_gone(int(word)), timeout=LEFT)


@pytest.mark.usefixtures("killed_world")
@pytest.mark.parametrize("fatal", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(7)"])
def test_driver_that_dies(fatal: str, script: Callable[..., Any]) -> None:
    done = run(script, enter="hpcdist.init()", work="call = occupy(time.sleep, 60)", end=fatal)
    assert done.rc != 0


@pytest.mark.usefixtures("killed_world")
def test_rank_that_dies_ends_nothing_silently(script: Callable[..., Any]) -> None:
    """Whether the launcher then ends the world or not: there is an error, and an end."""
    end = """
remotecall_fetch(os.kill, 3, remotecall_fetch(os.getpid, 3), signal.SIGKILL)
"""
    done = run(script, enter="hpcdist.init()", work="", end=end)
    assert done.rc != 0
    # Hydra speaks on stdout, and may kill the driver before that has spoken.
    assert "ProcessExited" in done.err or "BAD TERMINATION" in done.out or "mpirun" in done.err


@pytest.mark.parametrize(
    "call",
    ["hpcdist.addprocs(1)", "hpcdist.myid()", "hpcdist.remotecall(abs, 1, 1)", "hpcdist.procs()"],
)
def test_every_rank_is_refused_before_init(call: str, script: Callable[..., Any]) -> None:
    text = f"""
        import os, sys, hpcdist
        try:
            {call}
        except RuntimeError as exc:
            assert "init()" in str(exc) and "3 ranks" in str(exc), exc
            os.write(2, b"refused\\n")
        else:
            os.write(2, b"accepted\\n")
    """
    done = script(dedent(text), ranks=3)
    assert done.err.split() == ["refused"] * 3
    assert done.rc == 0


def test_output_of_a_launch(script: Callable[..., Any]) -> None:
    text = """
        import sys
        import hpcdist
        from hpcdist import remotecall_fetch, workers

        hpcdist.init()
        for pid in workers():
            remotecall_fetch(print, pid, "one\\ntwo")
            remotecall_fetch(lambda: print("three", file=sys.stderr), pid)
        print("end", flush=True)
    """
    done = script(dedent(text), ranks=3)
    assert done.rc == 0, done.err
    lines = [f"From worker {pid}:\t{word}" for pid in (2, 3) for word in ("one", "two")]
    assert done.out.splitlines() == [*lines, "end"]
    assert done.err.splitlines() == [f"From worker {pid}:\tthree" for pid in (2, 3)]


@pytest.mark.usefixtures("killed_world")
def test_interrupt_of_the_launcher_ends_everything(script: Callable[..., Any]) -> None:
    end = "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    if mpi_flavour() == "mpich":  # between mpiexec and its ranks stands a proxy
        end = """
with open(f"/proc/{os.getppid()}/stat") as file:
    os.kill(int(file.read().rpartition(")")[2].split()[1]), signal.SIGINT)
time.sleep(60)
"""
    done = run(script, enter="hpcdist.init()", work="call = occupy(spin)", end=end)
    assert done.rc not in (0, None)
    assert done.rc in (-signal.SIGINT, 130) or done.rc > 0
