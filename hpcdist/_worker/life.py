"""A worker's life: whom it gets to know, what process 1 tells it, how it ends."""

from __future__ import annotations

import faulthandler
import sys
from typing import Any, NoReturn

from hpcdist import _errors
from hpcdist._keeper.processes import unlink
from hpcdist._monitor import output
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import References
from hpcdist._runtime.running import Runners
from hpcdist._transport.bells import Bells
from hpcdist._transport.contracts import Slot, Way
from hpcdist._transport.router import Peer
from hpcdist._wire import frames, messages
from hpcdist._wire.member import Member
from hpcdist._wire.messages import (
    AskStatus,
    Condition,
    DeathNotice,
    Died,
    Farewell,
    JobEnds,
    Joined,
    Leave,
    Left,
    Park,
)
from hpcdist._worker.dialling import Links

_FINALIZE = 5.0
_OWNERS = 0.5  # seconds for owners of channels to answer; one that leaves as well may not


class Life(Service):
    """This process's life as a worker: whom it gets to know, what process 1 tells it, its end."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._others_stay = False
        self.segments: set[str] = set()  # shared memory of ours that MPI removes in MPI_Finalize
        self._links = node.service(Links)

    def meet(self, pid: int, member: Member) -> None:
        """Take a worker in among those we know."""
        if pid in self.node.members.gone:
            return
        self.node.members.add(pid, member)
        if pid == self.node.me:
            return
        peer = self.node.peers.get(pid)
        if peer is None:
            peer = self.node.peers[pid] = Peer(pid, self.node.progress)
        peer.reach = self._links.reach
        for fn in self.node.on_join:
            fn(pid)

    def open_plane(self, comm: Any, bells: Bells | None, pids: dict[int, int]) -> None:
        """Start the MPI side of this process: the other ranks become its peers."""
        from hpcdist._transport.mpi import MpiPlane

        plane = MpiPlane(comm, self.node.deliver, bells)
        for rank, pid in pids.items():
            if pid == self.node.me:
                continue
            peer = self.node.peers.get(pid)
            if peer is None:
                peer = self.node.peers[pid] = Peer(pid, self.node.progress)
            peer.plane, peer.rank = plane, rank
            plane.peers[rank] = peer
        if bells is not None:
            self.node.progress.register(bells.socket.fileno(), bells.hear, 1)
            if bells.far_socket is not None:

                def rung_from_afar(events: int) -> None:
                    bells.hear_far(events)
                    self.node.progress.stay_alert()

                self.node.progress.register(bells.far_socket.fileno(), rung_from_afar, 1)
        self.node.progress.plane = plane

    def lost_master(self, link: Way) -> None:
        """End this process: pid 1 is gone."""
        self.leave(1)

    def forbidden(self, pid: int) -> str | None:
        """Say why this process and another may not talk to each other; None: they may."""
        if pid == 1:
            return None
        me, other = self.node.members.living.get(self.node.me), self.node.members.living.get(pid)
        if me is not None and other is not None and self.node.topology == "custom":
            linked = other.ident in me.connect or me.ident in other.connect
            if linked:
                return None
        topology = self.node.topology
        return f"process {pid} is not connected to {self.node.me}: the topology is {topology}"

    # What pid 1 tells

    @on(Joined)
    def _on_joined(self, said: Joined, mail: Mail) -> None:
        for pid, member in said.members:
            self.meet(pid, member)
        self.node.tune()

    @on(Left)
    def _on_left(self, said: Left, mail: Mail) -> None:
        for pid in said.pids:
            self.node.members.living.pop(pid, None)

    @on(Died)
    def _on_died(self, said: Died, mail: Mail) -> None:
        for death in said.deaths:
            self._note_death(death)

    def _note_death(self, death: DeathNotice) -> None:
        if death.pid == self.node.me:  # we were given up
            self.leave(1)
        known = self.node.members.gone.get(death.pid)
        if known is not None:
            known.amend(death.why)
        else:
            self.node.died(death.pid, _errors.ProcessExitedException(*death))

    @on(JobEnds)
    def _on_job_ends(self, said: JobEnds, mail: Mail) -> None:
        self.node.members.note_ends(said.ends)

    @on(Leave)
    def _on_leave(self, said: Leave, mail: Mail) -> None:
        self._others_stay = said.others_stay
        self.node.turns.stop()

    @on(Park)
    def _on_park(self, said: Park, mail: Mail) -> None:
        self.node.turns.drop_queue()

    @on(AskStatus)
    def _on_ask_status(self, said: AskStatus, mail: Mail) -> None:
        runners, references = self.node.service(Runners), self.node.service(References)
        condition = Condition(*runners.counts, output.rss(), runners.begun, references.lent)
        self.node.reply(mail.peer, mail.ident, frames.OK, messages.encode(condition))

    # Leaving

    def say_goodbye(self) -> None:
        """Hand everything unsent to the kernel; wait until owners of channels know what came."""
        sys.stdout.flush()
        sys.stderr.flush()
        master = self.node.peers[1]
        now = self.node.machine.now
        deadline = now() + 1.0
        if self._others_stay:
            self._await_owners(now() + _OWNERS)
        while now() < deadline:
            self.node.progress.nudge()
            link = master.link
            if not master.outbox and (link is None or link.idle or not link.open):
                break
            try:
                self.node.progress.wait(Slot(), now() + 0.01)
            except TimeoutError:
                pass

    def _await_owners(self, deadline: float) -> None:
        """See that our acknowledgements overtake the word of our end, or items come twice."""
        self.node.progress.nudge()
        owners = [p.pid for p in list(self.node.peers.values()) if p.has_acknowledged and p.alive]
        try:
            for answer in [self.node.request(pid, Farewell()) for pid in owners]:
                self.node.progress.wait(answer, deadline)
        except TimeoutError:
            pass

    def finalize(self) -> None:
        """Take leave of the launcher, which would take it for a crash; all ranks do so together."""
        from mpi4py import MPI

        faulthandler.dump_traceback_later(_FINALIZE, exit=True)
        self.node.progress.stop()
        self.node.progress.detach()
        MPI.Finalize()

    def leave(self, code: int, *, by_libc: bool = False) -> NoReturn:
        """End this process at once: MPI's own end may hang when others have died.

        Args:
            code: The exit code.
            by_libc: Run the C library's exit handlers: MPICH takes leave of its launcher there,
                and a rank that does not is a crashed one to mpiexec.
        """

        def clear_away() -> None:
            for path in self.segments:
                unlink(path)

        self.node.machine.exit(code, clear_away, by_libc=by_libc)
