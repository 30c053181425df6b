"""Where a world is in its life, and how far its start has come."""

from __future__ import annotations

import enum

from hpcdist._cluster.moving import Moving, in_order
from hpcdist._contract.phases import Phase


class Life(enum.Enum):
    """Where a world is in its life. It only ever moves on, to one further below."""

    OPEN = "open"
    ABANDONED = "abandoned"  # no more workers are taken in; those that are there stay
    CLOSED = "closed"  # all of them are to end
    OVER = "over"  # its job has ended, or does so by itself


class WorldStates:
    """What of a world only moves forward."""

    def __init__(self) -> None:
        self._phase = Moving(in_order(Phase), Phase.PREPARING)
        self._life = Moving(in_order(Life), Life.OPEN)

    @property
    def phase(self) -> Phase:
        """How far its start has come."""
        return self._phase.now

    def reach(self, phase: Phase) -> None:
        """Note that its start has come so far, unless it has come further."""
        self._phase.to(phase)

    @property
    def closed(self) -> bool:
        """Whether it has ended, or is ending."""
        return self._life.now in (Life.CLOSED, Life.OVER)

    @property
    def _takes_nobody(self) -> bool:
        return self._life.now is not Life.OPEN
