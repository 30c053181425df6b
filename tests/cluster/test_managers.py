"""Managers of one's own: they start workers in their way, hear of them, and may carry the bytes."""

import io
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ClusterManager,
    LaunchError,
    LocalManager,
    MPIManager,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    WorkerConfig,
    addprocs,
    cluster_cookie,
    interrupt,
    launch,
    myid,
    remotecall,
    remotecall_fetch,
    rmprocs,
    worker_id_from_socket,
    workers,
)
from tests.cluster.test_processes import process_is_gone, running, spin
from tests.helpers import cpu_seconds, eventually, kill9, mpi_flavour, mpiexec

LONG = 30.0  # seconds after which a wait that ought to end is taken for lost


@pytest.fixture(autouse=True)
def unchanged(pids: list[int]) -> Iterator[None]:
    """Check that whatever a test starts is gone after it, and the cluster usable."""
    yield
    eventually(lambda: workers() == pids, timeout=LONG)
    assert [remotecall_fetch(myid, pid) for pid in pids] == pids


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# --- one that starts processes -------------------------------------------------------------------


class Processes(ClusterManager):
    """Starts workers as children of pid 1."""

    def __init__(self, n: int, command: Callable[[list[str]], list[str]] = list) -> None:
        self.n = n
        self.command = command
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: list[tuple[int, str]] = []
        self.killed: list[int] = []
        self.params: dict[str, Any] = {}

    def launch(self, params: dict[str, Any]) -> Iterable[WorkerConfig]:
        self.params = params
        for number in range(self.n):
            process = subprocess.Popen(self.command(self.worker_command(params)))
            self.processes.append(process)
            yield WorkerConfig(process=process, ident=number, userdata={"number": number})

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        assert config.userdata is not None
        self.told.append((pid, op))

    def kill(self, pid: int, config: WorkerConfig) -> None:
        self.killed.append(pid)
        super().kill(pid, config)

    def ops(self, pid: int) -> list[str]:
        return [op for told, op in self.told if told == pid]


def test_workers_of_a_manager(pids: list[int]) -> None:
    manager = Processes(3)
    new = addprocs(manager, colour="blue", env={"HD_OWN": "ours"})
    try:
        assert len(new) == 3
        assert new == sorted(new)
        assert workers() == [*pids, *new]
        # In the order in which they were started, whichever was quicker.
        assert [remotecall_fetch(os.getpid, p) for p in new] == [p.pid for p in manager.processes]
        assert remotecall_fetch(remotecall_fetch, new[0], myid, new[1]) == new[1]
        # Workers of different launches share one secret, and so reach each other.
        assert remotecall_fetch(remotecall_fetch, new[0], myid, pids[1]) == pids[1]
        assert remotecall_fetch(remotecall_fetch, pids[0], myid, new[2]) == new[2]
        assert remotecall_fetch(os.getenv, new[0], "HD_OWN") == "ours"
        assert remotecall_fetch(cluster_cookie, new[0]) == cluster_cookie()
        assert manager.params["colour"] == "blue"
        assert os.path.basename(manager.params["join"]) == "join"
        assert [manager.ops(pid) for pid in new] == [["register"]] * 3
        assert [row.manager for row in hpcdist.status()][-3:] == ["Processes"] * 3
    finally:
        rmprocs(new)
    assert [manager.ops(pid) for pid in new] == [["register", "deregister", "finalize"]] * 3
    assert not manager.killed
    assert [process.returncode for process in manager.processes] == [0, 0, 0]


def test_manager_is_told_of_interrupts(fresh: Callable[..., list[int]]) -> None:
    manager = Processes(2)
    new = fresh(manager)
    call = running(new[0], spin, 60.0)
    interrupt(new[0])
    with pytest.raises(RemoteException) as caught:
        call.fetch(timeout=LONG)
    assert type(caught.value.cause) is KeyboardInterrupt
    assert manager.ops(new[0]) == ["register", "interrupt"]
    assert manager.ops(new[1]) == ["register"]


def test_manager_is_told_of_a_death(fresh: Callable[..., list[int]]) -> None:
    manager = Processes(1)
    (pid,) = fresh(manager)
    kill9(manager.processes[0].pid)
    with pytest.raises(ProcessExitedException) as caught:
        remotecall_fetch(time.sleep, pid, LONG)
    assert caught.value.pid == pid
    eventually(lambda: manager.ops(pid) == ["register", "deregister", "finalize"])
    assert manager.processes[0].returncode == -signal.SIGKILL


def test_workers_behind_a_shell(fresh: Callable[..., list[int]]) -> None:
    manager = Processes(2, lambda argv: ["sh", "-c", '"$@"; exit 0', "sh", *argv])
    new = fresh(manager)
    parents = [remotecall_fetch(os.getppid, pid) for pid in new]
    assert parents == [process.pid for process in manager.processes]


class AllAtOnce(Processes):
    """Returns its configs when every worker is there already, one config for all."""

    def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
        before = len(workers())
        argv = self.worker_command(params)
        self.processes = [subprocess.Popen(argv) for _ in range(self.n)]
        time.sleep(0.5)
        assert len(workers()) == before
        return [WorkerConfig(count=self.n, userdata="all")]


def test_one_config_for_several_workers(fresh: Callable[..., list[int]]) -> None:
    manager = AllAtOnce(2)
    new = fresh(manager)
    assert len(new) == 2
    assert {remotecall_fetch(os.getpid, p) for p in new} == {p.pid for p in manager.processes}
    rmprocs(new)
    for process in manager.processes:
        assert process.wait(LONG) == 0


class Plain(ClusterManager):
    """As little as a manager can be."""

    def launch(self, params: dict[str, Any]) -> Iterable[WorkerConfig]:
        yield WorkerConfig(process=subprocess.Popen(self.worker_command(params)))


def stubborn(seconds: float) -> None:
    """Hold the interpreter's lock in C."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def test_worker_that_does_not_leave_is_killed(fresh: Callable[..., list[int]]) -> None:
    manager = Processes(1)
    (pid,) = fresh(manager)
    os_pid = remotecall_fetch(os.getpid, pid)
    running(pid, stubborn, 30.0)
    start = time.monotonic()
    rmprocs(pid)
    assert time.monotonic() - start < 15
    assert pid in manager.killed
    assert process_is_gone(os_pid)


def test_default_parameters_of_a_manager(fresh: Callable[..., list[int]], tmp_path: Path) -> None:
    class InAFolder(Processes):
        def default_addprocs_params(self) -> dict[str, Any]:
            return {**super().default_addprocs_params(), "dir": str(tmp_path), "queue": "short"}

    manager = InAFolder(1)
    (pid,) = fresh(manager)
    assert os.path.samefile(remotecall_fetch(os.getcwd, pid), tmp_path)
    assert manager.params["queue"] == "short"
    assert hpcdist.default_addprocs_params(manager)["dir"] == str(tmp_path)


class Talking(Processes):
    """Calls its workers while it is being told of them."""

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        super().manage(pid, config, op)
        if op == "register":
            assert remotecall_fetch(myid, pid) == pid
            self.told.append((pid, "called"))


def test_manager_may_call_the_worker_it_is_told_of(fresh: Callable[..., list[int]]) -> None:
    manager = Talking(2)
    for pid in fresh(manager):
        assert manager.ops(pid) == ["register", "called"]


class Complaining(Processes):
    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        raise OSError(f"no {op} today")


def test_manager_whose_manage_raises(
    fresh: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    (pid,) = fresh(Complaining(1))
    assert remotecall_fetch(myid, pid) == pid
    rmprocs(pid)
    assert "no register today" in caplog.text


# --- launches that fail --------------------------------------------------------------------------


class Launches(ClusterManager):
    """Does what a test wants."""

    def __init__(self, launch: Callable[[ClusterManager, dict[str, Any]], Any]) -> None:
        self._launch = launch
        self.killed: list[WorkerConfig] = []

    def launch(self, params: dict[str, Any]) -> Any:
        return self._launch(self, params)

    def kill(self, pid: int, config: WorkerConfig) -> None:
        self.killed.append(config)
        super().kill(pid, config)


def none_at_all(manager: ClusterManager, params: dict[str, Any]) -> Iterator[WorkerConfig]:
    yield from ()


def refuse(manager: ClusterManager, params: dict[str, Any]) -> Iterator[WorkerConfig]:
    raise PermissionError("no account")


def rubbish(manager: ClusterManager, params: dict[str, Any]) -> list[Any]:
    return ["worker-1"]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (none_at_all, "no worker"),
        (lambda manager, params: None, "no worker"),
        (refuse, "no account"),
        (rubbish, "WorkerConfig"),
    ],
)
def test_launch_that_is_none(start: Any, words: str) -> None:
    begin = time.monotonic()
    with pytest.raises(LaunchError, match=words) as caught:
        addprocs(Launches(start))
    assert time.monotonic() - begin < LONG
    assert caught.value.phase
    assert caught.value.pids == []


def test_launch_that_is_not_written() -> None:
    class Unfinished(ClusterManager):
        pass

    with pytest.raises(LaunchError, match="Unfinished"):
        addprocs(Unfinished())


def one_process(*argv: str) -> Any:
    def start(manager: ClusterManager, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        yield WorkerConfig(process=subprocess.Popen(argv, stdout=subprocess.DEVNULL))

    return start


@pytest.mark.parametrize("command", ["exec yes hpcdist", "exec sleep 1234.5"])
def test_silent_process_is_killed(command: str) -> None:
    manager = Launches(one_process("sh", "-c", command))
    with pytest.raises(LaunchError, match=r"did not register within 1 s") as caught:
        addprocs(manager, timeout=1)
    assert caught.value.command
    assert caught.value.fix
    (config,) = eventually(lambda: manager.killed)
    eventually(lambda: config.process.returncode is not None)


def test_process_that_ends_early_is_noticed() -> None:
    begin = time.monotonic()
    with pytest.raises(LaunchError, match="exit code 3"):
        addprocs(Launches(one_process("sh", "-c", "exit 3")))
    assert time.monotonic() - begin < LONG


def test_workers_that_came_up_before_the_error_stay() -> None:
    arrived = threading.Event()

    def start(manager: ClusterManager, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        yield WorkerConfig(process=subprocess.Popen(manager.worker_command(params)))
        arrived.wait(LONG)
        raise RuntimeError("the second one is ill")

    starting = launch(Launches(start))
    (pid,) = starting.wait(1, timeout=LONG)
    arrived.set()
    with pytest.raises(LaunchError, match="the second one is ill") as caught:
        starting.wait(timeout=LONG)
    assert caught.value.pids == [pid]
    assert remotecall_fetch(myid, pid) == pid
    rmprocs(pid)


@pytest.mark.parametrize("kind", ["local", "ranks"])
@pytest.mark.timeout(90)
def test_launch_that_stays_silent(kind: str, tmp_path: Path) -> None:
    # Answers the question which MPI it has, and nothing after that.
    python = program(
        tmp_path / "python",
        f'case "$*" in *"-c "*) exec "{sys.executable}" "$@";; esac\n'
        "echo just a moment; echo still busy >&2; exec sleep 1234.5",
    )
    manager = LocalManager(2) if kind == "local" else MPIManager(2)
    begin = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        addprocs(manager, python=python, timeout=2)
    assert time.monotonic() - begin < LONG
    error = caught.value
    assert error.phase
    assert error.fix
    assert python in str(error.command)
    assert error.phase in str(error)
    assert error.fix in str(error)
    eventually(lambda: not sleepers(), timeout=10)


def sleepers() -> list[str]:
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in found.stdout.splitlines() if line.strip() == "sleep 1234.5"]


# --- MPI ranks started by us ---------------------------------------------------------------------


def rank_and_size() -> tuple[int, int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


def test_ranks_started_with_mpiexec(fresh: Callable[..., list[int]], pids: list[int]) -> None:
    new = fresh(MPIManager(3))
    assert [remotecall_fetch(rank_and_size, pid) for pid in new] == [(0, 3), (1, 3), (2, 3)]
    assert remotecall_fetch(remotecall_fetch, new[0], myid, new[2]) == new[2]
    assert remotecall_fetch(remotecall_fetch, pids[0], myid, new[2]) == new[2]
    assert remotecall_fetch(remotecall_fetch, new[2], myid, pids[0]) == pids[0]
    os_pids = [remotecall_fetch(os.getpid, pid) for pid in new]
    rmprocs(new[1])
    assert new[1] not in workers()
    with pytest.raises(ProcessExitedException):
        remotecall(myid, new[1])
    for pid in (new[0], new[2]):
        assert remotecall_fetch(myid, pid) == pid
    rmprocs(new)
    for os_pid in os_pids:
        eventually(lambda os_pid=os_pid: process_is_gone(os_pid), timeout=10)


@pytest.mark.skipif(mpi_flavour() == "openmpi", reason="there each rank may leave when it likes")
def test_parked_rank_sleeps(fresh: Callable[..., list[int]]) -> None:
    new = fresh(MPIManager(2))
    os_pid = remotecall_fetch(os.getpid, new[1])
    rmprocs(new[1])
    before = cpu_seconds(os_pid)
    time.sleep(1)
    assert cpu_seconds(os_pid) - before <= 0.02
    rmprocs(new[0])
    eventually(lambda: process_is_gone(os_pid), timeout=10)


def test_output_of_ranks(
    fresh: Callable[..., list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    new = fresh(MPIManager(2))
    for pid in new:
        remotecall_fetch(print, pid, "ours")
        remotecall_fetch(os.system, pid, "echo a child of it")
    seen = ""

    def all_there() -> bool:
        nonlocal seen
        seen += capfd.readouterr().out
        return all(
            f"From worker {pid}:\t{text}\n" in seen
            for pid in new
            for text in ("ours", "a child of it")
        )

    eventually(all_there)


def test_no_interpreter_for_ranks(tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "python")
    for manager in (MPIManager(2), LocalManager(1)):
        with pytest.raises(LaunchError) as caught:
            addprocs(manager, python=missing)
        assert missing in str(caught.value)
        assert caught.value.phase


@pytest.mark.timeout(90)
def test_fake_mpiexec_first_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[..., Any]
) -> None:
    program(tmp_path / "bin" / "mpiexec", "echo this is no MPI >&2; exit 3")
    text = """
        from hpcdist import MPIManager, addprocs, myid, remotecall_fetch

        new = addprocs(MPIManager(2)) + addprocs(2)
        assert [remotecall_fetch(myid, pid) for pid in new] == new == [2, 3, 4, 5]
    """
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = script(dedent(text), env={"PATH": path})
    assert done.rc == 0, done.err


@pytest.mark.timeout(90)
@pytest.mark.parametrize("manager", [LocalManager(2), MPIManager(2)], ids=["local", "mpiexec"])
@pytest.mark.parametrize("says", ["gibberish", "the-other-mpi", "nothing"])
def test_fake_mpiexec_in_the_environment(says: str, manager: Any, tmp_path: Path) -> None:
    """An environment whose mpi4py is ours, and whose mpiexec is something else."""
    python = program(tmp_path / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    text = {
        "gibberish": "echo I am a toaster; exit 0",
        "the-other-mpi": 'echo "mpirun (Open MPI) 5.0.11"; exit 1'
        if mpi_flavour() != "openmpi"
        else "echo HYDRA build details:; echo '    Version:   4.3.0'; exit 1",
        "nothing": "exec sleep 1234.5",
    }[says]
    real = mpiexec(1)[0]
    program(tmp_path / "venv" / "bin" / "mpiexec", text)
    begin = time.monotonic()
    try:
        new = addprocs(manager, python=python, timeout=10)
    except LaunchError as error:
        assert error.phase  # noqa: PT017 - may, need not
        assert "mpi" in str(error).lower()  # noqa: PT017
    else:  # It found the right one after all.
        assert os.path.exists(real)
        assert remotecall_fetch(remotecall_fetch, new[0], myid, new[1]) == new[1]
        rmprocs(new)
    assert time.monotonic() - begin < 60
    eventually(lambda: not sleepers(), timeout=10)


def test_no_processes_without_a_world_of_their_own(fresh: Callable[..., list[int]]) -> None:
    first, second = fresh(2, isolation="process")
    assert remotecall_fetch(mpi_is_loaded, first) is False
    assert remotecall_fetch(remotecall_fetch, first, myid, second) == second
    kill9(remotecall_fetch(os.getpid, first))
    eventually(lambda: first not in workers())
    assert remotecall_fetch(myid, second) == second


def mpi_is_loaded() -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and bool(mpi.Is_initialized())


# --- topologies ----------------------------------------------------------------------------------


def test_custom_topology(script: Callable[..., Any]) -> None:
    text = """
        import subprocess
        import hpcdist
        from hpcdist import ClusterManager, WorkerConfig, addprocs, myid, remotecall_fetch

        class Ring(ClusterManager):
            def launch(self, params):
                for k in range(4):  # 2 with 3, 3 with 4, 4 with 5
                    process = subprocess.Popen(self.worker_command(params))
                    yield WorkerConfig(process=process, ident=k, connect_idents=[k + 1])

        pids = addprocs(Ring(), topology="custom")
        assert pids == [2, 3, 4, 5]
        for one in pids:
            assert remotecall_fetch(remotecall_fetch, one, myid, 1) == 1
            for other in pids:
                if abs(one - other) <= 1:
                    assert remotecall_fetch(remotecall_fetch, one, myid, other) == other
                    continue
                try:
                    remotecall_fetch(remotecall_fetch, one, myid, other)
                except RuntimeError as exc:
                    assert exc.pid == one and "custom" in str(exc), exc
                else:
                    raise SystemExit(f"{one} may call {other}")
        hpcdist.rmprocs(pids)
        assert addprocs(1) == [6]
    """
    done = script(dedent(text))
    assert (done.rc, done.err) == (0, "")


def test_forbidden_pair_is_an_error_of_the_caller(script: Callable[..., Any]) -> None:
    text = """
        import hpcdist
        from hpcdist import addprocs, remotecall_fetch, RemoteChannel

        first, second = addprocs(2, topology="master_worker")
        there = RemoteChannel(1, second)

        def attempt(f, *args):
            try:
                f(*args)
            except RuntimeError as exc:
                return type(exc).__name__, hpcdist.myid()

        call = (abs, second, 1)
        for f, args in ((hpcdist.remotecall, call), (hpcdist.remote_do, call),
                        (there.put, (1,)), (there.take, ())):
            assert remotecall_fetch(attempt, first, f, *args) == ("RuntimeError", first), f
        there.put(1)
        assert there.take() == 1
    """
    done = script(dedent(text))
    assert done.rc == 0, done.err


# --- a transport of one's own --------------------------------------------------------------------

GUEST = """
import os, socket, sys
sys.path[:0] = sys.argv[3].split(os.pathsep)
import hpcdist
from tests.cluster.test_managers import serve_{kind}

serve_{kind}(*sys.argv[1:3])
"""


class Telephone(ClusterManager):
    """Starts processes that listen, and calls them up."""

    def __init__(self, n: int, kind: str) -> None:
        self.n = n
        self.kind = kind
        self.told: list[tuple[int, str]] = []
        self.streams: dict[int, tuple[Any, Any]] = {}

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        text = GUEST.format(kind=self.kind)
        for number in range(self.n):
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            extra: dict[str, Any] = {}
            if self.kind == "tcp":
                listener = socket.create_server(("127.0.0.1", 0))
                extra = {"pass_fds": (listener.fileno(),)}
                address = str(listener.fileno())
            else:
                listener = None
                extra = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                address = "-"
            command = [sys.executable, "-c", text, cluster_cookie(), address, path]
            process = subprocess.Popen(command, **extra)
            port = None
            if listener is not None:
                port = listener.getsockname()[1]
                listener.close()
            yield WorkerConfig("127.0.0.1", port, process=process, ident=number)

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        self.told.append((pid, op))

    def connect(self, pid: int, config: WorkerConfig) -> tuple[Any, Any]:
        if self.kind == "tcp":
            sock = socket.create_connection((config.host, config.port))
            self.streams[pid] = (sock, sock)
        else:
            self.streams[pid] = (config.process.stdout, config.process.stdin)
        return self.streams[pid]


def serve_tcp(cookie: str, fd: str) -> None:
    """Be a worker that others call up, on a listening socket that was inherited."""
    hpcdist.init_worker(cookie, Telephone(0, "tcp"))
    listener = socket.socket(fileno=int(fd))
    while True:
        sock, _ = listener.accept()
        thread = hpcdist.process_messages(sock, sock)
        assert isinstance(thread, threading.Thread)


def serve_pipe(cookie: str, _: str) -> None:
    """Be a worker whose main thread has nothing else to do."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    hpcdist.init_worker(cookie)
    hpcdist.process_messages(sys.stdin.buffer, out, True).join()


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("kind", ["tcp", "pipe"])
def test_own_transport(
    kind: str, fresh: Callable[..., list[int]], pids: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    manager = Telephone(2, kind)
    first, second = new = fresh(manager)
    assert [remotecall_fetch(myid, pid) for pid in new] == new
    assert remotecall_fetch(hpcdist.workers, first) == [*pids, *new]
    # Its main thread serves once it has come to `join()`; before, another thread does.
    eventually(lambda: remotecall_fetch(on_main_thread, first) is (kind == "pipe"))

    # Everything goes through: large values, errors, channels, prints, interrupts.
    data = os.urandom(3_000_000)
    assert remotecall_fetch(bytes.__add__, first, data, b"!") == data + b"!"
    with pytest.raises(ZeroDivisionError):
        remotecall_fetch(divmod, first, 1, 0)
    with RemoteChannel(1, first) as rc:
        remotecall(rc.put, second, "by way of both")
        assert rc.take(timeout=LONG) == "by way of both"
    remotecall_fetch(print, second, "hello")
    eventually(lambda: f"From worker {second}:\thello\n" in capfd.readouterr().out)
    call = running(first, hpcdist.sleep, 60)
    interrupt(first)
    with pytest.raises(RemoteException):
        call.fetch(timeout=LONG)
    for one, other in ((first, second), (second, pids[0]), (pids[1], first)):
        assert remotecall_fetch(remotecall_fetch, one, myid, other) == other

    # Whoever holds one of its streams can be told whose it is.
    reader, writer = manager.streams[first]
    assert worker_id_from_socket(reader) == worker_id_from_socket(writer) == first
    assert worker_id_from_socket(reader.fileno()) == first

    processes = [remotecall_fetch(os.getpid, pid) for pid in new]
    rmprocs(first)
    kill9(processes[1])
    eventually(lambda: workers() == pids)
    for os_pid in processes:
        eventually(lambda os_pid=os_pid: process_is_gone(os_pid))
    for pid in new:
        eventually(lambda pid=pid: (pid, "finalize") in manager.told)
        assert [op for told, op in manager.told if told == pid] == [
            *("register", *(["interrupt"] if pid == first else [])),
            *("deregister", "finalize"),
        ]
    assert worker_id_from_socket(reader) == -1


@pytest.mark.parametrize("kind", ["tcp", "pipe"])
def test_own_transport_ends_with_the_driver(kind: str, script: Callable[..., Any]) -> None:
    text = f"""
        import os
        from hpcdist import addprocs, remotecall, remotecall_fetch
        from tests.cluster.test_managers import Telephone, spin

        new = addprocs(Telephone(2, {kind!r}))
        print(*[remotecall_fetch(os.getpid, pid) for pid in new], flush=True)
        remotecall(spin, new[0], 60)
    """
    begin = time.monotonic()
    done = script(dedent(text))
    assert done.rc == 0, done.err
    assert time.monotonic() - begin < 20
    for word in done.out.split():
        eventually(lambda word=word: process_is_gone(int(word)), timeout=8)


class Unreachable(Plain):
    def connect(self, pid: int, config: WorkerConfig) -> Any:
        raise ConnectionRefusedError("no such number")


def test_connect_that_fails() -> None:
    with pytest.raises(LaunchError, match="no such number"):
        addprocs(Unreachable())


def test_connect_that_returns_none(fresh: Callable[..., list[int]]) -> None:
    class Indifferent(Plain):
        def connect(self, pid: int, config: WorkerConfig) -> None:
            return None

    (pid,) = fresh(Indifferent())
    assert remotecall_fetch(myid, pid) == pid


def test_stranger_at_the_other_end() -> None:
    class Wrong(ClusterManager):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            yield WorkerConfig()

        def connect(self, pid: int, config: WorkerConfig) -> Any:
            ours, theirs = socket.socketpair()
            theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            theirs.close()
            return ours, ours

    with pytest.raises(LaunchError, match="protocol"):
        addprocs(Wrong())


def test_start_worker_from_stdin(fresh: Callable[..., list[int]]) -> None:
    class ByStdin(ClusterManager):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            text = "import hpcdist, sys; hpcdist.start_worker('-', stdin=sys.stdin)"
            with open(params["join"], "rb") as join:
                process = subprocess.Popen([sys.executable, "-c", text], stdin=join)
            yield WorkerConfig(process=process)

    (pid,) = fresh(ByStdin())
    assert remotecall_fetch(myid, pid) == pid


# --- the cookie ----------------------------------------------------------------------------------


def test_cookie_is_the_same_everywhere(pids: list[int]) -> None:
    cookie = cluster_cookie()
    assert len(cookie) == 16
    assert cookie.isascii()
    assert [remotecall_fetch(cluster_cookie, pid) for pid in pids] == [cookie] * 3
    with pytest.raises(RuntimeError):
        cluster_cookie("too late")
    assert cluster_cookie() == cookie


def test_cookie_of_ones_own(script: Callable[..., Any]) -> None:
    text = """
        from hpcdist import addprocs, cluster_cookie, remotecall_fetch

        for wrong in ("seventeen letters", "schlüssel"):
            try:
                cluster_cookie(wrong)
            except ValueError:
                continue
            raise SystemExit(wrong)
        assert cluster_cookie("ab") == "ab" + 14 * " "
        assert cluster_cookie() == "ab" + 14 * " "
        cluster_cookie("0123456789abcdef")
        addprocs(2)
        assert remotecall_fetch(cluster_cookie, 2) == "0123456789abcdef"
        assert remotecall_fetch(remotecall_fetch, 2, cluster_cookie, 3) == "0123456789abcdef"
        try:
            cluster_cookie("x")
        except RuntimeError:
            pass
        else:
            raise SystemExit("too late, and taken")
    """
    done = script(dedent(text))
    assert done.rc == 0, done.err


def test_join_file_is_private_and_goes(fresh: Callable[..., list[int]]) -> None:
    seen = []

    class Looking(Plain):
        def launch(self, params: dict[str, Any]) -> Iterable[WorkerConfig]:
            seen.append((params["join"], stat.S_IMODE(os.stat(params["join"]).st_mode)))
            return super().launch(params)

    manager = Looking()
    fresh(manager)
    ((join, mode),) = seen
    assert mode == 0o600
    assert not os.path.exists(join)
    assert cluster_cookie() not in " ".join(manager.worker_command({"join": join}))


# --- whose socket is it --------------------------------------------------------------------------


def test_worker_id_from_socket() -> None:
    assert worker_id_from_socket(io.BytesIO()) == 1
    assert worker_id_from_socket(-1) == -1
    assert worker_id_from_socket(object()) == -1
    with socket.socket() as stranger:
        assert worker_id_from_socket(stranger) == -1
        assert worker_id_from_socket(stranger.fileno()) == -1


def test_process_messages_and_init_worker_are_for_workers() -> None:
    with pytest.raises(RuntimeError):
        hpcdist.process_messages(io.BytesIO(), io.BytesIO())
    with pytest.raises(RuntimeError):
        hpcdist.init_worker(cluster_cookie())


@pytest.mark.parametrize("in_a_list", [False, True])
def test_what_a_manager_starts_after_the_launch_was_cancelled_is_killed(in_a_list: bool) -> None:
    """It used to start the rest, and nobody ended that: instances of a cloud, say."""
    going, cancelled = threading.Event(), threading.Event()
    killed: list[int] = []
    started: list[int] = []

    class Slow(hpcdist.ClusterManager):
        def launch(self, params: dict[str, Any]) -> Iterable[WorkerConfig]:
            return list(self._start()) if in_a_list else self._start()

        def _start(self) -> Iterator[WorkerConfig]:
            for k in range(4):
                if k == 2:
                    going.set()
                    assert cancelled.wait(30)
                started.append(k)
                yield WorkerConfig(userdata=k)

        def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
            """Nothing to do."""

        def kill(self, pid: int, config: WorkerConfig) -> None:
            killed.append(config.userdata)

    launch = hpcdist.launch(Slow())
    assert going.wait(30)
    launch.cancel()
    cancelled.set()
    expected = 4 if in_a_list else 3  # a generator starts no more
    eventually(lambda: len(killed) == expected)
    assert sorted(killed) == started == list(range(expected))
