"""The keeper's ends of the sockets by which its ranks speak PMI-1.

Like the keeper it imports only what is quick to import.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterable

from hpcdist._keeper.pmi import Reply
from hpcdist._keeper.processes import CHUNK

_KEEPERS_END = "HPCDIST_PMI_KEEPERS_END"


class PmiSockets:
    """One socket for each rank that has been forked here."""

    def __init__(self) -> None:
        self._ours: dict[int, int] = {}

    def open(self, rank: int, *, inherit: bool) -> tuple[int, int, dict[str, str]]:
        """Make a rank's socket; return our end, its own, and the variables that tell of them.

        A rank has both ends (see `stop_at_next_word`), after an exec only if they are inherited.
        """
        near, far = socket.socketpair()
        ours, theirs = near.detach(), far.detach()
        for end in (ours, theirs):
            os.set_inheritable(end, inherit)
        self._ours[rank] = ours
        return ours, theirs, {"PMI_FD": str(theirs), _KEEPERS_END: str(ours)}

    def read(self, rank: int) -> bytes:
        """Return what a rank has written; nothing at its end."""
        try:
            return os.read(self._ours[rank], CHUNK)
        except OSError:
            return b""

    def forget(self, rank: int) -> int:
        """Return our end, which is to be closed."""
        return self._ours.pop(rank)

    def write(self, replies: Iterable[Reply]) -> None:
        """Answer."""
        for rank, reply in replies:
            if rank in self._ours:
                try:
                    os.write(self._ours[rank], reply)
                except OSError:
                    pass  # it died; waitpid will say so


def stop_at_next_word() -> None:
    """Have this rank, which is through MPI_Init, stand still when it says something by PMI.

    `MPI_Abort` only writes a line, expects to be killed for it, and returns (seen with MPICH
    5.0.2): a rank that went on would answer its caller before the keeper has read the line. So the
    kernel stops this process within its own write; the keeper kills it, or lets it go on.
    """
    fd = int(os.environ.pop(_KEEPERS_END, "-1"))
    if fd >= 0:
        _send_at_next_word(fd, signal.SIGSTOP)
        os.close(fd)


def end_at_next_word() -> None:
    """Have this rank, which is through MPI_Init, die when it says something by PMI.

    For one whose launcher would end all ranks for the `MPI_Abort` of one, and not before this one
    has answered its caller. The code is in what MPICH has printed by then.
    """
    fd = int(os.environ.get("PMI_FD", "-1"))
    if fd >= 0:
        near, far = socket.socketpair()
        _send_at_next_word(far.detach(), signal.SIGKILL)  # it stays open, and nobody reads it
        os.dup2(near.fileno(), fd, inheritable=False)
        near.close()


def _send_at_next_word(fd: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when something arrives at a socket."""
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, int(number))
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
