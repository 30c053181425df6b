"""The maps under way that this process has called, as others are shown them."""

from __future__ import annotations

from typing import NamedTuple

from hpcdist._maps.engine import Maps
from hpcdist._runtime.node import Node


class MapState(NamedTuple):
    """How far a map has come."""

    ident: int  # no other map under way has the same
    function: str
    done: int  # items
    total: int | None  # None: the collections do not say
    failures: int
    workers: int
    seconds: float  # since it began


def under_way(node: Node) -> list[MapState]:
    """List the maps under way, the oldest first."""
    return [
        MapState(
            id(engine),
            getattr(engine.work.f, "__qualname__", type(engine.work.f).__name__),
            engine.backlog.done,
            engine.backlog.source.size,
            engine.failures,
            engine.workers,
            node.machine.now() - began,
        )
        for engine, began in list(node.service(Maps).engines.items())
    ]
