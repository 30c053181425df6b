"""For how long workers have had nothing to do: they are asked now and then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hpcdist._errors import HpcdistError
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Slot
from hpcdist._wire import messages
from hpcdist._wire.messages import AskStatus, Condition


class _Known(NamedTuple):
    since: float  # when it was first found idle
    begun: int  # calls by then


class Idleness:
    """For how long workers have had nothing to do, and have kept nothing that others refer to.

    Args:
        node: Process 1.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: dict[int, _Known] = {}
        self._asked: dict[int, Slot] = {}

    def ask(self, pids: Iterable[int]) -> None:
        """Take in what workers have answered, and ask them again; forget all others."""
        now, known, asked = self._node.machine.now(), {}, {}
        for pid in pids:
            slot = self._asked.get(pid)
            found = self._known.get(pid) or _Known(now, -1)
            if slot is not None and not slot.ready:  # busy beyond answering
                known[pid], asked[pid] = _Known(now, found.begun), slot
                continue
            known[pid] = found if slot is None else self._answered(found, slot, now)
            try:
                asked[pid] = self._node.request(pid, AskStatus())
            except (HpcdistError, ValueError):  # it has just died
                continue
        self._known, self._asked = known, asked

    def of(self, pids: Iterable[int]) -> float:
        """Return for how many seconds none of these workers has had anything to do."""
        now = self._node.machine.now()
        spans = [now - self._known[pid].since if pid in self._known else 0.0 for pid in pids]
        return min(spans, default=0.0)

    def _answered(self, found: _Known, slot: Slot, now: float) -> _Known:
        if slot.error is not None:
            return _Known(now, found.begun)
        said, _ = messages.decode(Condition, slot.value[1])
        busy = said.running or said.queued or said.lent or said.begun != found.begun
        return _Known(now, said.begun) if busy else found
