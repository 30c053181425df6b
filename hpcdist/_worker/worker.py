"""A worker: dials pid 1, learns who it is, runs calls until told to leave."""

from __future__ import annotations

import faulthandler
import hmac
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType, ModuleType
from typing import Any, NoReturn

from hpcdist import _config
from hpcdist._keeper import folders
from hpcdist._keeper.escaped_processes import marked, sweep_after
from hpcdist._keeper.pmi_sockets import end_at_next_word, stop_at_next_word
from hpcdist._keeper.processes import adopt_output, segments_of, unlink
from hpcdist._monitor import output, terminal
from hpcdist._numbers import whole
from hpcdist._runtime.node import Mail, Node, here
from hpcdist._transport.bells import Bells
from hpcdist._transport.contracts import Slot
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Socket
from hpcdist._wire.messages import (
    Welcome,
)
from hpcdist._worker import affinity, dialling, gpus, singletons
from hpcdist._worker.dialling import Links
from hpcdist._worker.join_file import CannotJoin, guard, read_join
from hpcdist._worker.life import Life
from hpcdist._worker.services import EVERY_PROCESS

_BELL_NAME = 192  # room for where a bell is
_FINALIZE = 5.0


def work(join: str) -> NoReturn:
    """Work for the launch that a join file describes. Never returns."""
    code = 1
    node = here.node
    node.serve(EVERY_PROCESS)
    try:
        Worker(node, join).run()
        code = 0
    except BaseException as exc:  # the edge of this process
        _report(exc)
    node.service(Life).leave(code)


def _report(exc: BaseException) -> None:
    stream = sys.__stderr__
    if stream is not None and isinstance(exc, CannotJoin):
        print(f"hpcdist worker: {exc}", file=stream)
    elif stream is not None:
        import traceback

        traceback.print_exception(exc, file=stream)


class Worker:
    """This process as a worker."""

    def __init__(self, node: Node, join: str) -> None:
        self._belong_to(node)
        self.file = join
        self.join = read_join(join)
        _config.learn(*self.join.get("tables", ()))
        self.folder: str = self.join["dir"]  # "" in a job: its hosts share none that is theirs
        self.cookie = bytes.fromhex(self.join["cookie"])
        # A manager of the user's own numbers nobody: what the environment says is another launch's.
        self.rank = _rank(self.join.get("rank_variable", "")) if self.join["how"] else -1
        self.comm: Any = None
        self.bells: Bells | None = None
        self.listeners: list[socket.socket] = []
        self.welcome = Slot()

    def _belong_to(self, node: Node) -> None:
        self.node = node
        self._life = node.service(Life)
        self._links = node.service(Links)

    def run(self) -> None:
        """Join, and run calls until told to leave."""
        place = self._place()
        affinity.pin(place)
        gpus.take_share()
        if self.join["how"] == "mpirun" and self.folder:
            adopt_output(self.folder, self.rank)
        terminal.take_away(self.node)
        _become_worker(self.node, self.join.get("path") or [])
        self._go_to(self.join.get("cwd"))
        os.environ.update({**place.get("env", {}), **(self.join.get("env") or {})})
        sock = self._dial()
        if self.join.get("mark"):
            sweep_after(marked(self.join["mark"], self.rank))
        if self.is_elastic:
            guard(sock)
        address = self._listen()
        facts = {}
        if self.join["mpi"]:
            facts = self._start_mpi()
            affinity.pin(place)  # whatever MPI made of it
        else:
            singletons.leave_nothing(self.folder)
        faulthandler.enable(2, all_threads=False)  # a crash tells the line that ran
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

    def _dial(self) -> Socket:
        step = [os.environ.get(name, "") for name in self.join.get("step_variables", ())]
        hello = {
            **greeting.about(),
            "kind": "worker",
            "world": self.join["world"],
            "rank": self.rank,
            "ident": os.environ.get("HPCDIST_IDENT"),
            "step": ".".join(step) if step and all(step) else None,
        }
        try:
            sock = dialling.dial(self.join, os.path.dirname(self.file))
            greeting.dial(sock, self.cookie, hello, dialling.GREETING)
            answer = greeting.receive_hello(sock) if self.is_elastic else {}
        except OSError as exc:
            raise CannotJoin(
                f"{self.file} leads to no cluster: {exc}. Its process 1 no longer takes "
                "workers, or this host cannot reach it"
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
        self.listeners = [dialling.listen(path)]
        return path

    def _start_mpi(self) -> dict[str, Any]:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        stop_at_next_word()
        if self.join["how"] == "other" and not self.join.get("together"):
            end_at_next_word()
        if not self.folder:  # in a job, where no keeper of this host would remove it
            self._life.segments.update(segments_of(os.getpid()))
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
        temporary = os.stat(folders.temporary())
        place = f"{socket.gethostname()} {temporary.st_dev} {temporary.st_ino}"
        mine = hmac.digest(self.cookie, f"{self.join['world']} {place}".encode(), "sha256")
        every = _gathered(comm, mine)
        first = every.index(mine)
        elsewhere = [other for other in range(size) if every[other] != mine]
        self.node.progress.spans_hosts = bool(elsewhere)
        folder = os.path.join(folders.temporary(), f"hpcdist-{mine.hex()[:16]}")
        with _folder(folder) if rank == first else nullcontext():
            quiet(comm.Ibarrier())
            self.bells = Bells(folder, rank, size)
            quiet(comm.Ibarrier())
        for path in segments_of(os.getpid()):
            # Mapped by all of this host by now. Open MPI's are mapped late, if by anybody else.
            if "mpich" in path or size == 1:
                unlink(path)
                self._life.segments.discard(path)
        if elsewhere:
            where = self.bells.hang_far(self.join.get("interface"))
            bells = _gathered(comm, where.encode().ljust(_BELL_NAME))
            self.bells.reach_far({other: bells[other].decode().strip() for other in elsewhere})

    def _serve(self, sock: Socket) -> None:
        self.node.turns.serving = True
        self.node.turns.expect_main()
        self.node.start()
        link = Link(sock, self.node.progress, self.node.deliver, self._life.lost_master)
        master = Peer(1, self.node.progress)
        master.link = link
        link.peer = master
        self.node.peers[1] = master
        self.node.on(Welcome)(self._on_welcome)
        link.begin()
        self.node.progress.wait(self.welcome, time.monotonic() + float(self.join["timeout"]))
        if self.is_elastic and sys.__stderr__ is not None:  # for the user who typed the command
            print(
                f"hpcdist worker: this is worker {self.node.me} now",
                file=sys.__stderr__,
                flush=True,
            )
        signal.signal(signal.SIGINT, self.node.turns.on_sigint)
        self.node.turns.serve()
        self._life.say_goodbye()
        if self.join.get("together"):
            self._life.finalize()

    def _on_welcome(self, said: Welcome, mail: Mail) -> None:
        self.node.me = said.me
        self.node.topology = said.topology
        self.node.turns.set_limit(said.concurrency)
        if self.comm is not None:
            self._open_plane(said.first)
        self._links.cookie = self.cookie
        for listener in self.listeners:
            self._links.accept(listener, self.cookie, secure="tls" in self.join)
        if said.topology != "all_to_all":
            self.node.forbidden = self._life.forbidden
        self._life.meet(said.me, said.member)
        self.node.tune()
        output.forward(self.node)
        self.node.progress.complete(self.welcome)

    def _open_plane(self, first: int) -> None:
        self._life.open_plane(
            self.comm, self.bells, {rank: first + rank for rank in range(self.comm.size)}
        )


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


def _rank(own: str) -> int:
    """Return this process's number in its world, by the launcher's own variable or a known one."""
    known = ("HPCDIST_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    for name in (own, *known) if own else known:
        rank = whole(os.environ.get(name))
        if rank is not None:
            return rank
    return -1  # started by hand or by a manager of the user's: pid 1 gives it a number


def _become_worker(node: Node, path: Sequence[str]) -> None:
    """Make this process a blank one: no driver's `__main__`, our sys.path, stacks on demand."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
    sys.argv = [""]
    node.refusal = None
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
