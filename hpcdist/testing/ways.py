"""How simulated processes reach each other: links, and the plane of a world."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hpcdist._transport.contracts import Deliver, Item
from hpcdist._transport.router import Peer
from hpcdist.testing.communicators import Meetings, SimComm, SimMpiError
from hpcdist.testing.network import Network, Parcel, Pipe, hand_on
from hpcdist.testing.simulated_loop import SimLoop


class End(NamedTuple):
    """A process, as the ways to it see it."""

    pid: int
    loop: SimLoop
    deliver: Deliver
    links: list[SimLink]  # those that end with it


class SimLink:
    """One end of a link."""

    def __init__(self, network: Network, end: End, other: End) -> None:
        self.peer: Any = None
        self.open = True
        self.ended: Callable[[SimLink], None] = lambda link: None
        self.other: SimLink = self
        self._network = network
        self._end = end
        self._pipe = Pipe(network, end.pid, other.pid)
        self._has_begun = False
        self._early: deque[Callable[[], None]] = deque()
        end.links.append(self)

    def begin(self) -> None:
        """Let messages in from now on."""
        self._has_begun = True
        while self._early:
            self._end.loop.arrive(self._early.popleft())

    @property
    def idle(self) -> bool:
        """Whether everything given to `send` is out of this process's hands: always."""
        return True

    def send(self, items: Sequence[Item]) -> None:
        """Send messages with their buffers."""
        if self.open:
            for item in items:
                self._pipe.send(item, self.other._arrive, self._end.loop.arrive)

    def open_with(self, act: Callable[[], None]) -> None:
        """Have the process at the other end do something first."""
        self._pipe.put(lambda: self.other._end.loop.arrive(act))

    def _arrive(self, parcel: Parcel) -> None:
        self._let_in(lambda: self._read(parcel))

    def _let_in(self, act: Callable[[], None]) -> None:
        if self._has_begun:
            self._end.loop.arrive(act)
        else:
            self._early.append(act)

    def _read(self, parcel: Parcel) -> None:
        if self.open:
            self._network.note_received(self.other._end.pid, self._end.pid, parcel.data)
            hand_on(parcel, self.peer, self._end.deliver)

    # Ending

    def lose(self) -> None:
        """Take note that the other end is gone, and tell."""
        if self.open:
            self.close()
            self.ended(self)

    def close(self) -> None:
        """Close the link quietly; the other end learns it."""
        if self.open:
            self.open = False
            if self in self._end.links:
                self._end.links.remove(self)
            other = self.other
            self._pipe.put(lambda: other._let_in(other.lose))

    def forget_after_fork(self) -> None:
        """Do nothing: simulated processes do not fork."""


def link(network: Network, one: End, other: End) -> tuple[SimLink, SimLink]:
    """Join two processes; return the end of each."""
    here, there = SimLink(network, one, other), SimLink(network, other, one)
    here.other, there.other = there, here
    return here, there


class MpiWorld:
    """What the processes of a world with MPI share."""

    def __init__(self) -> None:
        self.ranks: dict[int, SimPlane] = {}
        self.meetings: dict[int, Meetings] = {}  # by the number of the communicator


class SimPlane:
    """What MPI is to a real process: the way to all processes of its world."""

    comm: Any = None
    failure = SimMpiError
    paused = False
    woke = False
    moved = 0

    def __init__(self, network: Network, end: End, world: MpiWorld) -> None:
        self.peers: dict[int, Peer] = {}
        self.dead: set[int] = set()
        self._network = network
        self._end = end
        self._world = world
        self._ranks = world.ranks
        self._pipes: dict[int, Pipe] = {}
        self._arrived: deque[tuple[int, Parcel]] = deque()
        self.rank = len(world.ranks)
        world.ranks[self.rank] = self

    @property
    def size(self) -> int:
        """How many ranks the world has."""
        return len(self._ranks)

    def send(self, rank: int, items: Sequence[Item]) -> None:
        """Send messages with their buffers."""
        other = self._ranks[rank]
        pipe = self._pipes.get(rank)
        if pipe is None:
            pipe = self._pipes[rank] = Pipe(self._network, self._end.pid, other._end.pid)
        for item in items:
            if rank not in self.dead:
                pipe.send(item, lambda parcel: other._arrive(self.rank, parcel), self._through)
            elif isinstance(item, tuple) and item[2] is not None:
                item[2]()

    def _through(self, end: Callable[[], None]) -> None:
        self._end.loop.arrive(end)

    def send_frame(self, rank: int, frame: bytes) -> None:
        """Send one frame without buffers."""
        self.send(rank, [frame])

    def rouse(self, rank: int) -> None:
        """Do nothing: nobody oversleeps here."""

    def open(self, pids: dict[int, int], peer: Callable[[int], Peer]) -> None:
        """Use it from now on: the other ranks are peers."""
        for rank, pid in pids.items():
            if rank != self.rank:
                other = self.peers[rank] = peer(pid)
                other.plane, other.rank = self, rank
        self._end.loop.plane = self
        for _ in self._arrived:
            self._end.loop.arrive(self.poll)

    def _arrive(self, rank: int, parcel: Parcel) -> None:
        self._arrived.append((rank, parcel))
        if self._end.loop.plane is self:
            self._end.loop.arrive(self.poll)

    def poll(self) -> bool:
        """Hand on one message that has arrived; tell whether there was one."""
        if not self._arrived:
            return False
        rank, parcel = self._arrived.popleft()
        sender = self._ranks[rank]._end.pid
        self._network.note_received(sender, self._end.pid, parcel.data)
        hand_on(parcel, self.peers.get(rank), self._end.deliver)
        return True

    def busy(self) -> bool:
        """Tell whether something is under way that only polling completes: never."""
        return False

    def make_comm(self, pids: Sequence[int], number: int) -> SimComm:
        """Make a communicator of some processes."""
        meetings = self._world.meetings.get(number)
        if meetings is None:
            meetings = self._world.meetings[number] = Meetings(self._network, pids)
        return SimComm(meetings, self._end.pid, self._end.loop)

    def free_comm(self, made: SimComm) -> None:
        """Let go of a communicator."""
        made.Free()

    def arm(self) -> None:
        """Do nothing."""

    def disarm(self) -> None:
        """Do nothing."""

    def lose(self, rank: int) -> None:
        """Forget a dead rank."""
        self.dead.add(rank)
