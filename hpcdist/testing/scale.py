"""How much process 1 sends and receives, for clusters of any size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import hpcdist
from hpcdist.testing.simulation import Simulation

_TIME_TO_JOIN = 3600.0  # virtual seconds
_MEGABYTE = 1 << 20


class Cost(NamedTuple):
    """What something has cost, in messages and bytes."""

    what: str
    sent: int  # by process 1
    sent_bytes: int
    received: int  # by process 1
    received_bytes: int
    all: int  # messages by all processes

    def __str__(self) -> str:
        return (
            f"{self.what:12} {self.sent:>9} {self.sent_bytes:>12} "
            f"{self.received:>9} {self.received_bytes:>12} {self.all:>9}"
        )


HEADING = f"{'':12} {'sent':>9} {'bytes':>12} {'received':>9} {'bytes':>12} {'all':>9}"


def table(found: Mapping[str, Sequence[Cost]]) -> str:
    """Lay out, in Markdown, what process 1 sends in clusters of several sizes, each by its name."""
    rows = [f"| process 1 sends for | {' | '.join(found)} |", f"|---{'|---' * len(found)}|"]
    for same in zip(*found.values(), strict=True):
        cells = [f"{cost.sent:,} ({_bytes(cost.sent_bytes)})" for cost in same]
        rows.append(f"| {same[0].what} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _bytes(count: int) -> str:
    """Write a number of bytes.

    >>> _bytes(13_674), _bytes(39_923_537)
    ('14 KB', '40 MB')
    """
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def costs(workers: int, worlds: int, items: int) -> Iterator[Cost]:
    """Yield what it costs to join, and to do one of each, then to lose a world.

    Args:
        workers: How many there are.
        worlds: In how many worlds they are.
        items: How many items a map, and a loop, has.
    """
    with Simulation(workers + 1, worlds=worlds, timeout=_TIME_TO_JOIN) as sim:
        sim.trace.is_on = False
        meter = _Meter(sim)
        yield meter.read("joining")
        for what, f in _acts(items):
            sim.node(1).run(f)
            sim.advance(1)
            yield meter.read(what)
        sim.lose_world(worlds)
        sim.advance(10)
        yield meter.read("a loss")


def _acts(items: int) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "everywhere", lambda: hpcdist.everywhere.call(hpcdist.myid)
    yield "bcast", _broadcast
    yield "reduce", lambda: hpcdist.reduce(operator.add, hpcdist.myid)
    yield "pmap", lambda: hpcdist.pmap(operator.neg, range(items))
    yield "distributed", lambda: hpcdist.distributed(range(items), operator.add)(operator.pos)


def _broadcast() -> None:
    with hpcdist.bcast(bytearray(_MEGABYTE)):
        pass


class _Meter:
    """Reads the traffic since it was last read."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._last = (0, 0, 0, 0, 0)

    def read(self, what: str) -> Cost:
        now = self._totals()
        last, self._last = self._last, now
        return Cost(what, *(a - b for a, b in zip(now, last, strict=True)))

    def _totals(self) -> tuple[int, int, int, int, int]:
        ways = self._sim.network.traffic
        sent = [traffic for (sender, _), traffic in ways.items() if sender == 1]
        received = [traffic for (_, receiver), traffic in ways.items() if receiver == 1]
        return (
            sum(t.messages for t in sent),
            sum(t.nbytes for t in sent),
            sum(t.messages for t in received),
            sum(t.nbytes for t in received),
            sum(t.messages for t in ways.values()),
        )
