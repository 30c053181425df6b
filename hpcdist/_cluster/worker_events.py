"""`on_worker()`: functions that are called as workers come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hpcdist._cluster.roster import Roster
from hpcdist._public import public
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service, here

Callback = Callable[[int], object]


class Watcher(NamedTuple):
    """What somebody wants to have called, with a worker's pid."""

    added: Callback | None
    removed: Callback | None
    lost: Callback | None


class WorkerEvents(Service):
    """Those on process 1 who want to know of workers that come and go."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.watchers: list[Watcher] = []
        self._calls = node.service(Calls)
        self._roster = node.service(Roster)
        node.on_join.append(lambda pid: self._tell(pid, "added"))
        node.on_death.append(self._on_death)

    def _on_death(self, pid: int) -> None:
        left = self._roster.has_left(pid)
        self._tell(pid, "removed" if left else "lost")

    def _tell(self, pid: int, what: str) -> None:
        for watcher in list(self.watchers):
            callback: Callback | None = getattr(watcher, what)
            if callback is not None:
                self._calls.tell(callback, self.node.me, (pid,), {})


@public
def on_worker(
    added: Callback | None = None, removed: Callback | None = None, lost: Callback | None = None
) -> Callable[[], None]:
    """Have functions called with the pid of each worker that comes or goes.

    They run on process 1, on its service thread, one after the other in the order of what happens.

    Args:
        added: Called for a worker that has joined.
        removed: Called for one that has left because it was asked to.
        lost: Called for one that has died.

    Returns:
        A function that takes them back.

    Example:
        >>> import hpcdist
        >>> stop = hpcdist.on_worker(lost=lambda pid: print("lost", pid))
        >>> stop()
    """
    node = here.node
    node.admit()
    if node.me != 1:
        raise RuntimeError("Only process 1 hears of workers that come and go")
    for name, callback in (("added", added), ("removed", removed), ("lost", lost)):
        if callback is not None and not callable(callback):
            raise TypeError(f"{name} is a function, not {callback!r}")
    watchers = node.service(WorkerEvents).watchers
    mine = Watcher(added, removed, lost)
    watchers.append(mine)

    def stop() -> None:
        if mine in watchers:
            watchers.remove(mine)

    return stop
