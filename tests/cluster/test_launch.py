"""`launch` returns at once whatever happens, `wait` tells what went wrong, `cancel` ends it all."""

import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ClusterManager,
    LaunchError,
    MPIManager,
    WorkerConfig,
    launch,
    myid,
    remotecall_fetch,
    workers,
)
from hpcdist._keeper.installed_mpi import MpiNotFound, find_mpi
from tests.helpers import eventually

LONG = 30.0


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An interpreter that answers nothing until it is let go, and where its pid is written."""
    gate, pid = tmp_path / "gate", tmp_path / "pid"
    os.mkfifo(gate)
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho $$ >{pid}.new; mv {pid}.new {pid}\nread x <{gate}\nexit 3\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    held = os.open(gate, os.O_RDWR)
    yield str(path), pid
    os.close(held)


def gone(os_pid: int) -> bool:
    try:
        return Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_an_interpreter_that_hangs_holds_nobody_up(hanging: tuple[str, Path]) -> None:
    python, pid = hanging
    started = launch(1, python=python)
    os_pid = int(eventually(lambda: pid.exists() and pid.read_text(), LONG))
    assert not gone(os_pid)  # we came back while it hung
    assert str(started.state) == "PENDING"
    with pytest.raises(TimeoutError):
        started.wait(timeout=0)
    started.cancel()
    with pytest.raises(LaunchError, match="cancelled"):
        started.wait(timeout=LONG)
    eventually(lambda: gone(os_pid))


@pytest.mark.parametrize(
    ("what", "params"),
    [(1, {}), (1, {"isolation": "process"}), (MPIManager(1), {}), (["h"], {"ssh": "/no/ssh"})],
)
def test_what_fails_outside_is_told_by_wait(
    what: Any, params: dict[str, Any], tmp_path: Path
) -> None:
    started = launch(what, python=str(tmp_path / "python"), **params)
    with pytest.raises(LaunchError):
        started.wait(timeout=LONG)
    assert str(started.state) == "FAILED"
    assert started.pids == []


def test_wrong_arguments_are_told_at_the_call() -> None:
    with pytest.raises(TypeError, match="python"):
        launch(1, pyton="python3")
    with pytest.raises(ValueError, match="isolation"):
        launch(1, isolation="none")


def _keepers() -> set[int]:
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout.splitlines()
    return {int(line.split()[0]) for line in children if "hpcdist._keeper.keeper" in line}


def _kinds() -> list[Any]:
    try:
        find_mpi()
    except MpiNotFound:
        return [2]
    return [2, MPIManager(2)]


@pytest.mark.parametrize("what", _kinds())
def test_cancel_ends_a_launch_that_runs(what: Any) -> None:
    started = launch(what)
    pids = started.wait(timeout=LONG)
    os_pids = [remotecall_fetch(os.getpid, pid) for pid in pids]
    assert _keepers()
    started.cancel()
    assert str(started.state) == "CANCELLED"
    assert workers() == [1]
    assert all(eventually(lambda p=p: gone(p), LONG) for p in os_pids)
    eventually(lambda: not _keepers(), LONG)
    with pytest.raises(LaunchError, match="cancelled"):
        started.wait(timeout=LONG)
    started.cancel()


def test_cancel_takes_what_came_up_of_a_launch_that_failed() -> None:
    class Half(ClusterManager):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            yield WorkerConfig(process=subprocess.Popen(self.worker_command(params)))
            arrived.wait(LONG)
            raise RuntimeError("the second one is ill")

    arrived = threading.Event()
    started = launch(Half())
    (pid,) = started.wait(1, timeout=LONG)
    arrived.set()
    with pytest.raises(LaunchError, match="is ill"):
        started.wait(timeout=LONG)
    assert remotecall_fetch(myid, pid) == pid
    started.cancel()
    assert str(started.state) == "FAILED"
    assert workers() == [1]


def test_cancel_while_a_worker_is_being_registered() -> None:
    class Slow(ClusterManager):
        """Takes its time to take note of a worker."""

        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            self.process = subprocess.Popen(self.worker_command(params))
            yield WorkerConfig(process=self.process)

        def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
            if op == "register":
                registering.set()
                cancelled.wait(LONG)

    registering, cancelled = threading.Event(), threading.Event()
    manager = Slow()
    started = launch(manager)
    assert registering.wait(LONG)
    started.cancel()
    cancelled.set()
    assert manager.process.wait(LONG) is not None
    eventually(lambda: workers() == [1], LONG)
    assert str(started.state) == "CANCELLED"


def test_a_launch_of_nobody_is_up_at_once() -> None:
    assert launch(0).wait(timeout=LONG) == []


def test_pids_are_given_in_the_order_of_the_launches() -> None:
    first, second = launch(1), launch(2)
    assert first.wait(timeout=LONG) < second.wait(timeout=LONG)
    first.cancel()
    second.cancel()


def test_the_log_of_a_launch_has_what_its_workers_print() -> None:
    started = launch(2)
    one, other = started.wait(timeout=LONG)
    assert started.log() == []
    remotecall_fetch(print, one, "one\ntwo")
    assert started.log() == ["one", "two"]
    remotecall_fetch(os.write, other, 2, b"three\n")
    eventually(lambda: started.log() == ["one", "two", "three"])
    assert started.log(1) == ["three"]
    assert started.log(0) == []
    assert started.cluster is None
    started.cancel()


def test_the_log_and_the_cluster_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "sbatch": "echo '7;big'; echo 'module: not found' >\"${2%/script.sh}/log\"",
        "squeue": "echo '7|PENDING|N/A|N/A||Priority'",
        "scancel": f'echo "$*" >>{tmp_path}/cancelled',
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    started = launch(hpcdist.SlurmManager(1), mpi="pmi2")
    assert started.cluster is None
    eventually(lambda: started.jobs == ["7"], LONG)
    assert started.cluster == "big"
    assert started.log() == ["module: not found"]
    started.cancel()
    cancelled = tmp_path / "cancelled"
    assert eventually(lambda: cancelled.exists() and cancelled.read_text()) == "-M big -Q 7\n"


LEFT_ALONE = """
import os, signal, subprocess, sys
import hpcdist

def start_one():
    return subprocess.Popen(["sleep", "599"], start_new_session=True).pid

pids = hpcdist.addprocs(2, isolation=sys.argv[1])
print(*[hpcdist.remotecall_fetch(start_one, pid) for pid in pids], os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("isolation", ["auto", "process"])
def test_with_a_driver_that_is_killed_ends_what_its_workers_have_started(
    isolation: str, script: Callable[..., Any]
) -> None:
    done = script(LEFT_ALONE, args=[isolation])
    assert done.rc == -signal.SIGKILL, done.err
    for os_pid in map(int, done.out.split()):
        eventually(lambda os_pid=os_pid: gone(os_pid), LONG)


MANY = """
import os, signal, sys, threading
import hpcdist

def press():
    while hpcdist.workers() == [1]:
        threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=press, daemon=True).start()
hpcdist.addprocs(int(sys.argv[1]), isolation="process")
"""


def test_far_too_many_workers_are_mentioned_and_gone_after_ctrl_c(
    script: Callable[..., Any],
) -> None:
    many = 100 * len(os.sched_getaffinity(0))
    done = script(MANY, args=[str(many)])
    assert "KeyboardInterrupt" in done.err
    word = f"starting {many} workers on {many // 100} cores takes a while; Ctrl-C ends it"
    assert word in done.err.splitlines()[0]


FEW_FILES = """
import os, resource
import hpcdist
have = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (have + {soft}, have + {hard}))
try:
    pids = hpcdist.addprocs(4, isolation="process")
except hpcdist.LaunchError as exc:
    print(exc)
else:
    print(hpcdist.everywhere.call(os.getpid).keys() == {{1, *pids}})
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > have + {soft}
"""


def test_the_soft_limit_of_open_files_is_raised(script: Callable[..., Any]) -> None:
    done = script(FEW_FILES.format(soft=20, hard=500))
    assert (done.rc, done.out) == (0, "True\n"), done.err


def test_the_hard_limit_of_open_files_is_named(script: Callable[..., Any]) -> None:
    done = script(FEW_FILES.format(soft=20, hard=40))
    assert done.rc == 0, done.err
    first, *_, last = done.out.splitlines()
    assert re.match(r"4 workers need \d+ more open files than process 1 may have", first)
    assert last == ("The hard limit stands in the way: see `ulimit -Hn`, and ask for a higher one.")
