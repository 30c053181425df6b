"""Workers that are ranks of an MPI launch, or of one that we start with `mpiexec`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from typing import Any, NoReturn

from hpcdist._managers import roster, worker
from hpcdist._managers.base import ClusterManager, WorkerConfig
from hpcdist._managers.launch import Launch
from hpcdist._managers.launching import find_mpi
from hpcdist._managers.local import start_keeper
from hpcdist._monitor import output
from hpcdist._runtime.controls import LEAVE
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
        self.cookie: bytes = self.comm.bcast(os.urandom(16) if self.rank == 0 else None)
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
        progress.detach()
        progress.unregister(self.bells.socket.fileno())
        self.bells.close()
        for peer in node.peers.values():
            if peer.link is not None:
                peer.link.close()
        node.peers.clear()
        node.members.living.clear()
        if self.first_here:
            shutil.rmtree(self.folder, ignore_errors=True)


_world: _World | None = None
_parked: set[int] = set()


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
    _quiet(world.comm.Ibarrier())
    _world = None
    node.serving = False
    node.turns.restart()
    for record in list(roster.book.values()):
        if record.manager.__class__ is MPIManager and record.launch is None:
            record.state = roster.State.GONE
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
    worker.node.turns.restart()
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
    link = Link(sock, node.progress, node.deliver, worker._lost_master)
    link.peer = node.peers[1]
    node.peers[1].link = link
    link.begin()


def _send_all_away() -> None:
    """Tell every rank that still runs, also the parked ones, to leave."""
    world = _world
    assert world is not None
    plane = node.progress.plane
    message, _ = pack(CONTROL, 0, 0, LEAVE)
    node.progress.nudge()
    for rank in range(1, world.size):
        peer = node.peers.get(rank + 1)
        if peer is not None and peer.plane is plane and peer.plane is not None:
            peer.post(message)
            if not peer.alive:  # parked: its outbox is closed
                peer.drop()
                node.progress.call_later(0, lambda p=peer: p.plane.send(p.rank, [message]))  # type: ignore[misc]
    _settle(lambda: not node.progress._timers and not node.progress.dirty)


def _settle(done: Any) -> None:
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            node.wait(Slot(), 0.002)
        except TimeoutError:
            pass
        if done():
            return


def leave_world() -> None:
    """On rank 0, at the end of the program: let the other ranks go to MPI_Finalize."""
    global _world
    world = _world
    if world is None or world.rank:
        return
    busy = [r for r in roster.book.values() if r.launch is None and r.config.userdata is None]
    slots = [(r, roster.slot_of_end(r)) for r in busy if node.peers[r.pid].link is not None]
    _send_all_away()
    for step in (None, roster.interrupt_now, _kill):
        for record, slot in slots:
            if step is not None and slot is not None and not slot.ready:
                step(record)
        if _gone_within(slots, 1.0 if step is None else 1.5):
            break
    _world = None
    world.close()


def _gone_within(slots: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    for _, slot in slots:
        if slot is None:
            continue
        try:
            node.wait(slot, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return False
    return True


def _kill(record: roster.Record) -> None:
    """A rank that is stuck in C: the launcher ends the world with it, and nothing hangs."""
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
    worker._say_goodbye()
    world.close()
    node.progress.stop()
    sys.stdout.flush()
    faulthandler.dump_traceback_later(30, exit=True)
    MPI.Finalize()
    worker.leave(0, by_libc=True)


if launched_size() > 1 and not node.serving and node.me == 1:
    node.refusal = _REFUSAL.format(size=launched_size())
