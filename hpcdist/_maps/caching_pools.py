"""Pools that send a function once to each worker, and the end of what they have sent."""

from __future__ import annotations

import weakref
from typing import Any

from hpcdist._maps import kept_functions
from hpcdist._maps.kept_functions import Token
from hpcdist._maps.pools import Callee, WorkerPool
from hpcdist._public import public
from hpcdist._runtime.node import Node, Service, here
from hpcdist._wire.messages import Forget

# By the ids of things: the things, what workers know them by, and the workers that have them.
Deliveries = dict[tuple[int, ...], tuple[tuple[object, ...], Token, set[int]]]


class SentFunctions(Service):
    """The functions that workers keep for caching pools which have gone."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.unused: list[Deliveries] = []  # a pool's finaliser adds what it has sent
        node.progress.before_sleep.append(self._drop_unused)

    def drop(self, sent: Deliveries) -> None:
        """Let workers drop the functions they were sent."""
        by_worker: dict[int, list[Token]] = {}
        for _, token, told in sent.values():
            for pid in told:
                by_worker.setdefault(pid, []).append(token)
        for pid, tokens in by_worker.items():
            peer = self.node.peers.get(pid)
            if peer is not None and peer.alive:
                peer.send(Forget(tokens, []))

    def _drop_unused(self) -> None:
        while self.unused:
            self.drop(self.unused.pop())


@public
class CachingPool(WorkerPool):
    """A pool that sends a function once to each worker, with the data it has captured.

    A function is known by its identity: the same object is not sent again, whatever has become
    of its data meanwhile; a new closure is another function. `clear` drops them all.

    Example:
        >>> import hpcdist
        >>> data = list(range(1000))
        >>> pool = hpcdist.CachingPool([1])
        >>> total = lambda n: sum(data[:n])
        >>> [hpcdist.remotecall_fetch(total, pool, n) for n in (1, 2, 3)]
        [0, 1, 3]
        >>> hpcdist.clear(pool)
    """

    def _begin(self, node: Node, name: tuple[int, int, int]) -> None:
        super()._begin(node, name)
        self._start_anew()

    def _start_anew(self) -> None:
        self._sent: Deliveries = {}
        unused = self._node.service(SentFunctions).unused
        weakref.finalize(self, unused.append, self._sent).atexit = False

    def _entry(self, *things: object) -> tuple[Token, set[int]]:
        """Name what is sent once, and say which workers have it."""
        key = tuple(map(id, things))
        found = self._sent.get(key)
        if found is None:
            node = self._node
            # The things themselves are kept: their ids must not go to others.
            found = self._sent[key] = (things, (node.me, next(node.ids)), set())
        return found[1], found[2]

    def _named(self, f: Any, pid: int) -> Callee:
        if pid == self._node.me or not callable(f):
            return Callee(f)
        token, told = self._entry(f)
        if pid in told:
            return Callee(kept_functions.call_kept, (token,))
        return Callee(kept_functions.call_first, (token, f), lambda: told.add(pid))

    def _clear(self) -> None:
        sent = self._sent
        self._start_anew()
        self._node.service(SentFunctions).drop(sent)
        self._node.progress.nudge()


@public
def clear(pool: object, /) -> None:
    """Drop every function a CachingPool has sent to its workers.

    Example:
        >>> import hpcdist
        >>> hpcdist.clear(hpcdist.CachingPool([1]))
    """
    here.node.admit()
    if not isinstance(pool, CachingPool):
        raise TypeError(f"only a CachingPool keeps functions to clear, not {pool!r}")
    pool._clear()
