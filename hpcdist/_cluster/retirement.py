"""Workers whose place others have taken: they finish what they have, and leave together."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

from hpcdist._cluster.roster import Record, Roster, State
from hpcdist._errors import HpcdistError
from hpcdist._maps.pool_state import Pools
from hpcdist._monitor import output
from hpcdist._numbers import clock
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Slot
from hpcdist._wire import messages
from hpcdist._wire.member import JobEnd
from hpcdist._wire.messages import AskStatus, Condition

FAREWELL = 2.0  # seconds before the end of a job in which its idle workers leave
_LOOK_EVERY = 0.2  # seconds
_QUIET = 2  # so many looks in a row have to find all of them idle: calls may be under way


def retire(node: Node, records: Sequence[Record], parting: str = "removed") -> None:
    """Count workers out: no pool, map or ANY names them; once all are idle, they leave.

    They leave together, as what one of them runs may call another.

    Args:
        node: Process 1.
        records: The workers.
        parting: Why they leave, for those who ask later.
    """
    roster = node.service(Roster)
    for record in records:
        record.parting = parting
    roster.retire(records)
    node.service(Pools).changed()  # maps and executors give them nothing more
    _Retirement(node, records).look()


class Ending(Protocol):
    """A world whose job ends."""

    retired: bool
    end: JobEnd | None

    @property
    def closed(self) -> bool: ...
    @property
    def is_renewed(self) -> bool: ...
    @property
    def time_left(self) -> float | None: ...
    def retire(self) -> None: ...


def mind_end(node: Node, world: Ending, seconds: float = 0.0) -> None:
    """Let a world's idle workers leave in good order just before its job's end, if that holds."""
    itself, end = weakref.ref(world), world.end  # once ended it need not stay for this
    node.progress.call_later(seconds, lambda: _look_at_end(node, itself(), end))


def _look_at_end(node: Node, world: Ending | None, known: JobEnd | None) -> None:
    if world is None or world.closed or world.end is not known or world.is_renewed:
        return  # where it is renewed, what takes its place decides
    left = world.time_left
    if left is None:
        return
    if left > FAREWELL:
        mind_end(node, world, left - FAREWELL)
    elif not world.retired:
        world.retired = True
        world.retire()


def tell_lingering(job: object, seconds: float) -> None:
    """Tell the user that a job goes on, and is charged, without workers."""
    output.say(
        f"hpcdist: job {job} lingers for {clock(seconds)}: the next addprocs with these options "
        "takes it over"
    )


class _Retirement:
    """Workers that are asked, again and again, whether they are idle."""

    def __init__(self, node: Node, records: Sequence[Record]) -> None:
        self._node = node
        self._roster = node.service(Roster)
        self._records = list(records)
        self._asked: dict[int, Slot] = {}
        self._quiet = 0

    def look(self) -> None:
        """Ask those that are there; let them go if they have been idle for a while."""
        there = [r for r in self._records if r.state is State.REGISTERED]
        idle = [self._is_idle(record.pid) for record in there]  # all of them: each is asked anew
        self._quiet = self._quiet + 1 if all(idle) else 0
        if self._quiet >= _QUIET:
            self._roster.dismiss(there)
            return
        for record in there:
            self._ask(record.pid)
        if there:
            self._node.progress.call_later(_LOOK_EVERY, self.look)

    def _ask(self, pid: int) -> None:
        if pid not in self._asked:
            try:
                self._asked[pid] = self._node.request(pid, AskStatus())
            except (HpcdistError, ValueError):  # it has just died
                pass

    def _is_idle(self, pid: int) -> bool:
        slot = self._asked.get(pid)
        if slot is None or not slot.ready:
            return False
        del self._asked[pid]
        if slot.error is not None:
            return False
        said, _ = messages.decode(Condition, slot.value[1])
        return not (said.running or said.queued)
