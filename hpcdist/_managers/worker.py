"""A worker: dials pid 1, learns who it is, runs calls until told to leave."""

from __future__ import annotations

import atexit
import faulthandler
import hmac
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType, ModuleType
from typing import Any, NoReturn

from hpcdist import _errors
from hpcdist._managers import affinity, reaching
from hpcdist._managers.joining import CannotJoin, guard, read_join
from hpcdist._managers.processes import adopt_output, segments_of, unlink
from hpcdist._monitor import output
from hpcdist._parallel import served  # noqa: F401  (registers its handlers)
from hpcdist._remote import calls, remote_channels  # noqa: F401  (registers its handlers)
from hpcdist._runtime.controls import DIED, JOINED, LEAVE, LEFT, PARK, STATUS, WELCOME
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.bells import Bells
from hpcdist._transport.contracts import Slot
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire import frames, greeting
from hpcdist._wire.frames import Buffer

_segments: set[str] = set()  # shared memory of our own that MPI removes only in MPI_Finalize
_BELL_NAME = 192  # room for where a bell is
_FINALIZE = 5.0


def work(join: str) -> NoReturn:
    """Be a worker of the launch that a join file describes. Never returns."""
    code = 1
    try:
        Worker(join).run()
        code = 0
    except BaseException as exc:  # the edge of this process
        _report(exc)
    leave(code)


def _report(exc: BaseException) -> None:
    stream = sys.__stderr__
    if stream is not None and isinstance(exc, CannotJoin):
        print(f"hpcdist worker: {exc}", file=stream)
    elif stream is not None:
        import traceback

        traceback.print_exception(exc, file=stream)


class Worker:
    """This process as a worker."""

    def __init__(self, join: str) -> None:
        self.file = join
        self.join = read_join(join)
        self.folder: str = self.join["dir"]  # "" in a job: its hosts share none that is theirs
        self.cookie = bytes.fromhex(self.join["cookie"])
        # A manager of the user's own numbers nobody: what the environment says is another launch's.
        self.rank = _rank() if self.join["how"] else -1
        self.comm: Any = None
        self.bells: Bells | None = None
        self.listeners: list[socket.socket] = []
        self.welcome = Slot()

    def run(self) -> None:
        """Join, and run calls until told to leave."""
        place = self._place()
        affinity.pin(place)
        if self.join["how"] == "mpirun" and self.folder:
            adopt_output(self.folder, self.rank)
        _become_worker(self.join.get("path") or [])
        self._go_to(self.join.get("cwd"))
        os.environ.update({**place.get("env", {}), **(self.join.get("env") or {})})
        sock = self._dial()
        if self.is_elastic:
            guard(sock)
        address = self._listen()
        facts = {}
        if self.join["mpi"]:
            facts = self._start_mpi()
            affinity.pin(place)  # whatever MPI made of it
        greeting.send_hello(sock, {"address": address, **facts})
        self._serve(sock)

    @property
    def is_elastic(self) -> bool:
        """Whether it comes by itself, from anywhere, and no keeper has started it."""
        return bool(self.join.get("elastic"))

    def _place(self) -> dict[str, Any]:
        """Return where it is to run, if that matters."""
        places: list[dict[str, Any]] = self.join.get("places") or []
        return places[self.rank] if 0 <= self.rank < len(places) else {}

    def _go_to(self, folder: str | None) -> None:
        if not folder:
            return
        try:
            os.chdir(folder)
        except OSError:
            if not self.is_elastic:  # on a machine that has no such folder it stays where it is
                raise

    def _dial(self) -> Any:
        step = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        hello = {
            **greeting.about(),
            "kind": "worker",
            "world": self.join["world"],
            "rank": self.rank,
            "ident": os.environ.get("HPCDIST_IDENT"),
            "step": ".".join(step) if all(step) else None,
        }
        try:
            sock = reaching.dial(self.join)
            greeting.dial(sock, self.cookie, hello, reaching.GREETING)
            answer = greeting.receive_hello(sock) if self.is_elastic else {}
        except OSError as exc:
            raise CannotJoin(
                f"{self.file} leads to no cluster: {exc}. Its process 1 takes no workers any "
                "more, or cannot be reached from this host"
            ) from exc
        if "refused" in answer:
            raise CannotJoin(f"process 1 does not let this worker in: {answer['refused']}")
        return sock

    def _listen(self) -> str:
        if "tls" in self.join:
            from hpcdist._transport import network

            self.listeners = network.listen(self.join.get("interface"))
            return network.name(self.listeners)
        name = f"w{self.rank}" if self.rank >= 0 else f"p{os.getpid()}"
        path = os.path.join(self.folder, name)
        self.listeners = [reaching.listen(path)]
        return path

    def _start_mpi(self) -> dict[str, Any]:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        if not self.folder:  # in a job, where no keeper of this host would remove it
            _segments.update(segments_of(os.getpid()))
        self.comm, made = MPI.COMM_WORLD.Idup()
        quiet(made)
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        size = self.comm.Get_size()
        if self.folder:
            self.bells = Bells(self.folder, self.comm.Get_rank(), size)
        else:
            self._hang_bells_of_host()
        return {
            "size": size,
            "mpi_rank": self.comm.Get_rank(),
            "library": MPI.Get_library_version().splitlines()[0].strip("\0 "),
            "multiple": MPI.Query_thread() >= MPI.THREAD_MULTIPLE,
        }

    def _hang_bells_of_host(self) -> None:
        """Share bells with the ranks of this host alone, and leave no name of a file behind."""
        comm, rank, size = self.comm, self.comm.Get_rank(), self.comm.Get_size()
        temporary = os.stat(tempfile.gettempdir())
        place = f"{socket.gethostname()} {temporary.st_dev} {temporary.st_ino}"
        mine = hmac.digest(self.cookie, f"{self.join['world']} {place}".encode(), "sha256")
        every = _gathered(comm, mine)
        first = every.index(mine)
        elsewhere = [other for other in range(size) if every[other] != mine]
        node.progress.spans_hosts = bool(elsewhere)
        folder = os.path.join(tempfile.gettempdir(), f"hpcdist-{mine.hex()[:16]}")
        with _folder(folder) if rank == first else nullcontext():
            quiet(comm.Ibarrier())
            self.bells = Bells(folder, rank, size)
            quiet(comm.Ibarrier())
        for path in segments_of(os.getpid()):
            # Mapped by all of this host by now. Open MPI's are mapped late, if by anybody else.
            if "mpich" in path or size == 1:
                unlink(path)
                _segments.discard(path)
        if elsewhere:
            where = self.bells.hang_far(self.join.get("interface"))
            bells = _gathered(comm, where.encode().ljust(_BELL_NAME))
            self.bells.reach_far({other: bells[other].decode().strip() for other in elsewhere})

    def _serve(self, sock: Any) -> None:
        node.serving = True
        node.turns.expect_main()
        node.start()
        link = Link(sock, node.progress, node.deliver, _lost_master)
        master = Peer(1, node.progress)
        master.link = link
        link.peer = master
        node.peers[1] = master
        node.handlers[WELCOME] = self._on_welcome
        link.begin()
        node.progress.wait(self.welcome, time.monotonic() + float(self.join["timeout"]))
        if self.is_elastic and sys.__stderr__ is not None:  # who has typed the command may read it
            print(f"hpcdist worker: this is worker {node.me} now", file=sys.__stderr__, flush=True)
        signal.signal(signal.SIGINT, node.turns.on_sigint)
        node.turns.serve()
        _say_goodbye()
        if self.join.get("together"):
            _finalize()

    def _on_welcome(self, peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
        told = pickle.loads(body)
        node.me = told["me"]
        node.topology = told["topology"]
        node.turns.set_limit(told["concurrency"])
        if self.comm is not None:
            self._open_plane(told["first"])
        reaching.cookie = self.cookie
        for listener in self.listeners:
            reaching.accept_links(listener, self.cookie, secure="tls" in self.join)
        if told["topology"] != "all_to_all":
            node.forbidden = _forbidden
        for pid, member in told["members"]:
            meet(pid, member)
        node.settle()
        output.forward()
        node.progress.complete(self.welcome)

    def _open_plane(self, first: int) -> None:
        open_plane(self.comm, self.bells, {rank: first + rank for rank in range(self.comm.size)})


@contextmanager
def _folder(path: str) -> Iterator[None]:
    """Make a private folder for a moment; a job that is cancelled just then leaves none either."""

    def end(signum: int, frame: FrameType | None) -> None:
        shutil.rmtree(path, ignore_errors=True)
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)

    usual = signal.signal(signal.SIGTERM, end)
    try:
        os.mkdir(path, 0o700)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        signal.signal(signal.SIGTERM, usual or signal.SIG_DFL)


def _gathered(comm: Any, mine: bytes) -> list[bytes]:
    """Tell all ranks something, each of the same length."""
    from mpi4py import MPI

    size = len(mine)
    every = bytearray(size * comm.Get_size())
    quiet(comm.Iallgather([bytearray(mine), MPI.BYTE], [every, MPI.BYTE]))
    return [bytes(every[start : start + size]) for start in range(0, len(every), size)]


def quiet(request: Any) -> None:
    """Wait for a request without spinning, which is slow for all where ranks outnumber cores."""
    pause = 0.0001
    while not request.Test():
        time.sleep(pause)
        pause = min(pause * 2, 0.01)


def open_plane(comm: Any, bells: Bells | None, pids: dict[int, int]) -> None:
    """Start the MPI side of this process: the other ranks become its peers."""
    from hpcdist._transport.mpi import MpiPlane

    plane = MpiPlane(comm, node.deliver, bells)
    for rank, pid in pids.items():
        if pid == node.me:
            continue
        peer = node.peers.get(pid)
        if peer is None:
            peer = node.peers[pid] = Peer(pid, node.progress)
        peer.plane, peer.rank = plane, rank
        plane.peers[rank] = peer
    if bells is not None:
        node.progress.register(bells.socket.fileno(), bells.hear, 1)
        if bells.far_socket is not None:

            def rung_from_afar(events: int) -> None:
                bells.hear_far(events)
                node.progress.stay_alert()

            node.progress.register(bells.far_socket.fileno(), rung_from_afar, 1)
    node.progress.plane = plane


def meet(pid: int, member: Member) -> None:
    """Take a worker in among those we know."""
    if pid in node.members.gone:
        return
    node.members.add(pid, member)
    if pid == node.me:
        return
    peer = node.peers.get(pid)
    if peer is None:
        peer = node.peers[pid] = Peer(pid, node.progress)
    peer.reach = reaching.reach
    for fn in node.on_join:
        fn(pid)


def _rank() -> int:
    for name in ("HPCDIST_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return -1  # started by hand or by a manager of the user's: pid 1 gives it a number


def _become_worker(path: Sequence[str]) -> None:
    """Make this process a blank one: no driver's `__main__`, our sys.path, stacks on demand."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
    sys.argv = [""]
    node.refusal = None
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def _lost_master(link: Link) -> None:
    """Pid 1 is gone, and so are we."""
    leave(1)


# What pid 1 tells


@node.control(JOINED)
def _on_joined(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    for pid, member in pickle.loads(body):
        meet(pid, member)
    node.settle()


@node.control(LEFT)
def _on_left(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    node.members.living.pop(pickle.loads(body), None)


@node.control(DIED)
def _on_died(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    pid, why, host, stderr = pickle.loads(body)
    if pid == node.me:  # we were given up
        leave(1)
    known = node.members.gone.get(pid)
    if known is not None:
        known.amend(why)
        return
    node.died(pid, _errors.ProcessExitedException(pid, why, host, stderr))


@node.control(LEAVE)
def _on_leave(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    node.turns.stop()


@node.control(PARK)
def _on_park(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    node.turns.drop_queue()


@node.control(STATUS)
def _on_status(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    running, queued = calls.counts()
    node.reply(peer, ident, frames.OK, pickle.dumps((running, queued, output.rss())))


def _forbidden(pid: int) -> str | None:
    if pid == 1:
        return None
    me, other = node.members.living.get(node.me), node.members.living.get(pid)
    if me is not None and other is not None and node.topology == "custom":
        linked = other.ident in me.connect or me.ident in other.connect
        if linked:
            return None
    return f"process {pid} is not connected to {node.me}: the topology is {node.topology}"


# Leaving


def _say_goodbye() -> None:
    """Hand everything unsent to the kernel."""
    sys.stdout.flush()
    sys.stderr.flush()
    master = node.peers[1]
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        node.progress.nudge()
        link = master.link
        if not master.outbox and (link is None or link.idle or not link.open):
            break
        try:
            node.progress.wait(Slot(), time.monotonic() + 0.01)
        except TimeoutError:
            pass


def _finalize() -> None:
    """Take leave of the launcher, which would take it for a crash; all ranks do so together."""
    from mpi4py import MPI

    faulthandler.dump_traceback_later(_FINALIZE, exit=True)
    node.progress.stop()
    node.progress.detach()
    MPI.Finalize()


def leave(code: int, *, by_libc: bool = False) -> NoReturn:
    """End this process at once: MPI's own end may hang when others have died.

    Args:
        code: The exit code.
        by_libc: Run the C library's exit handlers: MPICH takes leave of its launcher there, and
            a rank that does not is a crashed one to mpiexec.
    """
    faulthandler.dump_traceback_later(_FINALIZE, exit=True)
    try:
        if threading.current_thread() is threading.main_thread():
            atexit._run_exitfuncs()
    finally:
        for path in _segments:
            unlink(path)
        for stream in (sys.__stdout__, sys.__stderr__):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                pass
        if by_libc:
            import ctypes

            ctypes.CDLL(None).exit(code)
        os._exit(code)
