"""Questions about the cluster: who is there, and how they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcdist._managers import roster
from hpcdist._monitor.status import StatusTable, table
from hpcdist._runtime.node import node

if TYPE_CHECKING:
    from hpcdist._runtime.members import Members


def _members() -> Members:
    if node.refusal:
        raise RuntimeError(node.refusal)
    return node.members


def myid() -> int:
    """Return this process's id; 1 is the driver.

    Example:
        >>> import hpcdist
        >>> hpcdist.myid()
        1
    """
    _members()
    return node.me


def procs(pid: int | None = None, /) -> list[int]:
    """Return the ids of all processes, or of those on the same host as one.

    Example:
        >>> import hpcdist
        >>> hpcdist.procs()
        [1]
    """
    members = _members()
    if pid is None:
        return members.procs()
    import socket

    if pid != 1 and pid not in members.living:
        raise ValueError(f"no process with id {pid} exists")
    if node.me != 1 and (pid == 1 or node.members.living[pid].manager == "LocalManager"):
        from hpcdist._remote.calls import remotecall_fetch

        found: list[int] = remotecall_fetch(procs, 1, pid)
        return found
    host = socket.gethostname() if pid == 1 else members.living[pid].host
    here = [p for p, m in sorted(members.living.items()) if m.host == host]
    return [1, *here] if pid == 1 or host == socket.gethostname() else here


def workers() -> list[int]:
    """Return the ids of the workers; alone, process 1 is its own worker.

    Example:
        >>> import hpcdist
        >>> hpcdist.workers()
        [1]
    """
    return _members().workers()


def nprocs() -> int:
    """Return how many processes there are."""
    return len(_members().procs())


def nworkers() -> int:
    """Return how many workers there are; alone, 1."""
    return len(_members().workers())


def status() -> StatusTable:
    """Return what every process is doing; prints as a table.

    Example:
        >>> import hpcdist
        >>> hpcdist.status()[0].pid
        1
    """
    _members()
    return table(roster.book)
