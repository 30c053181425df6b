"""The maps under way that this process has called, and how others are shown them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from hpcdist._items.timings import Timings
from hpcdist._maps.backlog import Backlog
from hpcdist._maps.batch_calls import BatchCalls
from hpcdist._maps.demand import Demand
from hpcdist._maps.lanes import Batch, Early
from hpcdist._maps.map_worker import Batches
from hpcdist._maps.pool_state import Pools
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._wire.messages import HandedOver


class Engine(Protocol):
    """One map under way."""

    function: str  # its name
    backlog: Backlog
    failures: int

    @property
    def workers(self) -> int:
        """How many workers it has."""

    def poke(self) -> None:
        """Look at the workers anew."""


class Maps(Service):
    """The maps under way that this process has called."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.batches = node.service(Batches)
        self.calls = node.service(BatchCalls)
        self.timings = node.service(Timings)
        self.demand = node.service(Demand)
        self.engines: dict[Engine, float] = {}  # and when each began
        node.on_join.append(self._poke)
        node.on_death.append(self._poke)
        node.service(Pools).watchers.append(self._poke)

    def add(self, engine: Engine) -> None:
        """Take note of a map that begins."""
        self.engines[engine] = self.node.machine.now()

    def remove(self, engine: Engine) -> None:
        """Take note of a map that has ended."""
        self.engines.pop(engine, None)

    @on(HandedOver)
    def _on_handed_over(self, said: HandedOver, mail: Mail) -> None:
        batch = self.node.pending.get(said.batch)
        if isinstance(batch, Batch):  # else it has ended, in whatever way
            batch.lane.note(Early(batch, said.first, mail.body, mail.buffers))

    def _poke(self, pid: int = 0) -> None:
        """Let every map look at its workers anew."""
        for engine in list(self.engines):
            engine.poke()


class MapState(NamedTuple):
    """How far a map has come."""

    ident: int  # no other map under way has the same
    function: str
    done: int  # items
    total: int | None  # None: the collections do not say
    failures: int
    workers: int
    seconds: float  # since it began

    @property
    def rate(self) -> float:
        """How many items it has done a second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def to_go(self) -> float | None:
        """How many seconds it will go on for at that rate; None: nothing says so."""
        if self.total is None or not self.rate:
            return None
        return (self.total - self.done) / self.rate


def under_way(node: Node) -> list[MapState]:
    """List the maps under way, the oldest first."""
    return [
        MapState(
            id(engine),
            engine.function,
            engine.backlog.done,
            engine.backlog.source.size,
            engine.failures,
            engine.workers,
            node.machine.now() - began,
        )
        for engine, began in list(node.service(Maps).engines.items())
    ]
