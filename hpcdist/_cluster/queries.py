"""Questions about the cluster: who is there, and how they are."""

from __future__ import annotations

from hpcdist._cluster.roster import Roster
from hpcdist._keeper.job_end import job_end
from hpcdist._monitor.status import StatusTable, table
from hpcdist._public import public
from hpcdist._remote.calls import ANY
from hpcdist._runtime.node import Node, here


def _node() -> Node:
    node = here.node
    node.admit()
    return node


@public
def myid() -> int:
    """Return this process's id; 1 is the driver.

    Example:
        >>> import hpcdist
        >>> hpcdist.myid()
        1
    """
    return _node().me


@public
def procs(pid: int | None = None, /) -> list[int]:
    """Return the ids of all processes, or of those on the same host as one.

    Example:
        >>> import hpcdist
        >>> hpcdist.procs()
        [1]
    """
    node = _node()
    members = node.members
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


@public
def workers(tag: str | None = None, /) -> list[int]:
    """Return the ids of the workers; alone, process 1 is its own worker.

    Args:
        tag: Only of those with this tag: see `addprocs`.

    Raises:
        ValueError: There is no such tag.

    Example:
        >>> import hpcdist
        >>> hpcdist.workers()
        [1]
    """
    members = _node().members
    return members.workers() if tag is None or tag == ANY else members.tagged(tag)


@public
def nprocs() -> int:
    """Return how many processes there are."""
    return len(_node().members.procs())


@public
def nworkers() -> int:
    """Return how many workers there are; alone, 1."""
    return len(_node().members.workers())


@public
def time_left(pid: int | None = None, /) -> float | None:
    """Return how many seconds the job of a process may still run; None: no end is known.

    Args:
        pid: The process; None: this one.

    Example:
        >>> import hpcdist
        >>> print(hpcdist.time_left())
        None
    """
    node = _node()
    asked = node.me if pid is None else pid
    if asked not in (1, node.me) and asked not in node.members.living:
        node.peer(asked)  # raises the right error
    end = node.members.ends.get(asked)
    at = end.at if end is not None else job_end() if asked == node.me else None
    return None if at is None else max(0.0, at - node.machine.time())


@public
def status() -> StatusTable:
    """Return what every process is doing; prints as a table.

    Example:
        >>> import hpcdist
        >>> hpcdist.status()[0].pid
        1
    """
    node = _node()
    return table(node, node.service(Roster).book)
