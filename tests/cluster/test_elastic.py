"""Workers that come by themselves, by a join file, and go when they like."""

import ctypes
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ElasticManager,
    LaunchError,
    ProcessExitedException,
    addprocs,
    cluster,
    cluster_cookie,
    default_worker_pool,
    launch,
    myid,
    pmap,
    remotecall_fetch,
    rmprocs,
    workers,
)
from tests.cluster.test_processes import process_is_gone, running, spin
from tests.helpers import eventually, kill9, mpi_environment, mpiexec

pytestmark = pytest.mark.any_mpi

LONG = 30.0  # seconds after which a wait that ought to end is taken for lost


@pytest.fixture
def manager() -> Iterator[ElasticManager]:
    """A manager whose door is open."""
    opened = ElasticManager(addr="127.0.0.1")
    assert addprocs(opened) == []
    yield opened
    hpcdist.shutdown()


@pytest.fixture
def come(manager: ElasticManager) -> Iterator[Callable[..., Any]]:
    """`come(n)`: type the command n times; return the pids of all that are there then."""
    started: list[subprocess.Popen[bytes]] = []

    def run(n: int = 1, **options: Any) -> list[int]:
        before = len(addprocs(manager))
        for _ in range(n):
            started.append(subprocess.Popen(f"exec {manager.command}", shell=True, **options))
        return launch(manager).wait(before + n, timeout=LONG)

    run.processes = started  # type: ignore[attr-defined]
    yield run
    hpcdist.shutdown()
    for process in started:
        process.wait(LONG)


def run_worker(join: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcdist", "worker", "--join", str(join)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, **options)


def test_workers_come_and_go(manager: ElasticManager, come: Any) -> None:
    first, second = come(2)
    os_pids = {pid: remotecall_fetch(os.getpid, pid) for pid in (first, second)}
    assert set(os_pids.values()) == {process.pid for process in come.processes}
    assert [row.manager for row in hpcdist.status()][1:] == ["ElasticManager"] * 2
    assert remotecall_fetch(remotecall_fetch, first, myid, second) == second
    rmprocs(first)
    assert process_is_gone(os_pids[first])
    assert workers() == [second]
    assert addprocs(manager) == [second]
    assert len(come()) == 2
    assert addprocs(manager) == workers()
    assert [process.wait(LONG) for process in come.processes if process.pid == os_pids[first]] == [
        0
    ]


def test_they_meet_workers_of_other_managers(come: Any, fresh: Callable[..., list[int]]) -> None:
    (here,) = fresh(1)
    (guest,) = come()
    assert remotecall_fetch(remotecall_fetch, here, myid, guest) == guest
    assert remotecall_fetch(remotecall_fetch, guest, myid, here) == here


def test_what_they_print_is_shown(
    come: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "terminal").open("w") as terminal:
        (pid,) = come(stdout=terminal, stderr=terminal)
    remotecall_fetch(print, pid, "a word")
    seen = ""

    def shown() -> bool:
        nonlocal seen
        seen += capfd.readouterr().out
        return f"From worker {pid}:\ta word" in seen

    eventually(shown, timeout=LONG)
    there = (tmp_path / "terminal").read_text()
    assert there == f"hpcdist worker: this is worker {pid} now\n"


def wait_for_go(k: int, folder: str) -> int:
    (Path(folder) / f"{myid()}").touch()
    while not (Path(folder) / "go").exists():
        hpcdist.sleep(0.01)
    return myid()


def test_a_running_pmap_takes_those_that_come(come: Any, tmp_path: Path) -> None:
    (first,) = come()
    results: list[int] = []
    mapping = threading.Thread(
        target=lambda: results.extend(
            pmap(wait_for_go, range(6), [str(tmp_path)] * 6, batch_size=1)
        )
    )
    mapping.start()
    try:
        eventually((tmp_path / str(first)).exists, timeout=LONG)
        _, second = come()
        assert second in default_worker_pool().workers()
        eventually((tmp_path / str(second)).exists, timeout=LONG)
    finally:
        (tmp_path / "go").touch()
        mapping.join(LONG)
    assert set(results) == {first, second}


def test_one_that_is_killed_leaves_as_any_other(manager: ElasticManager, come: Any) -> None:
    victim, other = come(2)
    os_pid = remotecall_fetch(os.getpid, victim)
    call = running(victim, spin, 60.0)
    guard = children(os_pid)
    assert len(guard) == 1
    kill9(os_pid)
    with pytest.raises(ProcessExitedException) as caught:
        call.fetch(timeout=LONG)
    assert caught.value.pid == victim
    assert workers() == [other] == addprocs(manager)
    eventually(lambda: process_is_gone(guard[0]), timeout=LONG)
    assert len(come()) == 2


def children(os_pid: int) -> list[int]:
    return [
        int(word) for word in Path(f"/proc/{os_pid}/task/{os_pid}/children").read_text().split()
    ]


def stubborn(seconds: float) -> None:
    """Hold the interpreter's lock in C."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def test_one_that_does_not_leave_is_killed(come: Any) -> None:
    (pid,) = come()
    os_pid = remotecall_fetch(os.getpid, pid)
    running(pid, stubborn, 50.0)
    rmprocs(pid)
    # The end of its link is all that process 1 sees; the kernel closes that a moment before.
    eventually(lambda: process_is_gone(os_pid), timeout=LONG)


ENDS_SUDDENLY = """
import ctypes, os, subprocess, time
import hpcdist
from tests.cluster.test_elastic import stubborn
from tests.cluster.test_processes import running

manager = hpcdist.ElasticManager("127.0.0.1")
command = manager.command  # opens the door
for _ in range(2):
    subprocess.Popen(["setsid", *command.split()])
one, other = hpcdist.launch(manager).wait(2, timeout=30)
print(hpcdist.remotecall_fetch(os.getpid, one), hpcdist.remotecall_fetch(os.getpid, other))
running(one, stubborn, 50.0)
print(manager.join_file, flush=True)
os.kill(os.getpid(), 9)
"""


def test_they_end_with_process_1_whatever_they_do(
    script: Callable[..., Any], tmp_path: Path
) -> None:
    done = script(ENDS_SUDDENLY, env={"HPCDIST_DIR": str(tmp_path / "state")})
    assert done.rc == -signal.SIGKILL, done.err
    os_pids, join = done.out.splitlines()
    for os_pid in os_pids.split():
        eventually(lambda os_pid=os_pid: process_is_gone(int(os_pid)), timeout=10)
    eventually(lambda: not os.path.exists(os.path.dirname(join)), timeout=LONG)
    late = run_worker(join)
    assert (late.returncode, late.stderr) == (1, f"hpcdist worker: there is no join file {join}\n")


# --- the block, the settings ---------------------------------------------------------------------


def test_the_end_of_a_block_ends_them_all() -> None:
    manager = ElasticManager("localhost")
    with cluster(manager, env={"HD_COLOUR": "blue"}) as pids:
        assert pids == []
        process = subprocess.Popen(manager.command, shell=True)
        (pid,) = addprocs(manager, env={"HD_COLOUR": "red"}, min_workers=1)
        assert remotecall_fetch(os.getenv, pid, "HD_COLOUR") in ("blue", "red")
    assert process.wait(LONG) == 0
    assert workers() == [1]
    assert not os.path.exists(os.path.dirname(manager.join_file))


def test_later_settings_are_for_those_who_come_later(
    manager: ElasticManager, come: Any, tmp_path: Path
) -> None:
    gone = tmp_path / "on process 1's host alone"
    gone.mkdir()
    launched = launch(manager, dir=gone, env={"HD_COLOUR": "red"}, wrapper=["nice", "-n", "1"])
    python = launched.settings.python
    gone.rmdir()
    process = subprocess.Popen(manager.command, shell=True, cwd=tmp_path)
    (pid,) = launched.wait(1, timeout=LONG)
    assert remotecall_fetch(os.getenv, pid, "HD_COLOUR") == "red"
    assert os.path.samefile(remotecall_fetch(os.getcwd, pid), tmp_path)
    gone.mkdir()
    (_, second) = come()  # asks who is there, and says nothing of settings
    assert remotecall_fetch(os.getenv, second, "HD_COLOUR") == "red"
    assert os.path.samefile(remotecall_fetch(os.getcwd, second), gone)
    assert launch(manager).settings.python == python
    rmprocs(pid)
    assert process.wait(LONG) == 0


def test_waiting_for_the_first_ones(manager: ElasticManager) -> None:
    found: list[int] = []
    waiting = threading.Thread(
        target=lambda: found.extend(addprocs(manager, min_workers=1, timeout=LONG))
    )
    waiting.start()
    process = subprocess.Popen(manager.command, shell=True)
    waiting.join(LONG)
    assert found == workers() != [1]
    rmprocs(found)
    assert process.wait(LONG) == 0


def test_the_first_ones_do_not_come() -> None:
    manager = ElasticManager("127.0.0.1")
    with pytest.raises(LaunchError, match=r"0 of 1 workers have come within 0\.5 s") as caught:
        addprocs(manager, min_workers=1, timeout=0.5)
    assert manager.command in str(caught.value)
    assert not os.path.exists(manager.join_file)
    assert addprocs(manager) == []  # another door
    assert os.path.exists(manager.join_file)
    hpcdist.shutdown()


@pytest.mark.parametrize("port", [-1, 65536, "80", True])
def test_a_port_that_is_none(port: Any) -> None:
    with pytest.raises(ValueError, match="port is a number from 0 to 65535"):
        ElasticManager(port=port)


def test_an_address_of_another_host() -> None:
    with pytest.raises(
        ValueError, match=r"addr='203\.0\.113\.9' is neither .* lo \(127\.0\.0\.1\)"
    ):
        addprocs(ElasticManager("203.0.113.9"))


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"127.0.0.1 port {port}: "):
            addprocs(ElasticManager("127.0.0.1", port))


def test_an_option_it_does_not_have() -> None:
    with pytest.raises(TypeError, match="partition"):
        addprocs(ElasticManager(), partition="debug")


# --- who gets in ---------------------------------------------------------------------------------


def test_the_secret_is_in_the_join_file_alone(manager: ElasticManager) -> None:
    join = Path(manager.join_file)
    assert stat.S_IMODE(join.stat().st_mode) == 0o600
    assert stat.S_IMODE(join.parent.stat().st_mode) == 0o700
    told = json.loads(join.read_text())
    assert [host for host, _ in told["addresses"]] == ["127.0.0.1"]
    assert bytes.fromhex(told["cookie"]).decode() == cluster_cookie()
    assert cluster_cookie() not in manager.command
    assert manager.command.endswith(f"hpcdist worker --join {join}")


def test_a_join_file_that_others_may_read(manager: ElasticManager, tmp_path: Path) -> None:
    copy = tmp_path / "join"
    shutil.copyfile(manager.join_file, copy)
    copy.chmod(0o640)
    done = run_worker(copy)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "0640" in done.stderr
    assert f"chmod 600 {copy}" in done.stderr
    assert workers() == [1]


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}"])
def test_a_file_that_is_no_join_file(text: str, tmp_path: Path) -> None:
    join = tmp_path / "join"
    join.write_text(text)
    join.chmod(0o600)
    done = run_worker(join)
    assert done.returncode == 1
    assert done.stderr == f"hpcdist worker: {join} is no join file\n"


def private_copy(manager: ElasticManager, path: Path, **changes: Any) -> Path:
    told = {**json.loads(Path(manager.join_file).read_text()), **changes}
    path.touch(0o600)
    path.write_text(json.dumps(told))
    return path


def test_a_wrong_secret(manager: ElasticManager, tmp_path: Path) -> None:
    done = run_worker(private_copy(manager, tmp_path / "join", cookie=b"guessed".hex()))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "leads to no cluster" in done.stderr
    assert workers() == [1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_the_join_file_of_a_door_that_is_closed(tmp_path: Path) -> None:
    port = free_port()
    manager = ElasticManager("127.0.0.1", port)
    with cluster(manager):
        old = private_copy(manager, tmp_path / "join")
    closed = run_worker(old)
    assert closed.returncode == 1
    assert f"127.0.0.1 port {port}: " in closed.stderr
    assert "leads to no cluster" in closed.stderr
    with cluster(manager):  # the same port, another door
        done = run_worker(old)
        assert done.returncode == 1
        assert "a door that has been closed" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert workers() == [1]


def test_a_worker_of_another_version(manager: ElasticManager) -> None:
    code = (
        "from hpcdist import _version; _version.VERSION = '0.0.9'; from hpcdist._cli import main; "
        f"main.main(['worker', '--join', {manager.join_file!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 1
    assert "it has hpcdist 0.0.9, process 1 has" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- other ways to start them --------------------------------------------------------------------


def test_a_join_file_by_standard_input(manager: ElasticManager) -> None:
    with open(manager.join_file) as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcdist", "worker", "--join", "-"], stdin=told
        )
    (pid,) = launch(manager).wait(1, timeout=LONG)
    assert remotecall_fetch(os.getpid, pid) == process.pid
    rmprocs(pid)
    assert process.wait(LONG) == 0


@pytest.mark.each_mpi
def test_a_launcher_of_mpi_starts_plain_workers(manager: ElasticManager) -> None:
    environment = {**os.environ, **mpi_environment()}
    process = subprocess.Popen([*mpiexec(2), *manager.command.split()], env=environment)
    pids = launch(manager).wait(2, timeout=LONG)
    assert [remotecall_fetch(myid, pid) for pid in pids] == pids
    rmprocs(pids)
    assert process.wait(LONG) == 0


def test_the_clock_of_an_open_door_disturbs_nobody(manager: ElasticManager) -> None:
    again = launch(manager, timeout=0.01)
    with pytest.raises(TimeoutError):
        again.wait(1, timeout=0.2)
    assert str(again.state) == "RUNNING"
    assert os.path.exists(manager.join_file)
