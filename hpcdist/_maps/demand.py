"""What waits for workers in this process: maps, executors, and those who want one of a pool.

A launch with `adapt=` starts and gives back jobs by it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from hpcdist._maps.pool_state import Pools
from hpcdist._runtime.node import Node, Service

_WORTH = 5.0  # seconds of work for which a worker more is called for


class Want(NamedTuple):
    """What one of them waits for."""

    waiting: int = 0  # items, tasks or calls that no worker has
    flying: int = 0  # those that one has
    seconds: float | None = None  # what each takes; None: that is not known
    tag: str = ""  # that the workers are to have; "": any worker will do
    most: int | None = None  # how many workers it uses

    @property
    def workers(self) -> int:
        """How many workers are called for: each is to have some seconds of work.

        >>> Want(100).workers, Want(100, seconds=0.5).workers, Want(10**6, seconds=1e-6).workers
        (100, 10, 1)
        >>> Want(100, 8, most=4).workers, Want().workers
        (4, 0)
        """
        count = self.waiting + self.flying
        if self.seconds is not None:
            count = min(count, math.ceil(count * self.seconds / _WORTH))
        return count if self.most is None else min(count, self.most)


class Wanting(Protocol):
    """What waits for workers."""

    def want(self) -> Want | None:
        """Tell what it waits for; None: for nothing that more workers would bring."""


class Demand(Service):
    """All that waits for workers in this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards the set below
        self._sources: weakref.WeakSet[Wanting] = weakref.WeakSet()
        self._waited_for = node.service(Pools).waited_for
        self.watchers: list[Callable[[], None]] = []  # called when more may be wanted

    def add(self, source: Wanting) -> None:
        """Ask this one, too, from now on."""
        with self._lock:
            self._sources.add(source)
        self.changed()

    def remove(self, source: Wanting) -> None:
        """Ask this one no more."""
        with self._lock:
            self._sources.discard(source)

    def changed(self) -> None:
        """Let those know who start workers that more may be wanted."""
        for fn in list(self.watchers):
            fn()

    def of(self, tags: Iterable[str]) -> list[Want]:
        """List what waits for workers with these tags, or for any."""
        with self._lock:
            sources = list(self._sources)
        wants = [want for source in sources if (want := source.want()) is not None]
        wants += [Want(waiting, flying, tag=tag) for tag, waiting, flying in self._waited_for()]
        there = set(tags)
        return [want for want in wants if not want.tag or want.tag in there]
