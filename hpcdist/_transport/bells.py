"""Waking an MPI peer that sleeps: on this host a shared flag and a Unix datagram, else UDP.

MPI has no way to wake a sleeping process. Each process keeps a byte in a file that all of its
world on this host have mapped: 1 while it sleeps. A sender looks there and, if the process
sleeps, rings. A flag that is down costs the sender 40 ns.

The flags of other hosts cannot be seen: there every message is followed by a ring, unless another
went there just before. Should rings get lost (a firewall), a sleeper looks by itself, ever more
seldom: see `Progress`.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Mapping, Sequence

Address = tuple[str, int]
_JUST_BEFORE = 0.0001  # seconds for which a peer that was rung surely looks for messages
_ADDRESSES_MOST = 3
_CORDS_MOST = 64  # each is a descriptor
_LOCAL, _DATAGRAM = socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
_now = time.monotonic


class Bells:
    """The bells of one world, as this process knows them."""

    def __init__(self, folder: str, rank: int, size: int) -> None:
        """Hang up our bell in the folder all ranks share.

        Args:
            folder: A private folder of this host.
            rank: Our rank.
            size: How many ranks there are.
        """
        self._folder = folder
        self._rank = rank
        path = os.path.join(folder, "asleep")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, max(size, 1))
            self.asleep = mmap.mmap(fd, max(size, 1))
        finally:
            os.close(fd)
        self.socket = socket.socket(_LOCAL, _DATAGRAM)
        self.socket.bind(self._name_of(rank))
        self._far: dict[int, _FarBell] = {}
        self._cords: dict[int, socket.socket] = {}  # connected to the bells of others
        self.far_socket: socket.socket | None = None

    def hang_far(self, interface: str | None = None) -> str:
        """Hang up a bell for the ranks of other hosts; return where it is, for `reach_far`."""
        from hpcdist._transport import network  # not needed where all are of one host

        found = network.addresses(interface)
        family = socket.AF_INET6 if all(":" in each for each in found) else socket.AF_INET
        version = [each for each in found if (":" in each) == (family == socket.AF_INET6)]
        self.far_socket = socket.socket(family, _DATAGRAM)
        self.far_socket.bind(("", 0))
        port = self.far_socket.getsockname()[1]
        return ",".join(f"{each}|{port}" for each in version[:_ADDRESSES_MOST])

    def reach_far(self, bells: Mapping[int, str]) -> None:
        """Learn where the bells of ranks on other hosts are."""
        from hpcdist._transport import network

        for rank, text in bells.items():
            self._far[rank] = _FarBell(network.targets(text))
            self.asleep[rank] = 1  # for all of this host: it may always be asleep

    def _name_of(self, rank: int) -> str:
        """Return a name in Linux's abstract namespace: it ends with the process, however that ends.

        Anybody on the host could ring there; that wakes us for nothing.
        """
        return f"\0{self._folder}/b{rank}"

    def ring(self, rank: int) -> bool:
        """Wake a rank if it sleeps; tell whether it did."""
        if self.asleep[rank]:
            if rank in self._far:
                return self._ring_far(self._far[rank])
            # Once: the datagram stays until it is heard, and a process that sleeps again raises its
            # flag again. A process that is slow to wake would otherwise be rung for each message.
            self.asleep[rank] = 0
            try:
                cord = self._cords.get(rank) or self._hang_cord(rank)
                if cord is not None:
                    cord.send(b"!")
                else:
                    self.socket.sendto(b"!", self._name_of(rank))
            except OSError:  # full: it is being rung already; gone: its keeper knows
                pass
            return True
        return False

    def _hang_cord(self, rank: int) -> socket.socket | None:
        """Connect to a bell: that rings a fifth sooner than by name."""
        if len(self._cords) >= _CORDS_MOST:
            return None
        cord = None
        try:
            cord = socket.socket(_LOCAL, _DATAGRAM)
            cord.connect(self._name_of(rank))
        except OSError:  # too many open files; or the peer is gone
            if cord is not None:
                cord.close()
            return None
        self._cords[rank] = cord
        return cord

    def _ring_far(self, bell: _FarBell) -> bool:
        now, last = _now(), bell.last
        bell.last = now
        if now - last < _JUST_BEFORE or self.far_socket is None:
            return False
        for address in bell.addresses:
            try:
                self.far_socket.sendto(b"!", address)
            except OSError:  # full, or there is no way to that one of its addresses
                pass
        return True

    def arm(self) -> None:
        """Say that we are going to sleep."""
        self.asleep[self._rank] = 1

    def disarm(self) -> None:
        """Say that we are awake."""
        self.asleep[self._rank] = 0

    def hear(self, events: int) -> None:
        """Take a ring that has arrived."""
        _hear(self.socket)

    def hear_far(self, events: int) -> None:
        """Take a ring that has arrived from another host."""
        if self.far_socket is not None:
            _hear(self.far_socket)

    def close(self) -> None:
        """Take our bell down."""
        self.asleep.close()
        for each in (self.socket, self.far_socket, *self._cords.values()):
            if each is not None:
                each.close()


class _FarBell:
    """Where a rank of another host is rung, and when we last sent there."""

    __slots__ = ("addresses", "last")

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.addresses = addresses
        self.last = 0.0


def _hear(bell: socket.socket) -> None:
    try:
        bell.recv(16)  # one: should there be more, the next look finds it
    except OSError:
        pass
