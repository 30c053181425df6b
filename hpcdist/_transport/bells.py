"""Waking an MPI peer of this host that sleeps: a shared flag and a Unix datagram.

MPI has no way to wake a sleeping process. Each process keeps a byte in a file that all of its
world on this host have mapped: 1 while it sleeps. Whoever sends to it looks there and, if it
sleeps, rings. A flag that is down costs the sender 40 ns.
"""

from __future__ import annotations

import mmap
import os
import socket


class Bells:
    """The bells of one world on this host."""

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
            self._asleep = mmap.mmap(fd, max(size, 1))
        finally:
            os.close(fd)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(self._name_of(rank))

    def _name_of(self, rank: int) -> str:
        """A name in Linux's abstract namespace: it leaves with the process, however that ends.

        Anybody on the host could ring there; that wakes us for nothing.
        """
        return f"\0{self._folder}/b{rank}"

    def ring(self, rank: int) -> bool:
        """Wake a rank if it sleeps; tell whether it did."""
        if self._asleep[rank]:
            # Once: the datagram stays until it is heard, and whoever sleeps again raises its flag
            # again. A process that is slow to wake would otherwise be rung for each message.
            self._asleep[rank] = 0
            try:
                self.socket.sendto(b"!", self._name_of(rank))
            except OSError:  # full: it is being rung already; gone: its keeper knows
                pass
            return True
        return False

    def arm(self) -> None:
        """Say that we are going to sleep."""
        self._asleep[self._rank] = 1

    def disarm(self) -> None:
        """Say that we are awake."""
        self._asleep[self._rank] = 0

    def hear(self, events: int) -> None:
        """Take the rings that have arrived."""
        try:
            while True:
                self.socket.recv(16)
        except OSError:
            pass

    def close(self) -> None:
        """Take our bell down."""
        self._asleep.close()
        self.socket.close()
