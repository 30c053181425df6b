"""The executors of a process: what all of them are told."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from hpcdist._maps.demand import Demand, Want
from hpcdist._maps.pool_state import Pools
from hpcdist._maps.pools import named
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service

# What multiprocessing.Pool and others have, and how it is written here.
ELSEWHERE = {
    "apply": "executor.submit(f, x).result()",
    "apply_async": "executor.submit(f, x)",
    "map_async": "[executor.submit(f, x) for x in xs]",
    "starmap": "executor.map(f, xs, ys)",
    **dict.fromkeys(("imap", "imap_unordered"), "hpcdist.imap(f, xs), or hpcdist.imap_unordered"),
    "pmap": "hpcdist.pmap(f, xs)",
    **dict.fromkeys(("close", "join", "terminate"), "executor.shutdown(), or a with block"),
}


class Member(Protocol):
    """An executor, as its process sees it."""

    def _workers_changed(self) -> None:
        """Look at the workers anew."""

    def want(self) -> Want | None:
        """Tell what of its tasks waits for workers."""

    def _end_with_program(self) -> None:
        """Finish what was given."""


class Executors(Service):
    """The executors of this process: like the standard library's, they finish what they were given.

    At the end of the program, that is, before the workers are sent away.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.calls = node.service(Calls)
        self._demand = node.service(Demand)
        self.ended = False  # the program: no more tasks are taken
        self._all: weakref.WeakSet[Member] = weakref.WeakSet()
        self._lock = node.machine.lock()
        node.on_join.append(self._workers_changed)
        node.service(Pools).watchers.append(self._workers_changed)
        node.machine.before_exit(self._end)

    def add(self, executor: Member) -> None:
        """Have an executor hear of new workers, and wait for its tasks when the program ends."""
        with self._lock:
            self._all.add(executor)
        self._demand.add(executor)

    def _workers_changed(self, pid: int = 0) -> None:
        for executor in self._living():
            executor._workers_changed()

    def _living(self) -> list[Member]:
        with self._lock:
            return list(self._all)

    def _end(self) -> None:
        self.ended = True
        for executor in self._living():
            executor._end_with_program()


def checked(pool: Any, node: Node) -> Any:
    """Read what an executor's `pool` says: pids, a pool, that of a tag; None: all workers."""
    if isinstance(pool, str):
        return named(pool)
    if pool is None or callable(getattr(pool, "workers", None)):
        return pool
    pids = [pool] if hasattr(pool, "__index__") else list(pool)
    if not pids:
        raise ValueError("an Executor needs at least one worker")
    for pid in pids:
        if pid != node.me:
            node.peer(pid)
    return pids
