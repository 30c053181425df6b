"""Workers that are ranks of an MPI launch, or of one that we start with `mpiexec`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from typing import Any, NoReturn

from hpcdist._managers import roster, secret, worker
from hpcdist._managers.base import ClusterManager, WorkerConfig
from hpcdist._managers.launch import Launch
from hpcdist._managers.launching import find_mpi
from hpcdist._managers.local import start_keeper
from hpcdist._managers.processes import segments_of, unlink
from hpcdist._monitor import output
from hpcdist._runtime.controls import INTERRUPT, LEAVE
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.bells import Bells
from hpcdist._transport.link import Link
from hpcdist._transport.progress import Slot
from hpcdist._wire import greeting
from hpcdist._wire.frames import CONTROL, pack

_REFUSAL = (
    "this is one of {size} ranks of an MPI launch: call hpcdist.init() (or enter "
    "hpcdist.cluster(hpcdist.MPIManager())) first, so that rank 0 becomes process 1 and the "
    "others its workers"
)


def launched_size() -> int:
    """How many ranks the MPI launch has that started this process; 1 without one."""
    environ = os.environ
    sizes = {
        "PMI_RANK": "PMI_SIZE",
        "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
        "PMIX_RANK": "OMPI_COMM_WORLD_SIZE",
    }
    for rank, size in sizes.items():
        if rank in environ:
            return int(environ.get(size) or environ.get("SLURM_STEP_NUM_TASKS") or 2)
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in environ:
        return int(environ["SLURM_STEP_NUM_TASKS"])
    return 1


class MPIManager(ClusterManager):
    """The other ranks of this MPI launch; or, outside of one, ranks started with `mpiexec`.

    Args:
        n: How many ranks to start; in an MPI launch the launch decides.
        hosts: Where to start them (a list of names).
        comm: In an MPI launch: the communicator whose ranks take part.
    """

    own_params = ()

    def __init__(
        self, n: int | None = None, hosts: list[str] | None = None, comm: Any = None
    ) -> None:
        self.n = n
        self.hosts = hosts
        self.comm = comm

    @property
    def inside(self) -> bool:
        """Whether this process was started by an MPI launcher."""
        return self.comm is not None or launched_size() > 1

    def start(self, launch: Launch) -> None:
        """Start the ranks under a keeper, with the MPI's own launcher."""
        n = self.n if self.n is not None else len(os.sched_getaffinity(0))
        mpi = find_mpi(launch.settings.python)
        settings = launch.settings
        rank = [settings.python, *settings.exeflags]
        rank += ["-m", "hpcdist", "worker", "--join", launch.join_file]
        if mpi.family == "openmpi":
            where = ["--host", ",".join(f"{h}:{n}" for h in self.hosts)] if self.hosts else []
            start_keeper(launch, "mpirun", n, mpi, [*where, *rank])
            return
        where = ["-hosts", ",".join(self.hosts)] if self.hosts else []
        launch.ranks_may_leave = False  # hydra ends the world when a rank leaves early
        start_keeper(launch, "mpirun", n, mpi, [mpi.mpiexec, *where, "-n", str(n), *rank])


class _World:
    """This process in an MPI launch."""

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError("MPI was initialised without MPI_THREAD_MULTIPLE, which is needed")
        self.comm = (comm if comm is not None else MPI.COMM_WORLD).Dup()
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank: int = self.comm.Get_rank()
        self.size: int = self.comm.Get_size()
        self._check_size()
        here = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        folder = tempfile.mkdtemp(prefix="hpcdist-") if here.Get_rank() == 0 else None
        self.folder: str = here.bcast(folder)
        self.first_here: bool = here.Get_rank() == 0
        self.spans_hosts = here.Get_size() < self.size
        near_zero = here.bcast(self.rank == 0)  # whether rank 0 is on this host
        self.leaving = False  # from here on a link that ends is no death
        self.cookie: bytes = self.comm.bcast(secret.use() if self.rank == 0 else None)
        secret.adopt(self.cookie)
        self.bells = Bells(self.folder, self.rank, self.size)
        facts = (socket.gethostname(), os.getpid(), os.path.join(self.folder, f"w{self.rank}"))
        self.facts: list[Any] = self.comm.allgather((*facts, near_zero))
        here.Free()

    def _check_size(self) -> None:
        asked = launched_size()
        if self.size == 1 and asked > 1:
            raise RuntimeError(
                f"this process was started as one of {asked} ranks but its MPI world has 1: the "
                "launcher and the library that mpi4py loads do not match (under Slurm: another "
                "--mpi, see `srun --mpi=list`)"
            )

    def members(self) -> list[tuple[int, Member]]:
        """The workers of this world."""
        return [
            (rank + 1, Member(host, os_pid, 0, rank, address=address, manager="MPIManager"))
            for rank, (host, os_pid, address, _) in enumerate(self.facts)
            if rank
        ]

    def close(self) -> None:
        """Forget this world, on this process."""
        progress = node.progress
        ours = {p for p in node.peers if self.rank or p <= self.size}  # not workers added beside
        for pid in ours:  # before the bells are gone: nothing is sent any more
            node.peers[pid].alive = False
        progress.detach()
        progress.unregister(self.bells.socket.fileno())
        self.bells.close()
        for pid in ours:
            link = node.peers[pid].link
            if link is not None:
                link.close()
        for ident, waiter in list(node.pending.items()):
            if waiter.where in ours:
                node.fail(ident, waiter)
        for pid in ours:
            del node.peers[pid]
            node.members.living.pop(pid, None)
        node.members.living.pop(node.me, None)
        for pid in range(1, self.size + 1):  # a rank that was parked may be back in the next world
            node.members.gone.pop(pid, None)
        if self.first_here:
            shutil.rmtree(self.folder, ignore_errors=True)


_world: _World | None = None


def inside_world() -> bool:
    """Whether this process is in a world that an MPI launcher started."""
    return _world is not None


def enter(comm: Any) -> None:
    """Rank 0 becomes process 1; the others serve until it ends, and never return."""
    _open(comm)
    assert _world is not None
    if _world.rank:
        node.turns.serve()
        _finish_rank()


def enter_block(comm: Any) -> list[int] | None:
    """Rank 0 gets the workers' pids; the others serve, and get None when rank 0 has left."""
    _open(comm)
    assert _world is not None
    if not _world.rank:
        return sorted(node.members.living)
    node.turns.serve()
    _world.leaving = True
    output.restore()
    return None


def leave_block() -> None:
    """Leave the block, on every rank."""
    global _world
    world = _world
    if world is None:
        return
    if not world.rank:
        _send_all_away()
        for record in list(roster.book.values()):  # a link that ends now is no death
            if record.launch is None:
                record.state = roster.State.GONE
    _quiet(world.comm.Ibarrier())
    _world = None
    node.serving = False
    node.turns.restart()
    world.close()
    world.comm.Free()
    node.me = 1
    if launched_size() > 1:
        node.refusal = _REFUSAL.format(size=launched_size())


def _open(comm: Any) -> None:
    global _world
    node.refusal = None
    _world = world = _World(comm)
    node.me = world.rank + 1
    node.start()
    listener = worker.listen(os.path.join(world.folder, f"w{world.rank}"))
    near = [r for r, facts in enumerate(world.facts) if facts[3] and r]
    worker.open_plane(world.comm, world.bells, {r: r + 1 for r in range(world.size)})
    node.progress.spans_hosts = world.spans_hosts
    if world.rank == 0:
        links = _accept_links(listener, world.cookie, near)
        manager = MPIManager()
        roster.reserve_up_to(world.size)
        for pid, member in world.members():
            node.peers[pid].link = links.get(pid)
            roster.note(pid, member, manager, WorkerConfig(host=member.host))
        for link in links.values():
            link.begin()
        listener.close()
        return
    for pid, member in world.members():
        worker.meet(pid, member)
    if world.rank in near:
        _dial_zero(world)
    worker._greetings["cookie"] = world.cookie
    worker.accept_links(listener, world.cookie)
    node.serving = True
    node.turns.restart()
    import signal

    signal.signal(signal.SIGINT, node.turns.on_sigint)
    output.forward()


def _accept_links(listener: socket.socket, cookie: bytes, near: list[int]) -> dict[int, Link]:
    links = {}
    listener.setblocking(True)
    listener.settimeout(60)
    for _ in near:
        sock, _address = listener.accept()
        hello = greeting.accept(sock, cookie, 60)
        link = Link(sock, node.progress, node.deliver, roster.lost_link)
        pid = int(hello["rank"]) + 1
        link.peer = node.peers[pid]
        links[pid] = link
    return links


def _dial_zero(world: _World) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + 60
    while True:
        try:
            sock.connect(world.facts[0][2])
            break
        except (FileNotFoundError, ConnectionRefusedError):  # rank 0 has not come so far yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    greeting.dial(sock, world.cookie, {"rank": world.rank}, 60)
    link = Link(sock, node.progress, node.deliver, lambda link: _lost_zero(world, link))
    link.peer = node.peers[1]
    node.peers[1].link = link
    link.begin()


def _lost_zero(world: _World, link: Link) -> None:
    if not world.leaving:
        worker._lost_master(link)


def _send_all_away() -> None:
    """Tell every rank that still runs, also the parked ones, to leave."""
    world = _world
    assert world is not None
    message, _ = pack(CONTROL, 0, 0, LEAVE)
    peers = [node.peers[rank + 1] for rank in range(1, world.size)]
    plane = node.progress.plane
    for peer in peers:
        if peer.alive:
            peer.post(message)
    sent = Slot()

    def send_to_parked() -> None:  # their outboxes are closed
        for peer in peers:
            if not peer.alive and peer.plane is not None:
                peer.plane.send(peer.rank, [message])
        node.complete(sent)

    node.progress.nudge()
    node.progress.call_later(0, send_to_parked)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            node.wait(sent, 0.2)
            if not node.progress.dirty and not (plane is not None and plane.busy()):
                return
            node.wait(Slot(), 0.002)
        except TimeoutError:
            pass


def leave_world() -> None:
    """On rank 0, at the end of the program: let the other ranks go to MPI_Finalize."""
    global _world
    world = _world
    if world is None or world.rank:
        return
    near = [(r, node.peers[r.pid].link) for r in roster.book.values() if r.launch is None]
    _send_all_away()
    for step, patience in ((_let_be, 1.0), (_interrupt, 1.5), (_kill, 1.5)):
        left = [(record, link) for record, link in near if link is not None and link.open]
        for record, link in left:
            step(record, link)
        if _ended_within([link for _, link in left], patience):
            break
    _world = None
    world.close()


def _ended_within(links: list[Link], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(link.open for link in links):
        if time.monotonic() > deadline:
            return False
        try:
            node.wait(Slot(), 0.002)
        except TimeoutError:
            pass
    return True


def _let_be(record: roster.Record, link: Link) -> None:
    """An idle rank leaves as it was told."""


def _interrupt(record: roster.Record, link: Link) -> None:
    """Interrupt a rank, also a parked one, whose outbox is closed."""
    message, _ = pack(CONTROL, 0, 0, INTERRUPT)
    node.progress.call_later(0, lambda: link.send([message]))


def _kill(record: roster.Record, link: Link) -> None:
    """A rank that is stuck in C: the launcher ends the world with it, and nothing hangs."""
    assert _world is not None
    # It may end us as well, at once, and a killed world leaves its files behind.
    for path in segments_of(record.member.os_pid):
        unlink(path)
    shutil.rmtree(_world.folder, ignore_errors=True)
    try:
        os.kill(record.member.os_pid, 9)
    except OSError:
        pass


def _quiet(request: Any) -> None:
    """Wait for a request without spinning."""
    pause = 0.0001
    while not request.Test():
        time.sleep(pause)
        pause = min(pause * 2, 0.01)


def _finish_rank() -> NoReturn:
    """Leave with the world: MPI_Finalize, guarded, as it hangs when a rank has died."""
    import faulthandler

    from mpi4py import MPI

    output.restore()
    world = _world
    assert world is not None
    world.leaving = True
    worker._say_goodbye()
    world.close()
    node.progress.stop()
    sys.stdout.flush()
    faulthandler.dump_traceback_later(30, exit=True)
    MPI.Finalize()
    worker.leave(0, by_libc=True)


if launched_size() > 1 and not node.serving and node.me == 1:
    node.refusal = _REFUSAL.format(size=launched_size())
