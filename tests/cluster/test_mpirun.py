"""How an MPI launch ends: the driver's exit code, no hang, and nobody left."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import hpcdist
from tests.cluster.test_processes import process_is_gone
from tests.conftest import RUN
from tests.helpers import eventually, mpi_flavour, patient

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
    assert took < patient(ENDED), (took, done.err)
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


def test_the_manager_may_be_entered_where_the_ranks_serve_already(
    script: Callable[..., Any],
) -> None:
    """They used to wait for each other: the ranks for calls, process 1 for the ranks."""
    text = """
        import hpcdist
        from hpcdist import MPIManager, everywhere, myid

        with hpcdist.cluster(MPIManager()) as pids:  # and all go on after the block
            if pids is not None:
                assert hpcdist.addprocs(MPIManager()) == pids
                with hpcdist.cluster(MPIManager()) as again:
                    assert again == pids
                assert sorted(everywhere.call(myid)) == [1, 2, 3]
        hpcdist.init()
        assert hpcdist.addprocs(MPIManager()) == [2, 3]
        with hpcdist.cluster(MPIManager()) as pids:
            assert pids == [2, 3]
        assert sorted(everywhere.call(myid)) == [1, 2, 3]
        hpcdist.shutdown()
        try:
            hpcdist.addprocs(MPIManager())
        except RuntimeError as exc:
            print(exc)
        with hpcdist.cluster(1) as pids:
            print(len(pids))
    """
    done = script(dedent(text), ranks=3)
    assert done.rc == 0, done.err
    assert done.out.splitlines() == [
        "the other ranks of this MPI launch have left, as MPI has ended",
        "1",
    ]


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
    assert time.monotonic() - begin < patient(ENDED), done.err
    check(done, how)
    for word in done.out.splitlines()[0].split():
        eventually(lambda word=word: process_is_gone(int(word)), timeout=LEFT)


def test_a_block_that_ends_before_a_rank_serves(script: Callable[..., Any]) -> None:
    """Its calls are answered by then, beside the main thread, which is still on its way."""
    text = """
        import time
        import hpcdist
        from hpcdist._managers.mpi_launch import MpiLaunch

        dial = MpiLaunch._dial_zero

        def dial_slowly(self, *args):
            dial(self, *args)
            end = time.monotonic() + 10
            turns = self.node.turns
            while not turns._stopped and time.monotonic() < end:  # until it is told to leave
                time.sleep(0.01)

        MpiLaunch._dial_zero = dial_slowly
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


@pytest.mark.usefixtures("killed_world")
def test_mpi_abort_in_a_worker_ends_a_launch_with_its_code(script: Callable[..., Any]) -> None:
    end = """
def abort():
    from mpi4py import MPI
    MPI.COMM_WORLD.Abort(7)

try:
    remotecall_fetch(abort, 3)
finally:
    time.sleep(60)  # until the launcher ends this process, too
"""
    assert run(script, enter="hpcdist.init()", work="", end=end).rc == 7


# What may be had before `init()`, and why.
FREE = {
    "init cluster MPIManager": "they are the way in",
    "ANY": "a word",
    "ChannelClosed CheckpointMismatch CompositeException HpcdistError LaunchError "
    "ProcessExitedException RemoteException": "errors, to be named in an except clause",
    "AbstractWorkerPool ClusterManager Dashboard ExponentialBackOff Launch RemoteValue Removal "
    "WorkerConfig WorkerStatus": "bases and what others return: they do nothing by themselves",
    "ElasticManager LSFManager LocalManager PBSManager SGEManager SSHManager SlurmManager": (
        "descriptions: addprocs, launch and cluster refuse them"
    ),
    "read_checkpoint": "reads a file",
    "JobExecutor JobFuture job": "of jobs and their folders: our workers have no part in them",
    "default_addprocs_params": "reads settings, also for `cluster(MPIManager())`",
    "init_worker process_messages start_worker": "make this process a worker of another cluster",
}
# How each of all other public names is used.
CALLS = {
    "CachingPool": "()",
    "Channel": "(1)",
    "Executor": "()",
    "Future": "()",
    "Pool": "()",
    "RemoteChannel": "()",
    "RemoteObject": "(list, 1)",
    "WorkerPool": "([1])",
    "addprocs": "(1)",
    "bcast": "(1)",
    "channel_from_id": "((1, 1))",
    "clear": "(3)",
    "close": "(3)",
    "cluster_cookie": "()",
    "comm": "()",
    "default_worker_pool": "()",
    "distributed": "(range(0), max)",
    "everywhere": "('x = 1')",
    "fetch": "(3)",
    "fetchany": "(abs, 1)",
    "fetchfrom": "(1, abs, 1)",
    "gather": "([])",
    "imap": "(abs, [1])",
    "imap_unordered": "(abs, [1])",
    "interrupt": "()",
    "isopen": "(3)",
    "isready": "(3)",
    "launch": "(1)",
    "myid": "()",
    "nprocs": "()",
    "nworkers": "()",
    "dashboard": "()",
    "log_to": "()",
    "on_worker": "()",
    "pmap": "(abs, [])",
    "procs": "()",
    "put": "(3, 4)",
    "reduce": "(max, int)",
    "register_joblib": "()",
    "remote": "(abs)",
    "remote_do": "(abs, 1, 1)",
    "remotecall": "(abs, 1, 1)",
    "remotecall_fetch": "(abs, 'any', 1)",
    "remotecall_wait": "(abs, 1, 1)",
    "remoteref_id": "(3)",
    "rmprocs": "(2)",
    "rng": "()",
    "scatter": "([1])",
    "shutdown": "()",
    "sleep": "(0)",
    "spawn": "(abs, 1)",
    "spawnat": "(1, abs, 1)",
    "spmd": "(abs, 1)",
    "stacks": "()",
    "status": "()",
    "take": "(3)",
    "time_left": "()",
    "trace": "('unused').__enter__()",
    "wait": "(3)",
    "worker_id_from_socket": "(0)",
    "workers": "()",
}


def test_every_public_name_is_refused_before_init(script: Callable[..., Any]) -> None:
    free = {name for names in FREE for name in names.split()}
    assert free | set(CALLS) == set(hpcdist._HOME)  # a new name finds its place above
    text = f"""
        import os, hpcdist
        for call in {[f"hpcdist.{name}{how}" for name, how in CALLS.items()]}:
            try:
                eval(call)
            except RuntimeError as exc:
                if "init()" not in str(exc) or "3 ranks" not in str(exc):
                    os.write(2, f"{{call}}: {{exc!r}}\\n".encode())
            except BaseException as exc:
                os.write(2, f"{{call}}: {{exc!r}}\\n".encode())
            else:
                os.write(2, f"{{call}}: accepted\\n".encode())
        os.write(2, b"refused\\n")
    """
    done = script(dedent(text), ranks=3)
    assert done.err.splitlines() == ["refused"] * 3
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


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_long_temporary_folder(
    ranks: int | None, tmp_path: Path, script: Callable[..., Any]
) -> None:
    """The path of a Unix socket has no more than 107 bytes."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    text = """
import hpcdist
hpcdist.init(2)
print([hpcdist.remotecall_fetch(hpcdist.myid, pid) for pid in hpcdist.workers()])
"""
    done = script(text, ranks=ranks, env={"TMPDIR": str(folder)})
    assert done.rc == 0, done.err
    assert done.out == "[2, 3]\n"


def test_ranks_that_never_come_hold_up_no_end(
    script: Callable[..., Any], killed_world: None
) -> None:
    done = script(
        """
import time
from mpi4py import MPI
import hpcdist
from hpcdist._managers import mpi_launch

mpi_launch._GREETING = 1.0
rank = MPI.COMM_WORLD.Get_rank()
if rank == 2:
    def never(*args):
        while True:  # until the launcher ends it
            time.sleep(1)
    mpi_launch.MpiLaunch._dial_zero = never
hpcdist.init()
""",
        ranks=3,
        timeout=60,
    )
    assert done.rc != 0
    assert "ranks [2] on" in done.err
    assert "do not reach rank 0" in done.err
    assert "Timeout (" not in done.err  # nothing has waited in vain for MPI's end
