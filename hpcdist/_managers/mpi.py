"""Workers that are ranks of an MPI launch, or of one that we start with `mpiexec`."""

from __future__ import annotations

import faulthandler
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hpcdist._managers import reaching, roster, secret, worker
from hpcdist._managers.base import KeptManager, Settings, WorkerConfig, keep_memory
from hpcdist._managers.door import Door
from hpcdist._managers.launch import Launch
from hpcdist._managers.launching import find_mpi
from hpcdist._managers.local import start_keeper
from hpcdist._managers.processes import segments_of, unlink
from hpcdist._monitor import output
from hpcdist._runtime.controls import INTERRUPT, LEAVE
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport import network
from hpcdist._transport.bells import Bells
from hpcdist._transport.contracts import Slot
from hpcdist._transport.link import Link
from hpcdist._wire import greeting
from hpcdist._wire.frames import CONTROL, pack

if TYPE_CHECKING:
    from hpcdist._managers.ssh import SSHManager

_GREETING = 60.0  # seconds: nodes under load take their time
_FINALIZE = 30.0

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


class MPIManager(KeptManager):
    """The other ranks of this MPI launch; or, outside of one, ranks started with `mpiexec`.

    Args:
        n: How many ranks to start; in an MPI launch the launch decides.
        hosts: Where to start them (a list of names); others than this one are reached by ssh, see
            `SSHManager` and its `isolation="world"`.
        comm: In an MPI launch: the communicator whose ranks take part.
    """

    def __init__(
        self, n: int | None = None, hosts: list[str] | None = None, comm: Any = None
    ) -> None:
        self.n = n
        self.hosts = hosts
        self.comm = comm
        self._by_ssh: SSHManager | None = None
        if hosts:
            self._go_by_ssh(hosts)

    def _go_by_ssh(self, hosts: list[str]) -> None:
        """Have hosts other than this one reached by ssh."""
        from hpcdist._managers import ssh_machines
        from hpcdist._managers.ssh import SSHManager

        if all(machine.is_here for machine in ssh_machines.read(hosts)):
            return
        each, more = divmod(self.n or 0, len(hosts))
        shares = [each + (k < more) if self.n else "auto" for k in range(len(hosts))]
        self._by_ssh = SSHManager([(h, m) for h, m in zip(hosts, shares, strict=True) if m])
        self.on_network = self.hosts_apart = True

    @property
    def inside(self) -> bool:
        """Whether this process was started by an MPI launcher."""
        return self.comm is not None or launched_size() > 1

    def prepare(self, settings: Settings) -> None:
        """Have the ranks of several hosts be one world."""
        if self._by_ssh is not None:
            settings.isolation = "world"

    def sizes(self, settings: Settings) -> Sequence[int | None]:
        """Return how many ranks there are to be, if that is known."""
        return [None] if self._by_ssh is None else self._by_ssh.sizes(settings)

    def start(self, launch: Launch) -> None:
        """Start the ranks under a keeper, with the MPI's own launcher; elsewhere, by ssh."""
        if self._by_ssh is not None:
            self._by_ssh.start(launch)
            return
        (world,) = launch.worlds
        n = self.n if self.n is not None else len(os.sched_getaffinity(0))
        mpi = find_mpi(launch.settings.python)
        settings = launch.settings
        rank = [settings.python, *settings.exeflags]
        rank += ["-m", "hpcdist", "worker", "--join", world.join_file]
        if mpi.family == "openmpi":
            where = ["--host", ",".join(f"{h}:{n}" for h in self.hosts)] if self.hosts else []
            start_keeper(world, "mpirun", n, mpi, [*where, *rank])
            return
        where = ["-hosts", ",".join(self.hosts)] if self.hosts else []
        world.ranks_may_leave = False  # hydra ends the world when a rank leaves early
        start_keeper(world, "mpirun", n, mpi, [mpi.mpiexec, *where, "-n", str(n), *rank])


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
        self.spans_hosts = here.Get_size() < self.size
        self.near_zero: bool = here.bcast(self.rank == 0)  # whether rank 0 is on this host
        self.leaving = False  # from here on a link that ends is no death
        self.cookie: bytes = self.comm.bcast(secret.use() if self.rank == 0 else None)
        secret.adopt(self.cookie)
        self.bells = self._hang_bells(here)
        # Workers added beside this world reach its ranks on other hosts there.
        self.listeners = network.listen() if self.rank and self.spans_hosts else []
        address = network.name(self.listeners) if self.listeners else ""
        self.facts: list[Any] = self.comm.allgather((socket.gethostname(), os.getpid(), address))
        here.Free()

    def _hang_bells(self, here: Any) -> Bells:
        """Share bells with the ranks of this host; no file has a name afterwards."""
        folder = tempfile.mkdtemp(prefix="hpcdist-") if here.Get_rank() == 0 else None
        folder = here.bcast(folder)
        bells = Bells(folder, self.rank, self.size)
        here.Barrier()
        if here.Get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        for path in segments_of(os.getpid()):
            if "mpich" in path:  # mapped by all of this host by now; Open MPI maps its own late
                unlink(path)
        if self.spans_hosts:
            ours = set(here.allgather(self.rank))
            places = self.comm.allgather(bells.hang_far())
            bells.reach_far({r: where for r, where in enumerate(places) if r not in ours})
        return bells

    def _check_size(self) -> None:
        asked = launched_size()
        if self.size == 1 and asked > 1:
            library, option = _library()
            raise RuntimeError(
                f"this process was started as one of {asked} ranks but its MPI world has 1: the "
                f"launcher does not match the MPI that mpi4py has loaded, which is {library}. "
                f"Under Slurm, use `srun --mpi={option}` (`srun --mpi=list` tells what there is); "
                "else, use the mpiexec of that MPI"
            )

    def members(self) -> list[tuple[int, Member]]:
        """The workers of this world."""
        return [
            (rank + 1, Member(host, os_pid, 0, rank, address=address, manager="MPIManager"))
            for rank, (host, os_pid, address) in enumerate(self.facts)
            if rank
        ]

    def close(self) -> None:
        """Forget this world, on this process."""
        progress = node.progress
        ours = {p for p in node.peers if self.rank or p <= self.size}  # not workers added beside
        for pid in ours:  # before the bells are gone: nothing is sent any more
            node.peers[pid].alive = False
        progress.detach()
        far = self.bells.far_socket
        for closing in (self.bells.socket, *self.listeners, *([far] if far is not None else [])):
            progress.unregister(closing.fileno())
        for listener in self.listeners:
            listener.close()
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


def _library() -> tuple[str, str]:
    """Return the name of the MPI that is loaded, and what `srun --mpi` should be for it."""
    from mpi4py import MPI

    name = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return name, "pmix" if "Open MPI" in name else "pmi2"


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
        _part_from_ranks()
        _send_all_away()
    worker.quiet(world.comm.Ibarrier())
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
    node.turns.restart()  # before anything can come: a block may have ended before we serve
    if world.rank:
        node.turns.expect_main()
    door = _Door(world) if world.rank == 0 else None
    told = world.comm.bcast(door.told if door else None)
    worker.open_plane(world.comm, world.bells, {r: r + 1 for r in range(world.size)})
    node.progress.spans_hosts = world.spans_hosts
    if door is not None:
        manager = MPIManager()
        roster.reserve_up_to(world.size)
        links = door.await_all()
        for pid, member in world.members():
            links[pid].peer = node.peers[pid]
            node.peers[pid].link = links[pid]
            roster.note(pid, member, manager, WorkerConfig(host=member.host))
            # Who joins later is told how to prove itself to them.
            roster.book[pid].on_network = roster.book[pid].trusts = world.spans_hosts
        node.settle()
        for link in links.values():
            link.begin()
        return
    keep_memory()
    for pid, member in world.members():
        worker.meet(pid, member)
    node.settle()
    _dial_zero(world, told)
    reaching.cookie = world.cookie
    for listener in world.listeners:
        reaching.accept_links(listener, world.cookie, secure=True)
    node.serving = True
    import signal

    signal.signal(signal.SIGINT, node.turns.on_sigint)
    output.forward()


class _Door:
    """Rank 0's: takes in the links of all other ranks, of this host and of others."""

    def __init__(self, world: _World) -> None:
        self._world = world
        self._links: dict[int, Link] = {}
        self._all_here = Slot()
        self._folder = tempfile.mkdtemp(prefix="hpcdist-")
        self._doors = [Door.on_host(os.path.join(self._folder, "w0"), self._greet)]
        if world.spans_hosts:
            self._doors.append(Door.on_network(None, self._greet))
        self.told = [door.told for door in self._doors]  # how to get here: near, and from afar

    def _greet(self, sock: Any) -> None:
        try:
            hello = greeting.accept(sock, self._world.cookie, _GREETING)
            rank = int(hello["rank"])
        except (OSError, ValueError, KeyError):  # a stranger
            sock.close()
            return
        self._links[rank + 1] = Link(sock, node.progress, node.deliver, roster.lost_link)
        if len(self._links) == self._world.size - 1:
            node.complete(self._all_here)

    def await_all(self) -> dict[int, Link]:
        """Return the links by pid once all have come."""
        try:
            if self._world.size > 1:
                node.wait(self._all_here, _GREETING)
        except TimeoutError:
            missing = sorted(set(range(2, self._world.size + 1)) - self._links.keys())
            hosts = ", ".join(sorted({self._world.facts[pid - 1][0] for pid in missing}))
            raise RuntimeError(
                f"ranks {[pid - 1 for pid in missing]} on {hosts} do not reach rank 0 at "
                f"{[told.get('addresses', told.get('socket')) for told in self.told]}"
            ) from None
        finally:
            for door in self._doors:
                door.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._links


def _dial_zero(world: _World, told: list[dict[str, Any]]) -> None:
    sock = reaching.dial(told[0] if world.near_zero else told[-1])
    greeting.dial(sock, world.cookie, {"rank": world.rank}, _GREETING)
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
    crippled = _some_have_died()
    ours = _part_from_ranks()
    _send_all_away()
    steps = ((_let_be, 1.0), (_tell_again, 0.5), (_interrupt, 1.5), (_give_up, 0.0))
    for step, patience in steps:
        left = [(record, link) for record, link in ours if link is not None and link.open]
        for record, link in left:
            step(record, link)
        if _ended_within([link for _, link in left], patience):
            break
    _world = None
    world.close()
    _finalize_if_it_can_end(crippled)


def _part_from_ranks() -> list[tuple[roster.Record, Link | None]]:
    """From here on a link that ends is no death; return the ranks with their links."""
    ours = [r for r in roster.book.values() if r.world is None and r.pid in node.peers]
    for record in ours:
        record.state = roster.State.GONE
    return [(record, node.peers[record.pid].link) for record in ours]


def _some_have_died() -> bool:
    """Whether a rank has ended that was not told to leave; then MPI_Finalize may hang."""
    return any(death.why != "removed" for death in node.members.gone.values())


def _finalize_if_it_can_end(crippled: bool) -> None:
    """At the end of rank 0's program: leave MPI; or end this process, where that would hang."""
    from mpi4py import MPI

    if crippled:
        worker.leave(1)
    faulthandler.dump_traceback_later(_FINALIZE, exit=True)
    MPI.Finalize()
    faulthandler.cancel_dump_traceback_later()


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


def _tell_again(record: roster.Record, link: Link) -> None:
    """MPI between hosts may be slow with a first message; the link is not."""
    _send_by_link(link, LEAVE)


def _interrupt(record: roster.Record, link: Link) -> None:
    """Interrupt a rank, also a parked one, whose outbox is closed."""
    _send_by_link(link, INTERRUPT)


def _send_by_link(link: Link, op: int) -> None:
    message, _ = pack(CONTROL, 0, 0, op)
    node.progress.call_later(0, lambda: link.send([message]))


def _give_up(record: roster.Record, link: Link) -> None:
    """End the world as a whole, for a rank that is stuck in C: only so does nothing hang."""
    from mpi4py import MPI

    member = record.member
    print(f"worker {record.pid} on {member.host} is stuck and does not leave", file=sys.stderr)
    sys.stdout.flush()
    output.await_reader(2, 0.5)  # a launcher that is told to abort reads no more
    MPI.COMM_WORLD.Abort(1)


def _finish_rank() -> NoReturn:
    """Leave with the world: MPI_Finalize, guarded, as it hangs when a rank has died."""
    from mpi4py import MPI

    output.restore()
    world = _world
    assert world is not None
    world.leaving = True
    worker._say_goodbye()
    crippled = _some_have_died()
    world.close()
    node.progress.stop()
    sys.stdout.flush()
    if crippled:
        worker.leave(0)
    faulthandler.dump_traceback_later(_FINALIZE, exit=True)
    MPI.Finalize()
    worker.leave(0, by_libc=True)


if launched_size() > 1 and not node.serving and node.me == 1:
    node.refusal = _REFUSAL.format(size=launched_size())
