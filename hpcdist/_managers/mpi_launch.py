"""The ranks of an MPI launch as a cluster: rank 0 becomes process 1, the others its workers."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from hpcdist._cluster.listener import Listener
from hpcdist._cluster.roster import Record, Roster, State
from hpcdist._contract.managers import ClusterManager, WorkerConfig, keep_memory
from hpcdist._contract.secret import Secret
from hpcdist._keeper import folders
from hpcdist._keeper.processes import segments_of, unlink
from hpcdist._monitor import output, terminal
from hpcdist._runtime.node import Node, Service
from hpcdist._transport import network
from hpcdist._transport.bells import Bells
from hpcdist._transport.contracts import Slot, Way
from hpcdist._transport.link import Link
from hpcdist._wire import greeting, messages
from hpcdist._wire.greeting import Hello, Socket
from hpcdist._wire.member import Member
from hpcdist._wire.messages import Interrupt, Leave
from hpcdist._worker import gpus
from hpcdist._worker.dialling import Links, dial
from hpcdist._worker.life import Life
from hpcdist._worker.worker import quiet

if TYPE_CHECKING:
    from mpi4py import MPI

_GREETING = 60.0  # seconds: nodes under load take their time
_FINALIZE = 30.0

_REFUSAL = (
    "this is one of {size} ranks of an MPI launch: call hpcdist.init() (or enter "
    "hpcdist.cluster(hpcdist.MPIManager())) first, so that rank 0 becomes process 1 and the "
    "others its workers"
)


def _crowding() -> float:
    """Say how much longer this host takes for all it does than one with nothing else to do."""
    return min(5.0, max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0))))


def launched_size() -> int:
    """Return how many ranks the MPI launch has that started this process; 1 without one."""
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


class MpiWorld:
    """This process in an MPI launch."""

    def __init__(self, node: Node, comm: MPI.Intracomm | None, tags: tuple[str, ...] = ()) -> None:
        from mpi4py import MPI

        self._node = node

        if MPI.Is_finalized():
            raise RuntimeError("the other ranks of this MPI launch have left, as MPI has ended")
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
        self.give_terminal_back: Callable[[], None] = lambda: None
        secret = node.service(Secret)
        self.is_whole = False  # every rank has come to rank 0
        self.leaving = False  # from here on a link that ends is no death
        self.cookie: bytes = self.comm.bcast(secret.use() if self.rank == 0 else None)
        secret.adopt(self.cookie)
        self.bells = self._hang_bells(here)
        # Workers added beside this world reach its ranks on other hosts there.
        self.listeners = network.listen() if self.rank and self.spans_hosts else []
        address = network.name(self.listeners) if self.listeners else ""
        self.tags: tuple[str, ...] = self.comm.bcast(tags)  # what rank 0 says
        self.facts: list[Any] = self.comm.allgather((socket.gethostname(), os.getpid(), address))
        here.Free()

    def _hang_bells(self, here: Any) -> Bells:
        """Share bells with the ranks of this host; no file has a name afterwards."""
        folder = folders.private() if here.Get_rank() == 0 else None
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
                f"Under Slurm, use `srun --mpi={option}` (`srun --mpi=list` lists what there is); "
                "else, use the mpiexec of that MPI"
            )

    def members(self) -> list[tuple[int, Member]]:
        """Return the workers of this world."""
        common: dict[str, Any] = {"manager": "MPIManager", "tags": self.tags}
        return [
            (rank + 1, Member(host, os_pid, 0, rank, address=address, **common))
            for rank, (host, os_pid, address) in enumerate(self.facts)
            if rank
        ]

    def close(self) -> None:
        """Forget this world, on this process."""
        progress = self._node.progress
        # Not workers that were added beside.
        ours = {p for p in self._node.peers if self.rank or p <= self.size}
        for pid in ours:  # before the bells are gone: nothing is sent any more
            self._node.peers[pid].alive = False
        progress.detach()
        far = self.bells.far_socket
        for closing in (self.bells.socket, *self.listeners, *([far] if far is not None else [])):
            progress.unregister(closing.fileno())
        for listener in self.listeners:
            listener.close()
        self.bells.close()
        for pid in ours:
            link = self._node.peers[pid].link
            if link is not None:
                link.close()
        for ident, waiter in list(self._node.pending.items()):
            if waiter.where in ours:
                self._node.fail(ident, waiter)
        for pid in ours:
            del self._node.peers[pid]
            self._node.members.living.pop(pid, None)
        self._node.members.living.pop(self._node.me, None)
        for pid in range(1, self.size + 1):  # a rank that was parked may be back in the next world
            self._node.members.gone.pop(pid, None)


def _library() -> tuple[str, str]:
    """Return the name of the MPI that is loaded, and what `srun --mpi` should be for it."""
    from mpi4py import MPI

    name = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return name, "pmix" if "Open MPI" in name else "pmi2"


class RankListener:
    """Rank 0's: takes in the links of all other ranks, of this host and of others."""

    def __init__(self, node: Node, world: MpiWorld) -> None:
        self._node = node
        self._world = world
        self._links: dict[int, Link] = {}
        self._all_here = Slot()
        self._folder = folders.private()
        self._doors = [
            Listener.on_host(node, os.path.join(self._folder, "w0"), world.cookie, self._greet)
        ]
        if world.spans_hosts:
            self._doors.append(Listener.on_network(node, None, world.cookie, self._greet))
        self.told = [door.told for door in self._doors]  # how to get here: near, and from afar

    def _greet(self, sock: Socket, hello: Hello) -> None:
        rank = int(hello["rank"])
        lost = self._node.service(Roster).lost_link
        self._links[rank + 1] = Link(sock, self._node.progress, self._node.deliver, lost)
        if len(self._links) == self._world.size - 1:
            self._node.complete(self._all_here)

    def await_all(self) -> dict[int, Link]:
        """Return the links by pid once all have come."""
        try:
            if self._world.size > 1:
                self._node.wait(self._all_here, _GREETING)
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


class MpiLaunch(Service):
    """The MPI launch that has started this process, if one has: its ranks become workers."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.world: MpiWorld | None = None  # once the ranks are workers
        self._roster = node.service(Roster)
        self._life = node.service(Life)
        self._links = node.service(Links)

    def refuse_others(self) -> None:
        """Refuse our API until rank 0 is process 1: else each rank would be one."""
        node = self.node
        if launched_size() > 1 and not node.turns.serving and node.me == 1:
            node.refusal = _REFUSAL.format(size=launched_size())

    def inside_world(self) -> bool:
        """Tell whether this process is in a world that an MPI launcher started."""
        return self.world is not None

    def enter(
        self,
        manager: ClusterManager,
        comm: MPI.Intracomm | None,
        tags: tuple[str, ...] = (),
    ) -> None:
        """Make rank 0 process 1; the others serve until it ends, and never return."""
        if self.inside_world():
            return
        self._open(manager, comm, tags)
        assert self.world is not None
        if self.world.rank:
            self.node.turns.serve()
            self._finish_rank()

    def enter_block(
        self, manager: ClusterManager, comm: MPI.Intracomm | None, tags: tuple[str, ...]
    ) -> list[int] | None:
        """Return the workers' pids on rank 0; the others serve, and get None once it has left."""
        self._open(manager, comm, tags)
        assert self.world is not None
        if not self.world.rank:
            return sorted(self.node.members.living)
        self.node.turns.serve()
        self.world.leaving = True
        output.restore()
        self.world.give_terminal_back()
        return None

    def leave_block(self) -> None:
        """Leave the block, on every rank."""
        world = self.world
        if world is None:
            return
        if not world.rank:
            self._part_from_ranks()
            self._send_all_away()
        quiet(world.comm.Ibarrier())
        self.world = None
        self.node.turns.serving = False
        self.node.turns.restart()
        world.close()
        world.comm.Free()
        self.node.me = 1
        if launched_size() > 1:
            self.node.refusal = _REFUSAL.format(size=launched_size())

    def _open(
        self, manager: ClusterManager, comm: MPI.Intracomm | None, tags: tuple[str, ...]
    ) -> None:
        self.node.refusal = None
        gpus.take_share()  # before MPI, which may look at them
        self.world = world = MpiWorld(self.node, comm, tags)
        self.node.me = world.rank + 1
        self.node.start()
        self.node.turns.restart()  # at once: a block may have ended before we serve
        if world.rank:
            self.node.turns.expect_main()
        door = RankListener(self.node, world) if world.rank == 0 else None
        told = world.comm.bcast(door.told if door else None)
        self._life.open_plane(world.comm, world.bells, {r: r + 1 for r in range(world.size)})
        self.node.progress.spans_hosts = world.spans_hosts
        if door is not None:
            self._roster.reserve_up_to(world.size)
            links = door.await_all()
            world.is_whole = True
            for pid, member in world.members():
                links[pid].peer = self.node.peers[pid]
                self.node.peers[pid].link = links[pid]
                config = WorkerConfig(host=member.host)
                record = self._roster.note(pid, member, manager, config)
                # Workers that join later learn how to prove themselves to them.
                record.on_network = record.trusts = world.spans_hosts
            self.node.tune()
            for link in links.values():
                link.begin()
            return
        keep_memory()
        for pid, member in world.members():
            self._life.meet(pid, member)
        self.node.tune()
        self._dial_zero(world, told)
        self._links.cookie = world.cookie
        for listener in world.listeners:
            self._links.accept(listener, world.cookie, secure=True)
        self.node.turns.serving = True
        signal.signal(signal.SIGINT, self.node.turns.on_sigint)
        output.forward(self.node)
        world.give_terminal_back = terminal.set_aside(self.node)

    def _dial_zero(self, world: MpiWorld, told: list[dict[str, Any]]) -> None:
        sock = dial(told[0] if world.near_zero else told[-1])
        greeting.dial(sock, world.cookie, {"rank": world.rank}, _GREETING)
        lost = partial(self._lost_zero, world)
        link = Link(sock, self.node.progress, self.node.deliver, lost)
        link.peer = self.node.peers[1]
        self.node.peers[1].link = link
        link.begin()

    def _lost_zero(self, world: MpiWorld, link: Link) -> None:
        if not world.leaving:
            self._life.lost_master(link)

    def _send_all_away(self) -> None:
        """Tell every rank that still runs, also the parked ones, to leave."""
        world = self.world
        assert world is not None
        message, _ = messages.packed(Leave())
        peers = [self.node.peers[rank + 1] for rank in range(1, world.size)]
        plane = self.node.progress.plane
        for peer in peers:
            if peer.alive:
                peer.post(message)
        sent = Slot()

        def send_to_parked() -> None:  # their outboxes are closed
            for peer in peers:
                if not peer.alive and peer.plane is not None:
                    peer.plane.send(peer.rank, [message])
            self.node.complete(sent)

        self.node.progress.nudge()
        self.node.progress.call_later(0, send_to_parked)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            try:
                self.node.wait(sent, 0.2)
                if not self.node.progress.dirty and not (plane is not None and plane.busy()):
                    return
                self.node.wait(Slot(), 0.002)
            except TimeoutError:
                pass

    def leave_world(self) -> None:
        """Let the other ranks go to MPI_Finalize: on rank 0, at the end of the program."""
        world = self.world
        if world is None or world.rank:
            return
        if not world.is_whole:  # MPI may never return from a send to a rank that has not come
            self._life.leave(1)
        crippled = self._some_have_died()
        ours = self._part_from_ranks()
        self._send_all_away()
        for record, _ in ours:
            # From here on by links alone: MPI may never return from a send to a rank that is
            # busy, or in MPI_Finalize (MPICH over TCP, where the two have not met before).
            self.node.peers[record.pid].alive = False
            self.node.peers[record.pid].drop()
        steps = (
            (self._let_be, 1.0),
            (self._send_again, 0.5),
            (self._interrupt, 1.5),
            (self._give_up, 0.0),
        )
        for step, patience in steps:
            left = [(record, link) for record, link in ours if link is not None and link.open]
            for record, link in left:
                step(record, link)
            if self._ended_within([link for _, link in left], patience * _crowding()):
                break
        self.world = None
        world.close()
        self._finalize_if_it_can_end(crippled)

    def _part_from_ranks(self) -> list[tuple[Record, Way | None]]:
        """Take the end of a link for no death from now on; return the ranks with their links."""
        peers = self.node.peers
        ours = [r for r in self._roster.book.values() if r.world is None and r.pid in peers]
        for record in ours:
            record.move_to(State.GONE)
        return [(record, self.node.peers[record.pid].link) for record in ours]

    def _some_have_died(self) -> bool:
        """Tell whether a rank ended that was not told to leave; then MPI_Finalize may hang."""
        return any(death.why != "removed" for death in self.node.members.gone.values())

    def _finalize_if_it_can_end(self, crippled: bool) -> None:
        """Leave MPI at the end of rank 0's program; or end this process, where that would hang."""
        from mpi4py import MPI

        if crippled:
            self._life.leave(1)
        faulthandler.dump_traceback_later(_FINALIZE, exit=True)
        MPI.Finalize()
        faulthandler.cancel_dump_traceback_later()

    def _ended_within(self, links: list[Way], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any(link.open for link in links):
            if time.monotonic() > deadline:
                return False
            try:
                self.node.wait(Slot(), 0.002)
            except TimeoutError:
                pass
        return True

    def _let_be(self, record: Record, link: Way) -> None:
        """Do nothing: an idle rank leaves as it was told."""

    def _send_again(self, record: Record, link: Way) -> None:
        """Say it by the link too: MPI between hosts may be slow with a first message."""
        self._send_by_link(link, Leave())

    def _interrupt(self, record: Record, link: Way) -> None:
        """Interrupt a rank, also a parked one, whose outbox is closed."""
        self._send_by_link(link, Interrupt())

    def _send_by_link(self, link: Way, message: NamedTuple) -> None:
        data, _ = messages.packed(message)
        self.node.progress.call_later(0, lambda: link.send([data]))

    def _give_up(self, record: Record, link: Way) -> None:
        """End the world as a whole, for a rank that is stuck in C: only so does nothing hang."""
        from mpi4py import MPI

        member = record.member
        print(f"worker {record.pid} on {member.host} is stuck and does not leave", file=sys.stderr)
        sys.stdout.flush()
        output.await_reader(2, 0.5)  # a launcher that is told to abort reads no more
        MPI.COMM_WORLD.Abort(1)

    def _finish_rank(self) -> NoReturn:
        """Leave with the world: MPI_Finalize, guarded, as it hangs when a rank has died."""
        from mpi4py import MPI

        output.restore()
        world = self.world
        assert world is not None
        world.leaving = True
        self._life.say_goodbye()
        crippled = self._some_have_died()
        world.close()
        self.node.progress.stop()
        sys.stdout.flush()
        if crippled:  # not 0: MPICH's launcher may say the code of who ends last
            self._life.leave(1)
        faulthandler.dump_traceback_later(_FINALIZE, exit=True)
        MPI.Finalize()
        self._life.leave(0, by_libc=True)
