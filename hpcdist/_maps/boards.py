"""Boards: what the batches of a process's maps are at, told by their workers in shared memory.

So a worker's death tells which item it was running. Only the workers of this host can open a
board; the others do without.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref

from hpcdist._runtime.node import Node, Service

LINE = struct.Struct("<QII")  # the batch, and the half-open range of its items that runs
_LINES = 4096
_COOKIE = 16
# Where a board is: its path, and what it begins with. None: nobody could open it.
Address = tuple[str, bytes] | None


def place_of(ident: int) -> int:
    """Return where on a board the line of a batch is."""
    return _COOKIE + LINE.size * (ident % _LINES)


class Board:
    """What the batches of one process's maps are at."""

    def __init__(self, cookie: bytes) -> None:
        self._fd = os.memfd_create("hpcdist-board", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd).atexit = False
        os.ftruncate(self._fd, _COOKIE + LINE.size * _LINES)
        os.pwrite(self._fd, cookie, 0)
        # Another host, or another container, has a different file there, or none.
        self.address: Address = (f"/proc/{os.getpid()}/fd/{self._fd}", cookie)

    def read(self, ident: int) -> tuple[int, int] | None:
        """Tell which items of a batch run, if the batch has said so."""
        line = os.pread(self._fd, LINE.size, place_of(ident))
        number, first, end = LINE.unpack(line)
        return (first, end) if number == ident else None


class Boards(Service):
    """The board of this process, and those of others that it can open."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards making our own
        self._own: Board | None = None
        self.others: dict[int, mmap.mmap] = {}  # by the process they belong to
        node.on_death.append(self._on_death)

    @property
    def address(self) -> Address:
        """Where ours is, made when it is first needed; None: nobody could open it."""
        if not self.node.machine.shares_memory:
            return None
        with self._lock:
            if self._own is None:
                self._own = Board(self.node.machine.random_bytes(_COOKIE))
            return self._own.address

    def read(self, ident: int) -> tuple[int, int] | None:
        """Tell which items of a batch of ours run, if the batch has said so."""
        return None if self._own is None else self._own.read(ident)

    def attach(self, pid: int, address: Address) -> None:
        """Open the board of a process, if it can be reached from here."""
        if pid in self.others or address is None or pid in self.node.members.gone:
            return
        path, cookie = address
        try:
            with open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError):
            return
        if memory[:_COOKIE] == cookie:
            self.others[pid] = memory

    def _on_death(self, pid: int) -> None:
        self.others.pop(pid, None)
